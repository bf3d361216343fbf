"""Beam search against the enumeration of every completion."""

import itertools

import pytest
import torch
from tiny import EOS, tiny_model

from rlseq.engine.beam import beam, only_generation_config
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Beam, Greedy
from rlseq.errors import ConfigError
from rlseq.types import Prompt

VOCABULARY = 6
STOPS = (EOS, 5)
PROMPTS = [
    Prompt(key=str(ids), prompt=str(ids), prompt_ids=ids) for ids in ((1, 4, 3), (4,), (3, 3, 4, 1, 3, 0, 4), (0, 1))
]


def small(family="llama", seed=0):
    return tiny_model(family, seed=seed, vocab_size=VOCABULARY)


def teacher_forced(model, prompt, completion):
    """Log-prob of each token, by one plain forward of one sequence."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def every_completion(longest, stops=STOPS):
    """All that end with a stop id within the limit, and all that reach the limit without one."""
    others = [token for token in range(VOCABULARY) if token not in stops]
    for length in range(longest):
        for start in itertools.product(others, repeat=length):
            yield from ((*start, stop) for stop in stops)
    yield from itertools.product(others, repeat=longest)


def best(model, prompt, longest, length_penalty=0.0, stops=STOPS):
    """The likeliest completion by enumeration, and by how much it beats the next."""
    scored = sorted(
        (
            (sum(teacher_forced(model, prompt, ids)) / len(ids) ** length_penalty, ids)
            for ids in every_completion(longest, stops)
        ),
        reverse=True,
    )
    assert scored[0][0] - scored[1][0] > 1e-4  # else rounding decides
    return scored[0][1]


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 5), ("gpt2", 1), ("qwen2", 2)])
def test_a_beam_wide_enough_finds_the_likeliest_completion(family, seed):
    # 4 tokens do not stop, so 4² = 16 prefixes are alive before the last of 3 tokens: none is dropped.
    model = small(family, seed)
    found = beam(model, PROMPTS, max_new_tokens=3, strategy=Beam(width=16), stop_ids=STOPS)
    for prompt, (rollout,) in zip(PROMPTS, found, strict=True):
        assert rollout.completion_ids == best(model, prompt.prompt_ids, 3)
        assert rollout.finish_reason == ("stop" if rollout.completion_ids[-1] in STOPS else "length")


@pytest.mark.parametrize("length_penalty", [1.0, 0.5, -1.0])
def test_hypotheses_compete_by_log_prob_over_a_power_of_their_length(length_penalty):
    model = small(seed=3)
    strategy = Beam(width=16, length_penalty=length_penalty)
    found = beam(model, PROMPTS, max_new_tokens=3, strategy=strategy, stop_ids=STOPS)
    for prompt, (rollout,) in zip(PROMPTS, found, strict=True):
        assert rollout.completion_ids == best(model, prompt.prompt_ids, 3, length_penalty)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_the_search_goes_on_while_a_better_hypothesis_is_possible(length_penalty):
    # Only 2 tokens do not stop: as many hypotheses as the beam is wide end with the first token.
    stops, strategy = (0, 1, EOS, 5), Beam(width=4, length_penalty=length_penalty)
    longest = 0
    for seed in range(4):
        model = small(seed=seed)
        for prompt, (rollout,) in zip(
            PROMPTS, beam(model, PROMPTS, max_new_tokens=3, strategy=strategy, stop_ids=stops), strict=True
        ):
            assert rollout.completion_ids == best(model, prompt.prompt_ids, 3, length_penalty, stops)
            longest = max(longest, len(rollout.completion_ids))
    assert longest > 1  # somewhere it paid to go on


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probs_are_the_models_own_by_teacher_forcing(family):
    model = small(family)
    for prompt, (rollout,) in zip(
        PROMPTS, beam(model, PROMPTS, max_new_tokens=8, strategy=Beam(width=3), stop_ids=STOPS), strict=True
    ):
        expected = teacher_forced(model, prompt.prompt_ids, rollout.completion_ids)
        assert rollout.logprobs == pytest.approx(expected, abs=5e-5)
        assert rollout.prompt_key == prompt.key
        assert rollout.strategy == "beam:width=3"


def test_a_beam_of_one_is_greedy():
    model = small(seed=4)
    settings = {"max_new_tokens": 8, "stop_ids": STOPS}
    greedy = sample(model, PROMPTS, num_samples=1, strategy=Greedy(), seed=0, **settings)
    found = beam(model, PROMPTS, strategy=Beam(width=1), **settings)
    assert [g[0].completion_ids for g in found] == [g[0].completion_ids for g in greedy]


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_hypotheses_do_not_depend_on_the_batch(batch_rows):
    model = small("gpt2")
    settings = {"max_new_tokens": 6, "strategy": Beam(width=4), "stop_ids": STOPS}
    counts = []
    together = beam(model, PROMPTS, **settings)
    found = beam(model, PROMPTS, **settings, batch_rows=batch_rows, progress=counts.append)
    assert [g[0].completion_ids for g in found] == [g[0].completion_ids for g in together]
    assert sum(counts) == len(PROMPTS) and max(counts) == batch_rows


def test_the_models_generation_config_is_not_read_and_is_restored():
    model = small(seed=5)
    settings = {"max_new_tokens": 4, "strategy": Beam(width=16), "stop_ids": STOPS}
    expected = beam(model, PROMPTS, **settings)
    used = {token for (rollout,) in expected for token in rollout.completion_ids}
    own = model.generation_config
    for name, value in {
        "min_new_tokens": 4,
        "suppress_tokens": sorted(used),
        "repetition_penalty": 4.0,
        "no_repeat_ngram_size": 1,
        "length_penalty": 3.0,
        "num_return_sequences": 2,
        "eos_token_id": [3],
    }.items():
        setattr(own, name, value)
    before = own.to_dict()
    found = beam(model, PROMPTS, **settings)
    assert [g[0].completion_ids for g in found] == [g[0].completion_ids for g in expected]
    assert model.generation_config is own
    assert own.to_dict() == before


def test_config_and_mode_are_restored_after_an_error():
    model = small().train()
    own = model.generation_config
    with pytest.raises(ZeroDivisionError):
        beam(
            model,
            PROMPTS,
            max_new_tokens=2,
            strategy=Beam(width=2),
            stop_ids=STOPS,
            progress=lambda rows: 1 / 0,
        )
    assert model.generation_config is own
    assert all(module.training for module in model.modules())
    with pytest.raises(KeyError), only_generation_config(model, None):
        raise KeyError
    assert model.generation_config is own


def test_dropout_and_gradient_checkpointing_do_not_act():
    model = tiny_model("gpt2", vocab_size=VOCABULARY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    settings = {"max_new_tokens": 6, "strategy": Beam(width=4), "stop_ids": STOPS}
    expected = beam(model, PROMPTS, **settings)
    model.gradient_checkpointing_enable()
    model.train()
    found = beam(model, PROMPTS, **settings)
    assert [g[0].completion_ids for g in found] == [g[0].completion_ids for g in expected]
    for (a,), (b,) in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=5e-5)


@pytest.mark.parametrize(("prompt", "stop_ids", "message"), [((), STOPS, "a prompt is"), ((3,), [], "stop_ids is")])
def test_what_cannot_be_searched_is_refused(prompt, stop_ids, message):
    prompts = [Prompt("0", "", (3,)), Prompt("1", "", prompt)]
    with pytest.raises(ConfigError, match=f"{message} empty"):
        beam(small(), prompts, max_new_tokens=3, strategy=Beam(), stop_ids=stop_ids)
