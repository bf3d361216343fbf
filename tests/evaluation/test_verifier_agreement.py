"""Agreement of two rewards on the same rollouts: by hand, by scipy, and by resampling prompts one at a time."""

import math

import numpy as np
import pytest
from scipy import stats

from rlseq.evaluation.stats.agreement import agreement, is_binary

NAN = math.nan


def compared(a, b, prompts=None, signs_a=None, signs_b=None, **options):
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    signs = [np.full(len(a), NAN) if s is None else np.array(s, dtype=float) for s in (signs_a, signs_b)]
    return agreement(a, b, *signs, np.arange(len(a)) if prompts is None else np.array(prompts), **options)


def values(found):
    return {name: statistic.value for name, statistic in found.statistics.items() if not math.isnan(statistic.value)}


def test_two_binary_rewards_by_hand():
    # both pass 3, a alone 2, b alone 1, neither 4: equal 7 of 10. By chance 0.5·0.4 + 0.5·0.6 = 0.5, so that
    # kappa = (0.7 − 0.5) / (1 − 0.5) = 0.4. a passes 5, b passes 4: −0.1.
    a = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = compared(a, b)
    assert found.table == (3, 2, 1, 4)
    assert (found.rollouts, found.prompts) == (10, 10)
    assert values(found) == pytest.approx({"equal": 0.7, "kappa": 0.4, "pass_rate_difference": -0.1})


def test_a_reward_of_minus_1_and_1_gives_verdicts_too():
    assert compared([1, -1, 1], [1, 0, 0]).table == (1, 1, 0, 1)
    assert not is_binary(np.array([-1.0, 0.0, 1.0])) and not is_binary(np.array([0.0, 0.5]))


def test_kappa_is_undefined_where_both_give_one_verdict_to_everything():
    assert values(compared([1, 1, 1], [1, 1, 1])) == {"equal": 1.0, "pass_rate_difference": 0.0}


def test_other_rewards_are_correlated_as_by_scipy_whatever_their_scale():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    for b in (a + rng.normal(size=40), 1e9 + 3 * a + rng.normal(size=40), 1e-9 * rng.normal(size=40)):
        found = values(compared(a, b))
        assert found["correlation"] == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-6)
        assert found["mean_difference"] == pytest.approx(b.mean() - a.mean(), rel=1e-9)
    assert "correlation" not in values(compared(a, np.full(40, 0.3)))  # constant: undefined, not 0


def test_a_rollout_without_a_value_is_in_no_statistic():
    # the third and fourth are left out; counted as 0 they would be an agreement and a disagreement
    found = compared(
        [1, 0, NAN, NAN], [1, 1, 0, 1], signs_a=[1, -1, 0, 0], signs_b=[-1, -1, 1, 1], prompts=[0, 0, 0, 1]
    )
    assert (found.rollouts, found.prompts, found.table) == (2, 1, (1, 0, 1, 0))
    assert values(found) == {"equal": 0.5, "kappa": 0.0, "pass_rate_difference": 0.5,
                             "reversed": 0.5, "gained": 0.0, "lost": 0.0}  # fmt: skip


def test_shares_of_advantages_are_of_rollouts_in_groups_of_two_or_more():
    # of five in groups one changes its sign, two were 0, one becomes 0; the last is alone in its group
    signs_a, signs_b = [1, 0, 0, -1, 1, NAN], [-1, 1, -1, 0, 1, NAN]
    found = values(compared([0.5] * 6, [0.2] * 6, signs_a=signs_a, signs_b=signs_b))
    assert found["reversed"] == pytest.approx(1 / 5)
    assert found["gained"] == pytest.approx(2 / 5)
    assert found["lost"] == pytest.approx(1 / 5)


def test_intervals_resample_prompts_not_rollouts():
    # 4 prompts of 50 rollouts, the verdicts equal on all of a prompt or on none: the share takes 0, 1/4, ..., 1 in
    # a resample, by Binomial(4, 1/2), whose 2.5% and 97.5% quantiles are 0 and 1. Rollouts would give 0.43 to 0.57.
    prompts = np.repeat(np.arange(4), 50)
    a = np.tile([0, 1], 100)
    b = np.where(prompts < 2, a, 1 - a)
    equal = compared(a, b, prompts).statistics["equal"]
    assert equal.value == 0.5
    assert equal.ci95 == (0.0, 1.0)


def test_the_interval_of_a_correlation_is_that_of_prompts_resampled_one_at_a_time():
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(30), 4)
    a = rng.normal(size=120) + rng.normal(size=30)[prompts]
    b = a + rng.normal(size=120)
    resampled = []
    for _ in range(4000):
        rows = (4 * rng.integers(30, size=30)[:, None] + np.arange(4)).ravel()
        resampled.append(np.corrcoef(a[rows], b[rows])[0, 1])
    ci95 = compared(a, b, prompts).statistics["correlation"].ci95
    assert ci95 == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.01)  # 4,000 resamples: ± 0.003


def test_a_single_prompt_has_no_interval():
    found = compared([1, 0], [1, 1], prompts=[0, 0])
    assert all(math.isnan(bound) for statistic in found.statistics.values() for bound in statistic.ci95)
