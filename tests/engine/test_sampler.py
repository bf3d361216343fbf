"""The sampler against uncached token-by-token forwards, `generate`, and statistics of its noise."""

import bisect
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from test_decoding import warped
from tiny import EOS, PAD, VOCAB, tiny_model

from rlseq.engine import sampling
from rlseq.engine.noise import stream_keys, uniforms
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import Beam, Greedy, Sample
from rlseq.errors import ConfigError, ModelError
from rlseq.types import Prompt

STOPS = [EOS, 7, 11]
FAMILIES = ("llama", "gpt2", "qwen2")


def prompt(key, *ids):
    return Prompt(key=key, prompt=key, prompt_ids=ids)


PROMPTS = [
    prompt("short", 9),
    prompt("long", 3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9),
    prompt("twin", 4, 8, 15, 16),
    prompt("middle", 21, 1, 13, 20, 17, 5),
    prompt("other twin", 4, 8, 15, 16),
    prompt("reversed", 16, 15, 8, 4),
]


def sampled(model, prompts=PROMPTS, *, strategy=Sample(), **changes):  # noqa: B008
    settings = {"num_samples": 5, "max_new_tokens": 9, "seed": 3, "stop_ids": STOPS}
    if isinstance(strategy, Greedy):
        settings["num_samples"] = 1
    return sample(model, prompts, strategy=strategy, **(settings | changes))


def uncached_logits(model, ids):
    """Logits (V,) of the next token: one plain forward of one sequence, without cache, mask or positions."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()


def ids_of(rollouts):
    return [[rollout.completion_ids for rollout in group] for group in rollouts]


def assert_same(found, expected):
    """Equal completions, and log-probs equal up to the rounding of float32."""
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (a.prompt_key, a.sample, a.finish_reason) == (b.prompt_key, b.sample, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_tokens_and_log_probs_are_those_of_an_uncached_loop(family, settings):
    model = tiny_model(family)
    for p, group in zip(PROMPTS, sampled(model, strategy=Sample(**settings), num_samples=2), strict=True):
        for rollout in group:
            key = stream_keys(3, 0, [p.key], [rollout.sample])
            for t, (token, logprob) in enumerate(zip(rollout.completion_ids, rollout.logprobs, strict=True)):
                probs = warped(uncached_logits(model, [*p.prompt_ids, *rollout.completion_ids[:t]]), **settings)
                assert token == bisect.bisect_right(np.cumsum(probs).tolist(), uniforms(key, t)[0])
                assert logprob == pytest.approx(np.log(probs[token]), abs=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_rows", [1, 3, 17])
def test_completions_do_not_depend_on_how_many_rows_are_decoded_together(family, batch_rows):
    model = tiny_model(family)
    assert_same(sampled(model, batch_rows=batch_rows), sampled(model, batch_rows=1000))


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_do_not_depend_on_the_other_prompts_or_their_order(family):
    # Alone, a prompt is not padded: the order and company change its left padding and its shared prefill.
    model = tiny_model(family)
    together = sampled(model)
    assert_same([sampled(model, [p])[0] for p in PROMPTS], together)
    assert_same(sampled(model, PROMPTS[::-1]), together[::-1])


def test_completions_do_not_depend_on_which_samples_of_a_group_are_asked_for():
    model = tiny_model()
    everything = sampled(model)
    wanted = [[4, 0], [], [1, 2, 3], [0], [2], [3, 1]]
    some = sampled(model, samples=wanted)
    assert_same(some, [[group[s] for s in chosen] for group, chosen in zip(everything, wanted, strict=True)])
    assert sampled(model, samples=[[]] * len(PROMPTS)) == [[]] * len(PROMPTS)


def test_a_group_spread_over_calls_is_the_group_of_one_call():
    model = tiny_model()
    parts = [sampled(model, samples=[[s]] * len(PROMPTS)) for s in range(5)]
    assert_same([list(itertools.chain(*groups)) for groups in zip(*parts, strict=True)], sampled(model))


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["finished rows stay", "finished rows leave at once"])
def test_when_finished_rows_leave_the_batch_changes_nothing(monkeypatch, share):
    model = tiny_model()
    expected = sampled(model)
    monkeypatch.setattr(sampling, "COMPACT_BELOW", share)
    assert_same(sampled(model), expected)


def test_samples_are_decoded_together_as_long_as_they_are_equal():
    model = tiny_model().double()  # logits of this size round visibly in float32
    model.lm_head.weight.data *= 8  # surer of its tokens, so that samples share prefixes
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = sampled(model, num_samples=30)
    hook.remove()
    assert_same([list(group) for group in zip(*(sample_one(model, s) for s in range(30)), strict=True)], found)
    prompts = {prompt.prompt_ids for prompt in PROMPTS}
    for step, width in enumerate(widths):
        prefixes = {
            (prompt.prompt_ids, rollout.completion_ids[:step])
            for prompt, group in zip(PROMPTS, found, strict=True)
            for rollout in group
            if len(rollout.completion_ids) > step
        }
        assert len(prefixes) <= width <= max(len(prompts), len(prefixes) / sampling.COMPACT_BELOW)
    assert 3 * sum(widths[1:]) < sum(len(rollout.completion_ids) - 1 for group in found for rollout in group)


def sample_one(model, s):
    """Sample s of every prompt, each decoded alone."""
    return [sampled(model, [prompt], samples=[[s]])[0][0] for prompt in PROMPTS]


def test_slots_hold_what_rows_follow():
    # Against what it promises: each row's slot continues the slot the row was at, by the token it was given.
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_slots = int(generator.integers(1, 9))
        slot = generator.integers(0, num_slots, size=generator.integers(1, 20))
        chosen = generator.integers(0, 1 + generator.integers(4), size=len(slot))
        sources, tokens, found = sampling._branch(slot, chosen, num_slots)
        continued = np.arange(len(tokens)) if sources is None else sources
        assert len(continued) == len(tokens) and continued.max() < num_slots
        assert continued[found].tolist() == slot.tolist() and tokens[found].tolist() == chosen.tolist()
        pairs = set(zip(slot.tolist(), chosen.tolist(), strict=True))
        assert len(set(found.tolist())) == len(pairs)  # equal prefixes share, different ones do not
        assert len(tokens) <= max(num_slots, len(pairs))
        assert len(pairs) >= sampling.COMPACT_BELOW * len(tokens)


def test_equal_prompts_share_a_prefill_and_have_their_own_noise():
    model = tiny_model()
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    twins = [PROMPTS[2], PROMPTS[4]]
    found = sampled(model, twins)
    hook.remove()
    assert shapes[0] == (1, 4)  # one row for two prompts of five samples each
    assert shapes[1][1] == 1
    assert len(set(itertools.chain(*ids_of(found)))) > 5  # not the same five completions twice
    assert_same(found, [sampled(model, [twin])[0] for twin in twins])


def test_a_completion_ends_with_the_first_stop_id_met_or_at_the_limit():
    rollouts = list(itertools.chain(*sampled(tiny_model(), num_samples=40)))
    ends = set()
    for rollout in rollouts:
        *before, last = rollout.completion_ids
        assert not set(before) & set(STOPS)
        assert rollout.finish_reason == ("stop" if last in STOPS else "length")
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 9
        assert rollout.loss_mask == (True,) * len(rollout.completion_ids)
        assert len(rollout.logprobs) == len(rollout.completion_ids)
        ends.add(last if last in STOPS else None)
    assert ends == {*STOPS, None}  # every declared stop was met, and the limit too


def test_more_room_only_prolongs_what_was_cut():
    model = tiny_model()
    for short, long in zip(
        itertools.chain(*sampled(model)), itertools.chain(*sampled(model, max_new_tokens=14)), strict=True
    ):
        assert long.completion_ids[: len(short.completion_ids)] == short.completion_ids
        if short.finish_reason == "stop":
            assert long.completion_ids == short.completion_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_generate_gives_without_sampling(family):
    model = tiny_model(family)
    for p, (rollout,) in zip(PROMPTS, sampled(model, strategy=Greedy()), strict=True):
        output = model.generate(
            input_ids=torch.tensor([p.prompt_ids]),
            attention_mask=torch.ones(1, len(p.prompt_ids), dtype=torch.long),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=STOPS,
            pad_token_id=PAD,
        )
        assert list(rollout.completion_ids) == output[0, len(p.prompt_ids) :].tolist()
        for t, token in enumerate(rollout.completion_ids):
            probs = warped(uncached_logits(model, [*p.prompt_ids, *rollout.completion_ids[:t]]))
            assert rollout.logprobs[t] == pytest.approx(np.log(probs[token]), abs=5e-5)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_p": 0.7}], ids=str)
def test_first_tokens_are_distributed_as_the_softmax_says(settings):
    model = tiny_model()
    (group,) = sampled(model, [PROMPTS[3]], strategy=Sample(**settings), num_samples=4000, max_new_tokens=1)
    counts = np.bincount([rollout.completion_ids[0] for rollout in group], minlength=VOCAB)
    expected = 4000 * warped(uncached_logits(model, list(PROMPTS[3].prompt_ids)), **settings)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # pooled, as the test's approximation asks
    pool = [(counts[~rare], expected[~rare]), ([counts[rare].sum()], [expected[rare].sum()])]
    found, wanted = (np.concatenate(x) for x in zip(*pool, strict=True))
    assert scipy.stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue > 0.001


def test_another_seed_or_stream_gives_other_completions_and_the_same_gives_the_same():
    model = tiny_model()
    first = ids_of(sampled(model))
    assert ids_of(sampled(model)) == first
    assert ids_of(sampled(model, seed=4)) != first
    assert ids_of(sampled(model, stream=1)) != first


def test_the_global_random_state_is_neither_read_nor_moved():
    model = tiny_model()
    torch.manual_seed(0)
    first = sampled(model)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_same(sampled(model), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_generation_config_changes_nothing():
    model = tiny_model()
    expected, greedy = sampled(model), sampled(model, strategy=Greedy())
    likeliest = max(range(VOCAB), key=lambda token: sum(token in ids for g in ids_of(expected) for ids in g))
    for name, value in {
        "min_new_tokens": 8,
        "max_new_tokens": 2,
        "suppress_tokens": [likeliest, *STOPS],
        "begin_suppress_tokens": [greedy[0][0].completion_ids[0]],
        "temperature": 0.1,
        "top_k": 1,
        "do_sample": False,
        "repetition_penalty": 5.0,
        "eos_token_id": [likeliest],
        "use_cache": False,
    }.items():
        setattr(model.generation_config, name, value)
    assert_same(sampled(model), expected)
    assert_same(sampled(model, strategy=Greedy()), greedy)


def test_dropout_does_not_act_and_every_modules_mode_is_restored():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = sampled(model)
    model.train()
    model.lm_head.eval()  # a frozen part of a model in training
    modes = [module.training for module in model.modules()]
    assert_same(sampled(model), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        sampled(model, progress=lambda rows: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    model = tiny_model(family)
    expected = sampled(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(sampled(model), expected)
    assert model.is_gradient_checkpointing


def test_completions_are_decoded_with_and_without_special_tokens():
    class Words:
        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(f"w{i}" for i in row if not (skip_special_tokens and i in STOPS)) for row in ids]

    chat = Prompt(key="chat", prompt=[{"role": "user", "content": "hi"}], prompt_ids=(4, 5))
    for group in sampled(tiny_model(), [PROMPTS[0], chat], tokenizer=Words()):
        for rollout in group:
            assert rollout.text_with_special_tokens == " ".join(f"w{i}" for i in rollout.completion_ids)
            assert rollout.text == " ".join(f"w{i}" for i in rollout.completion_ids if i not in STOPS)
            answer = ({"role": "assistant", "content": rollout.text},) if rollout.prompt_key == "chat" else None
            assert rollout.messages == answer


def test_progress_counts_every_prompt_once():
    counts = []
    sampled(tiny_model(), batch_rows=11, progress=counts.append)
    assert counts == [2, 2, 2]  # five samples each: two prompts fit 11 rows


def test_stop_ids_are_the_tokenizers_first_then_those_the_checkpoint_declares():
    class Tokenizer:
        eos_token_id = 5

    model = tiny_model()
    model.generation_config.eos_token_id = [2, 5, 9]
    assert stop_ids_of(model, Tokenizer) == [5, 2, 9]
    model.generation_config.eos_token_id = 2
    assert stop_ids_of(model, Tokenizer) == [5, 2]
    Tokenizer.eos_token_id = None
    assert stop_ids_of(model, Tokenizer) == [2]
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="neither tokenizer nor model declares"):
        stop_ids_of(model, Tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": Beam()}, "'beam' is a search, not a sampler"),
        ({"strategy": Greedy(), "num_samples": 2}, "num_samples must be 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"prompts": [Prompt("0", "", (3,)), Prompt("1", "", ())]}, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_sampled_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        sampled(tiny_model(), **changes)


# prefixes


def test_a_few_slots_at_a_time_pick_the_tokens_and_log_probs_of_all_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator)
    slot = np.array([3, 0, 6, 3, 5, 0, 0, 2])  # slots 1 and 4 have no row
    uniform = np.linspace(0.05, 0.95, len(slot))
    for strategy in (Sample(), Sample(temperature=0.7, top_k=4), Greedy()):
        whole = sampling._next_tokens(logits, slot, strategy, uniform)
        monkeypatch.setattr(sampling, "TILE_NUMBERS", 22)  # two slots
        tiles = sampling._next_tokens(logits, slot, strategy, uniform)
        monkeypatch.undo()
        assert torch.equal(tiles[0], whole[0]) and torch.equal(tiles[1], whole[1])
        of_row = strategy.warp(logits[slot]) if isinstance(strategy, Sample) else logits[slot].log_softmax(-1)
        torch.testing.assert_close(whole[1], of_row[range(len(slot)), whole[0]])
        cdf = of_row.double().exp().cumsum(-1).numpy()
        expected = [int(np.searchsorted(row, u)) for row, u in zip(cdf, uniform, strict=True)]
        assert whole[0].tolist() == (logits[slot].argmax(-1).tolist() if isinstance(strategy, Greedy) else expected)
