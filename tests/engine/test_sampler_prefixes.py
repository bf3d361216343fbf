"""Sampling from forced prefixes."""

import itertools

import numpy as np
import pytest
from test_sampler import FAMILIES, PROMPTS, STOPS, prompt, sampled, uncached_logits
from tiny import tiny_model

from rlseq.engine.strategies import Greedy, Sample
from rlseq.errors import ConfigError

PREFIXES = [(5, 6), (), (17,), (8, 9, 10, 12), (5, 6), ()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", [Sample(temperature=0.7), Greedy()], ids=["sample", "greedy"])
def test_forced_tokens_begin_the_completion_and_the_rest_follows_them(family, strategy):
    model = tiny_model(family)
    for p, prefix, group in zip(PROMPTS, PREFIXES, sampled(model, strategy=strategy, prefixes=PREFIXES), strict=True):
        k = len(prefix)
        for rollout in group:
            ids = rollout.completion_ids
            assert ids[:k] == prefix
            assert rollout.logprobs[:k] == (0.0,) * k
            assert rollout.loss_mask == (False,) * k + (True,) * (len(ids) - k)
            assert 1 <= len(ids) - k <= 9  # max_new_tokens is of the sampled
            for t in range(k, len(ids)):
                logits = uncached_logits(model, [*p.prompt_ids, *ids[:t]]) / getattr(strategy, "temperature", 1.0)
                logprobs = logits - np.logaddexp.reduce(logits)
                assert rollout.logprobs[t] == pytest.approx(logprobs[ids[t]], abs=5e-5)
                if isinstance(strategy, Greedy):
                    assert ids[t] == logprobs.argmax()


def test_sampling_from_a_prefix_is_sampling_from_a_prompt_that_holds_it():
    model = tiny_model()
    longer = [prompt(p.key, *p.prompt_ids, *prefix) for p, prefix in zip(PROMPTS, PREFIXES, strict=True)]
    for found, expected, prefix in zip(
        itertools.chain(*sampled(model, prefixes=PREFIXES)),
        itertools.chain(*sampled(model, longer)),
        itertools.chain(*([prefix] * 5 for prefix in PREFIXES)),
        strict=True,
    ):
        assert found.completion_ids == (*prefix, *expected.completion_ids)
        assert found.finish_reason == expected.finish_reason
        np.testing.assert_allclose(found.logprobs[len(prefix) :], expected.logprobs, atol=5e-5)


def test_empty_prefixes_change_nothing():
    model = tiny_model()
    assert sampled(model, prefixes=[()] * len(PROMPTS)) == sampled(model)


def test_a_stop_id_within_the_prefix_does_not_end_the_completion():
    (group,) = sampled(tiny_model(), PROMPTS[:1], prefixes=[(7, 3)], max_new_tokens=1, num_samples=20)
    assert {len(rollout.completion_ids) for rollout in group} == {3}
    assert {rollout.finish_reason for rollout in group} >= {"length"}
    for rollout in group:
        assert (rollout.finish_reason == "stop") == (rollout.completion_ids[-1] in STOPS)


def test_a_wrong_number_of_prefixes_is_refused():
    with pytest.raises(ConfigError, match=r"2 prefixes .* 6 prompts"):
        sampled(tiny_model(), prefixes=[(), (3,)])
