"""A suite of rewards: series, weights, abstentions, corpus metrics, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError
from rlseq.scoring import CorpusMetric, Ratio, reward


def test_two_rewards_of_one_name_stay_two_series():
    def f(completion, bonus):
        return bonus

    specs = [{"func": f, "kwargs": {"bonus": b}} for b in (1, 2, 3)]
    suite = load_rewards(specs)
    assert suite.names == ["f", "f-2", "f-3"]
    assert suite.score([rollout("a")], {"prompt": ["q"]}).values == {"f": [1.0], "f-2": [2.0], "f-3": [3.0]}


def test_weights_come_from_the_specs_or_from_the_argument_but_not_from_both():
    assert load_rewards(["constant", {"func": "exact_match", "weight": 0.5}]).weights == [1.0, 0.5]
    assert load_rewards(["constant", "exact_match"], weights=[2, -1]).weights == [2.0, -1.0]
    with pytest.raises(RewardError, match="both in the reward specs and in reward_weights"):
        load_rewards([{"func": "constant", "weight": 0.5}], weights=[1])
    with pytest.raises(RewardError, match="2 numbers for 1 rewards"):
        load_rewards(["constant"], weights=[1, 2])


def test_an_abstention_changes_no_scale_by_hand():
    def a(completion):
        return None if "a" in completion else 1.0

    def b(completion):
        return None if "b" in completion else 0.5

    suite = load_rewards([a, b], weights=[1, -3])
    table = suite.score([rollout(t) for t in ("x", "a", "b", "a b")], {"prompt": ["q"] * 4})
    # x: 1·1 − 3·0.5 = −0.5;  a: −1.5 · 4/3 = −2;  b: 1 · 4/1 = 4;  both: none
    assert table.totals == [-0.5, -2.0, 4.0, None]
    assert table.values == {"a": [1.0, None, 1.0, None], "b": [0.5, 0.5, None, None]}
    assert table.status["a"] == ["ok", "abstained", "ok", "abstained"]
    assert [scored.total for scored in table.scored] == table.totals


def test_a_weight_of_zero_only_watches():
    def a(completion):
        return None

    suite = load_rewards([a, "constant"], weights=[1, 0])
    assert suite.score([rollout("x")], {"prompt": ["q"]}).totals == [None]


def test_details_and_corpus_metrics_belong_to_their_series():
    @reward(corpus={"rate": Ratio("errors", "words", description="errors a word")})
    def f(completion):
        return 0.0, {"errors": 1, "words": len(completion.split())}

    suite = load_rewards([f, f])
    table = suite.score([rollout("a b"), rollout("a")], {"prompt": ["q"] * 2})
    assert table.details["f-2"] == [{"errors": 1, "words": 2}, {"errors": 1, "words": 1}]
    assert table.scored[0].details["f"] == {"errors": 1, "words": 2}
    assert {name: metric.reward for name, metric in suite.corpus.items()} == {"rate": "f", "f-2.rate": "f-2"}
    assert suite.corpus["rate"].compute({"errors": 2, "words": 3}) == pytest.approx(2 / 3)


def test_a_ratio_over_nothing_is_nan_and_keeps_the_shape_of_resamples():
    ratio = Ratio("a", "b")
    result = ratio.compute({"a": np.array([1, 2]), "b": np.array([4, 0])})
    assert result[0] == 0.25
    assert np.isnan(result[1])
    assert not ratio.higher_is_better


def test_a_corpus_metric_may_be_any_function_of_the_sums():
    metric = CorpusMetric(("x", "n"), lambda sums: np.sqrt(sums["x"] / sums["n"]))
    np.testing.assert_allclose(metric.compute({"x": np.array([8.0, 18.0]), "n": 2}), [2.0, 3.0])


def test_the_signature_tells_code_and_arguments_apart():
    def f(completion, bonus=1):
        return bonus

    plain = load_rewards([f]).fingerprint()
    assert plain == load_rewards([f]).fingerprint()
    assert plain != load_rewards([{"func": f, "kwargs": {"bonus": 2}}]).fingerprint()
    assert plain != load_rewards([f], weights=[2]).fingerprint()
