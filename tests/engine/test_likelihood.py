"""Teacher forcing: scores against a token-by-token loop with a KV cache; measures against hand arithmetic."""

import math

import pytest
import torch
from tiny import EOS, FAMILIES, VOCAB, tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM

import rlseq.engine.likelihood
from rlseq.engine.likelihood import score, token_logprobs
from rlseq.engine.measures import (
    bits_per_byte,
    block_nll,
    exact_pass_at_k,
    perplexity,
    reference_probability,
    sequence_logprob,
)
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.engine.strategies import Beam, Sample

PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 5, 6, 7, 8, 3], [8], [5, 6, 7]]
COMPLETIONS = [[10, 11, 2], [12, 2], [13], [14, 15, 16, 17, 2], [], [10, 12, 10, 2]]


def step_by_step(model, prompt, completion):
    """Probability of each token by the loop that generates: one token at a time, keys and values cached."""
    cache, probabilities, inputs = None, [], prompt
    with torch.no_grad():
        for token in completion:
            out = model(input_ids=torch.tensor([inputs]), past_key_values=cache, use_cache=True)
            cache, inputs = out.past_key_values, [token]
            weights = out.logits[0, -1].exp()
            probabilities.append((weights[token] / weights.sum()).item())
    return probabilities


def assert_scores_match_the_loop(model, prompts, completions, tolerance, **options):
    scores = score(model, prompts, completions, **options)
    assert len(scores) == len(completions)
    for found, prompt, completion in zip(scores, prompts, completions, strict=True):
        expected = [math.log(p) for p in step_by_step(model, prompt, completion)]
        assert found.shape == (len(completion),)
        assert found.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_one_forward_equals_the_loop_with_a_cache(family):
    assert_scores_match_the_loop(tiny_model(family, dtype=torch.float64), PROMPTS, COMPLETIONS, 1e-9)
    assert_scores_match_the_loop(tiny_model(family), PROMPTS, COMPLETIONS, 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_losses_sum_to_minus_log_of_the_joint_probability(family):
    model = tiny_model(family, dtype=torch.float64)
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        joint = math.prod(step_by_step(model, prompt, completion))
        loss = -score(model, [prompt], [completion])[0].sum().item()
        assert loss == pytest.approx(-math.log(joint), rel=1e-9, abs=1e-12)
        assert -sequence_logprob(score(model, [prompt], [completion])[0]).item() == pytest.approx(loss)


def test_every_completion_of_up_to_three_tokens_has_a_probability_and_they_sum_to_one():
    # All sequences over 3 live tokens that stop at EOS or are cut at 3 tokens: a tree's leaves.
    model = tiny_model(vocab_size=3, dtype=torch.float64)
    leaves = [[EOS]] + [[a, EOS] for a in (0, 1)] + [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)]
    scores = score(model, [[1, 0]] * len(leaves), leaves)
    assert sum(x.sum().exp().item() for x in scores) == pytest.approx(1, abs=1e-12)


def test_block_losses_have_the_same_total_for_every_n():
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    assert block_nll(logprobs, 1).tolist() == [1, 2, 4, 8, 16]
    assert block_nll(logprobs, 2).tolist() == [3, 12, 16]
    assert block_nll(logprobs, 3).tolist() == [7, 24]
    assert block_nll(logprobs, 5).tolist() == [31]
    assert block_nll(logprobs, 9).tolist() == [31]
    assert block_nll(torch.empty(0), 2).shape == (0,)
    model = tiny_model(dtype=torch.float64)
    (scores,) = score(model, [[5, 6]], [[7, 8, 9, 10, 11, 12, 2]])
    joint = math.prod(step_by_step(model, [5, 6], [7, 8, 9, 10, 11, 12, 2]))
    for n in range(1, 9):
        assert block_nll(scores, n).sum().item() == pytest.approx(-math.log(joint), rel=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_at_a_token_reaches_the_inputs_before_it_and_none_after(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    ids = torch.tensor([[5, 6, 7, 10, 11, 12, 2]])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    losses = -token_logprobs(model(inputs_embeds=embeddings).logits[:, :-1], ids[:, 1:])[0]
    for i in range(1, ids.shape[1]):
        (gradient,) = torch.autograd.grad(losses[i - 1], embeddings, retain_graph=True)
        size = gradient[0].abs().sum(-1)
        assert (size[:i] > 0).all()
        assert (size[i:] == 0).all()  # exactly: token i itself, and everything after it


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_batched_equals_one_at_a_time(family):
    model = tiny_model(family)
    one = [score(model, [p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for batch_tokens in (1, 8, 16, 1000):
        for found, expected in zip(score(model, PROMPTS, COMPLETIONS, batch_tokens=batch_tokens), one, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family, monkeypatch):
    model = tiny_model(family)
    calls, real_pack = [], rlseq.engine.likelihood.pack
    monkeypatch.setattr(rlseq.engine.likelihood, "pack", lambda *a, **k: calls.append("pack") or real_pack(*a, **k))
    packed = score(model, PROMPTS, COMPLETIONS)
    assert calls
    calls.clear()
    monkeypatch.setattr(rlseq.engine.likelihood, "supports_packing", lambda *_: (False, "for the test"))
    padded = score(model, PROMPTS, COMPLETIONS)
    assert not calls
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    model = tiny_model(family)
    prompt, completion = [5, 6, 7], [10, 11, 2]
    ids = prompt + completion
    left, right = 4, 3
    inputs = torch.tensor([[0] * left + ids + [0] * right])
    mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])
    positions = torch.tensor([[0] * left + [*range(len(ids))] + [0] * right])
    with torch.no_grad():
        logits = model(input_ids=inputs, attention_mask=mask, position_ids=positions).logits[0]
    start = left + len(prompt)
    found = token_logprobs(logits[start - 1 : start + 2], torch.tensor(completion))
    torch.testing.assert_close(found, score(model, [prompt], [completion])[0], atol=2e-5, rtol=0)
    longer = score(model, [prompt, [9]], [completion, [3] * 20])[0]  # padded on the right by a longer neighbour
    torch.testing.assert_close(found, longer, atol=2e-5, rtol=0)


def test_scores_under_a_strategy_are_those_of_its_distribution():
    model = tiny_model(dtype=torch.float64)
    prompt, completion = [5, 6, 7], [10, 11, 2]
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, 2:5]
    expected = []
    for step, token in zip(logits.tolist(), completion, strict=True):  # temperature 2, then the 12 largest
        kept = sorted(step)[-12:]
        weight = sum(math.exp(x / 2) for x in kept)
        expected.append(step[token] / 2 - math.log(weight) if step[token] in kept else -math.inf)
    found = score(model, [prompt], [completion], strategy=Sample(temperature=2.0, top_k=12))[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    everything = score(model, [prompt] * VOCAB, [[token] for token in range(VOCAB)], strategy=Sample(top_k=1))
    assert sorted(x.item() for x in everything)[-2:] == [-math.inf, 0.0]  # only one token can be sampled
    with pytest.raises(ValueError, match="no distribution"):
        score(model, [prompt], [completion], strategy=Beam())


def test_chunks_of_the_vocabulary_projection_change_nothing(monkeypatch):
    model = tiny_model()
    expected = score(model, PROMPTS, COMPLETIONS)
    monkeypatch.setattr(rlseq.engine.likelihood, "_CHUNK_LOGITS", 2 * VOCAB)
    largest = []
    real = token_logprobs
    monkeypatch.setattr(
        rlseq.engine.likelihood,
        "token_logprobs",
        lambda logits, *a: largest.append(logits.numel()) or real(logits, *a),
    )
    for found, wanted in zip(score(model, PROMPTS, COMPLETIONS), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert max(largest) == 2 * VOCAB


def test_a_model_that_caps_its_logits_is_scored_by_its_own_forward():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "sliding_window": 64}
    config = Gemma2Config(**size, initializer_range=0.4, final_logit_softcapping=2.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert_scores_match_the_loop(model, PROMPTS, COMPLETIONS, 5e-5)


class NamesNothing(LlamaForCausalLM):
    """A model whose forward takes whatever it is given and hands it on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_packed_rows_keep_their_positions_where_the_forward_names_no_arguments():
    model = tiny_model()
    other = NamesNothing(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert supports_packing(other, 20)[0]
    for each in (other, torch.compile(model, backend="eager")):
        assert_scores_match_the_loop(each, PROMPTS, COMPLETIONS, 2e-5)


def test_a_model_that_calls_its_head_decoder_is_scored_by_its_own_forward():
    # ModernBERT's causal models do.
    model = tiny_model()
    model.get_decoder = model.get_output_embeddings
    assert_scores_match_the_loop(model, PROMPTS, COMPLETIONS, 2e-5)


def test_adapters_are_part_of_the_model():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    before = score(model, PROMPTS, COMPLETIONS)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    assert (torch.cat(score(adapted, PROMPTS, COMPLETIONS)) - torch.cat(before)).abs().max() > 0.01
    assert_scores_match_the_loop(adapted, PROMPTS, COMPLETIONS, 5e-5)


def test_scoring_leaves_mode_gradients_and_random_state_alone():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    before = torch.get_rng_state()
    scores = score(model, PROMPTS, COMPLETIONS)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert not any(x.requires_grad for x in scores)
    assert_scores_match_the_loop(model.eval(), PROMPTS, COMPLETIONS, 5e-5)
    for a, b in zip(scores, score(model, PROMPTS, COMPLETIONS), strict=True):
        assert torch.equal(a, b)  # dropout was off


def test_progress_counts_completions():
    seen = []
    score(
        tiny_model(),
        PROMPTS,
        COMPLETIONS,
        batch_tokens=8,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == (len(PROMPTS), len(PROMPTS))


def test_nothing_and_empty_completions_are_scored():
    model = tiny_model()
    assert score(model, [], []) == []
    assert [x.tolist() for x in score(model, [[5], [5], [6]], [[], [], []])] == [[], [], []]
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        score(model, [[5], [6]], [[7]])
    with pytest.raises(ValueError, match="empty"):
        score(model, [[]], [[7]])


def test_low_precision_models_get_a_full_precision_softmax():
    model = tiny_model(dtype=torch.bfloat16)
    scores = score(model, PROMPTS, COMPLETIONS)
    assert all(x.dtype == torch.float32 for x in scores)
    logits = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.bfloat16)
    assert token_logprobs(logits, torch.tensor([0])).item() == pytest.approx(
        3 - math.log(math.exp(3) + math.exp(1) + 1), abs=1e-6
    )


def test_perplexity_and_bits_per_byte_by_hand():
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)  # uniform over 7 tokens
    assert perplexity(1e6, 1) == math.inf
    assert perplexity(math.inf, 3) == math.inf
    assert math.isnan(perplexity(math.nan, 3))
    assert bits_per_byte(24 * math.log(2), 8) == pytest.approx(3)
    with pytest.raises(ValueError):
        perplexity(1.0, 0)
    with pytest.raises(ValueError):
        bits_per_byte(1.0, 0)


def test_reference_probabilities_add_within_a_row():
    logprobs = torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64).log()
    p = reference_probability(logprobs, torch.tensor([2, 0, 2, 3]), 4)
    assert p.tolist() == pytest.approx([0.2, 0.0, 0.6, 1.0])
    impossible = reference_probability(torch.tensor([-math.inf]), torch.tensor([0]), 1)
    assert impossible.tolist() == [0.0]
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        reference_probability(torch.zeros(2), torch.zeros(3, dtype=torch.long), 3)


def test_exact_pass_at_k_by_hand():
    p = torch.tensor([0.5, 0.0, 1.0])
    assert exact_pass_at_k(p, 1).item() == pytest.approx(0.5)
    assert exact_pass_at_k(p, 2).item() == pytest.approx((0.75 + 0 + 1) / 3)
    tiny = torch.tensor([1e-12], dtype=torch.float64)
    assert exact_pass_at_k(tiny, 1000).item() == pytest.approx(1e-9, rel=1e-6)  # 1 - (1 - p)^k gives 1.00009e-9
    assert exact_pass_at_k(torch.tensor([1.0000001]), 3).item() == 1.0
    with pytest.raises(ValueError, match="distinct"):
        exact_pass_at_k(torch.tensor([1.2]), 1)
    with pytest.raises(ValueError, match="k = 0"):
        exact_pass_at_k(p, 0)
