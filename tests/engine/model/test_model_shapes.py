"""Models that are not plain attention: each is loaded, decoded, scored and trained as forwards of one sequence say."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from tiny import EOS, VOCAB, tiny_model
from tiny_shapes import SHAPES, tiny_shape
from tiny_task import tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma4TextConfig, LlamaForCausalLM

from rlseq.config.training import ModelArguments
from rlseq.engine.beam import beam
from rlseq.engine.decoding import backends, decoders
from rlseq.engine.decoding.kv_budget import cached_numbers, rows_within
from rlseq.engine.likelihood import score
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Beam, Greedy, Sample
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.training.models import load_model
from rlseq.training.plan.memory import size_of, weightless_model
from rlseq.types import Prompt

PACKED = ("qwen2_moe", "qwen3_moe", "mixtral", "qwen3_vl")
UNCACHED = ("recurrent_gemma", "rwkv", "xlstm")
OFTEN = ("qwen2_moe", "gemma3", "qwen3_vl", "qwen3_5", "falcon_h1", "mamba2", "recurrent_gemma")  # the others: soak
PROMPTS = [Prompt(f"p{i}", "", tuple(3 + (i * 5 + j * 7) % 18 for j in range(n))) for i, n in enumerate((5, 2, 7, 1))]
STOPS = [EOS]


def marked(name, often):
    return name if name in often else pytest.param(name, marks=pytest.mark.soak)


def sampled(model, prompts=PROMPTS, strategy=None, num_samples=3):
    settings = {"num_samples": num_samples, "max_new_tokens": 8, "seed": 0, "stop_ids": STOPS}
    return sample(model, prompts, strategy=strategy or Sample(), **settings)


def alone(model, ids):
    """Log-probs (S, V) behind each token: one plain forward of one sequence, without cache, mask or positions."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().log_softmax(-1)


def logprobs_alone(model, prompt_ids, completion_ids):
    """Of each token of the completion."""
    rows = alone(model, (*prompt_ids, *completion_ids))[len(prompt_ids) - 1 : -1]
    return rows.gather(-1, torch.tensor([completion_ids]).T)[:, 0]


def greedy_alone(model, ids):
    """The greedy completion, token by token, each from the whole sequence."""
    found = []
    while len(found) < 8 and EOS not in found:
        found.append(int(alone(model, (*ids, *found))[-1].argmax()))
    return tuple(found)


@pytest.mark.parametrize("name", [marked(name, OFTEN) for name in SHAPES])
def test_what_is_sampled_and_scored_is_what_forwards_of_one_sequence_say(name, capsys):
    model = tiny_shape(name)
    found = sampled(model)
    assert len({rollout.completion_ids for group in found for rollout in group}) > 6
    for prompt, group in zip(PROMPTS, found, strict=True):
        for rollout in group:
            expected = logprobs_alone(model, prompt.prompt_ids, rollout.completion_ids)
            assert torch.allclose(torch.tensor(rollout.logprobs), expected, atol=1e-4)
    greedy = sampled(model, strategy=Greedy(), num_samples=1)
    assert [one.completion_ids for (one,) in greedy] == [greedy_alone(model, p.prompt_ids) for p in PROMPTS]
    sampled(model)  # the note is printed once
    said = capsys.readouterr().out.count("is decoded without a cache")
    assert said == (name in UNCACHED) and backends.select_backend(model) == ("uncached" if said else "padded")
    packs, _ = supports_packing(model, 20)
    assert packs == (name in PACKED)
    pairs = [(p.prompt_ids, r.completion_ids) for p, group in zip(PROMPTS, found, strict=True) for r in group]
    for scored, pair in zip(score(model, *zip(*pairs, strict=True)), pairs, strict=True):
        assert torch.allclose(scored, logprobs_alone(model, *pair), atol=1e-4)


@pytest.mark.parametrize("name", [marked(name, ("qwen3_5",)) for name in ("qwen3_5", "mamba2", "recurrent_gemma")])
def test_a_completion_does_not_depend_on_the_batch(name):
    model = tiny_shape(name)
    together = sampled(model)
    assert [[r.completion_ids for r in group] for group in together] == [
        [r.completion_ids for r in sampled(model, [prompt])[0]] for prompt in PROMPTS
    ]
    strategy = {"max_new_tokens": 6, "strategy": Beam(width=3), "stop_ids": STOPS}
    both = beam(model, PROMPTS, **strategy)
    assert [one.completion_ids for (one,) in both] == [
        beam(model, [p], **strategy)[0][0].completion_ids for p in PROMPTS
    ]


class TakesPaddingForText(LlamaForCausalLM):
    """A model that attends to padding, as one with states does that no mask reaches."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0, **masks_and_positions):
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
        )


def test_a_model_that_takes_padding_for_text_is_decoded_one_length_at_a_time(capsys):
    assert backends.is_plain(tiny_model()) and backends.is_plain(tiny_shape("mixtral"))
    model = TakesPaddingForText(tiny_model().config).eval()
    assert not backends.is_plain(model)  # it names no mask
    found = sampled(model, num_samples=6)
    assert backends.select_backend(model) == "by_length"
    assert "one prompt length at a time: logits from the cache differ" in capsys.readouterr().out
    for prompt, group in zip(PROMPTS, found, strict=True):
        for rollout in group:
            expected = logprobs_alone(model, prompt.prompt_ids, rollout.completion_ids)
            assert torch.allclose(torch.tensor(rollout.logprobs), expected, atol=1e-4)


def likeliest_pair(model, ids):
    """The likeliest completion of two tokens at most, by enumeration: one that ends with a stop id, or is cut."""
    first = alone(model, ids)[-1]
    chances = {(EOS,): first[EOS].item()}
    for token in set(range(len(first))) - {EOS}:
        second = alone(model, (*ids, token))[-1]
        chances |= {(token, other): (first[token] + second[other]).item() for other in range(len(second))}
    return max(chances, key=chances.get)


@pytest.mark.parametrize("name", ["rwkv", "xlstm", "recurrent_gemma", "takes padding for text"])
def test_beam_search_pads_and_caches_only_where_that_is_right(name):
    model = TakesPaddingForText(tiny_model().config).eval() if name not in SHAPES else tiny_shape(name)
    found = beam(model, PROMPTS, max_new_tokens=2, strategy=Beam(width=23), stop_ids=STOPS)
    assert [one.completion_ids for (one,) in found] == [likeliest_pair(model, p.prompt_ids) for p in PROMPTS]


def test_a_compiled_model_is_decoded_as_what_was_compiled(capsys):
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    assert sampled(compiled) == sampled(model) and backends.select_backend(compiled) == "padded"
    assert capsys.readouterr().out == ""


def test_slots_may_go_on_from_another_length():
    # By brute force: every slot's logits are those of its own sequence, wherever it came from.
    model = tiny_model()
    for kind in (decoders.CachedDecoder, decoders.UncachedDecoder):
        held = [[3, 4, 5], [6], [7, 8, 9], [10, 11]]
        state = decoders.ByLengthDecoder(kind, model, held)
        for sources in (None, [1, 1, 3, 0, 2, 3], [5, 4, 1], [0, 0, 0, 1], None):
            index = list(range(len(held))) if sources is None else sources
            tokens = [5 + i for i in range(len(index))]
            held = [[*held[s], token] for s, token in zip(index, tokens, strict=True)]
            with torch.no_grad():
                state.advance(None if sources is None else torch.tensor(sources).numpy(), torch.tensor(tokens).numpy())
            expected = torch.stack([alone(model, ids)[-1] for ids in held])
            assert torch.allclose(state.logits.log_softmax(-1), expected, atol=1e-4)


def test_a_model_without_numbers_is_not_judged(capsys):
    model = tiny_shape("lfm2")
    model.lm_head.weight.data.fill_(torch.nan)
    sampled(model, PROMPTS[:1])
    assert backends.select_backend(model) == "padded" and capsys.readouterr().out == ""


def test_layers_of_unlike_heads_are_counted_one_by_one():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    inputs = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 16}
    config = Gemma4TextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, **layers, **inputs, **heads)
    cache = AutoModelForCausalLM.from_config(config)(input_ids=torch.tensor([[3]])).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_numbers(config) == held


def test_states_need_no_budget_that_grows_with_the_text():
    model = tiny_shape("mamba2")
    assert cached_numbers(model.config) == 0
    assert rows_within(model, 1e-6, 10**6) > 100


def saved(name, folder):
    """A checkpoint that reads images too, as it is published: the whole model and a tokenizer; text logits of it."""
    config = tiny_shape(name).config
    if name == "qwen3_5":  # `tiny_shape` made the half for text
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind, values = SHAPES[name]
        config = CONFIG_MAPPING[kind](**values)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return alone(whole, PROMPTS[0].prompt_ids)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "qwen3_5"])
def test_a_multimodal_checkpoint_is_loaded_for_its_text(name, tmp_path):
    expected = saved(name, tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    model = load_model(args)
    assert torch.equal(alone(model.eval(), PROMPTS[0].prompt_ids), expected)
    # Only what text passes is trained, and a dry run counts so.
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    size = size_of(weightless_model(args))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "again")
    again = load_model(ModelArguments(model_name_or_path=str(tmp_path / "again"))).eval()
    assert torch.equal(alone(again, PROMPTS[0].prompt_ids), expected)
    assert torch.equal(alone(load_checkpoint("it", str(tmp_path)), PROMPTS[0].prompt_ids), expected)


@pytest.mark.parametrize("name", [marked(name, ("gemma3", "qwen3_5")) for name in (*OFTEN, "rwkv")])
def test_a_step_of_grpo_trains_on_the_log_probs_of_one_sequence(name, tmp_path, capsys):
    model = tiny_shape(name)
    start = copy.deepcopy(model)
    trainer = tiny_trainer(tmp_path, model=model, max_steps=1, max_completion_length=4, beta=0.0, num_iterations=1)
    trained, compute = [], trainer.micro_batch_loss

    def remember(model, batch):
        found = trainer.forward.scores(model, batch).logprobs.detach()
        trained.extend(
            (ids, logps[: len(ids)].tolist(), prompt)
            for ids, logps, prompt in zip(batch.completion_ids, found, batch.prompt_ids, strict=True)
        )
        return compute(model, batch)

    trainer.micro_batch_loss = remember
    trainer.train()
    assert ("updates are not packed" in capsys.readouterr().out) == (name not in PACKED)
    assert len(trained) == 16
    for ids, logps, prompt in trained:
        assert torch.allclose(torch.tensor(logps), logprobs_alone(start, prompt, ids), atol=1e-4)
    lines = itertools.chain(*(file.read_text().splitlines() for file in (tmp_path / "rollouts").glob("*.jsonl")))
    logged = sorted(round(json.loads(line)["logprob"], 3) for line in lines)
    assert logged == pytest.approx(sorted(round(sum(logps), 3) for _, logps, _ in trained), abs=2e-3)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(moved) and all(torch.isfinite(p).all() for p in model.parameters())
