"""What a comparison could have seen, against hand arithmetic, scipy and simulated experiments."""

import math

import numpy as np
import pytest
import scipy.stats

from rlseq.evaluation.stats.bootstrap import paired_bootstrap
from rlseq.evaluation.stats.estimators import MeanOf, RatioOfSums
from rlseq.evaluation.stats.power import Power, describe_power, detectable_difference, power_of, row_deviation

Z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)


def test_detectable_difference_and_rows_follow_by_hand():
    # Differences 1, −1, 1, 0 have mean ¼ and Σ (d − ¼)² = (9 + 25 + 9 + 1) / 16 = 11/4, so that σ² = 11/12.
    a, b = np.array([0.0, 1, 0, 1]), np.array([1.0, 0, 1, 1])
    result = paired_bootstrap(a, b, np.mean, seed=0, resamples=10)
    assert (result.deviation, result.rows) == (pytest.approx(math.sqrt(11 / 12)), 4)
    found = power_of(result.deviation, result.rows, 0.01)
    assert found.detectable_difference == pytest.approx(Z * math.sqrt(11 / 12) / 2)
    assert found.rows_for_unit == math.ceil(Z**2 * 11 / 12 / 0.01**2) == 71_949
    assert power_of(result.deviation, result.rows, 1.0).rows_for_unit == 8
    assert power_of(result.deviation, 4 * result.rows, 1.0).detectable_difference == found.detectable_difference / 2


def test_the_rows_for_a_point_detect_a_point():
    found = power_of(0.5, 200, 0.01)
    assert detectable_difference(0.5, found.rows_for_unit) <= 0.01 < detectable_difference(0.5, found.rows_for_unit - 1)


def test_deviation_of_a_corpus_rate_is_that_of_its_linearisation():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=2000)
    a, b = (np.stack([rng.binomial(lengths, rate), lengths], axis=1).astype(float) for rate in (0.3, 0.2))
    # e/ℓ of sums moves by (e_i − r ℓ_i) / (R · mean ℓ) with row i: the delta method.
    moves = [(x[:, 0] - x[:, 0].sum() / x[:, 1].sum() * x[:, 1]) / x[:, 1].mean() for x in (a, b)]
    expected = np.std(moves[1] - moves[0], ddof=1)
    assert row_deviation(a, b, RatioOfSums()) == pytest.approx(expected, rel=0.01)
    assert row_deviation(a, b, lambda x: x[:, 0].sum() / x[:, 1].sum()) == pytest.approx(
        row_deviation(a, b, RatioOfSums()), rel=1e-6
    )


def test_four_in_five_experiments_at_the_detectable_difference_find_it():
    # 200 rows of which 30% change; those that do improve with the chance that makes the true difference detectable.
    rng, rows, changing = np.random.default_rng(0), 200, 0.3
    mean = detectable_difference(math.sqrt(changing), rows)  # a little large: σ² is changing − mean²
    mean = detectable_difference(math.sqrt(changing - mean**2), rows)
    up = (1 + mean / changing) / 2
    found = 0
    for _ in range(400):
        d = np.where(rng.random(rows) < changing, np.where(rng.random(rows) < up, 1.0, -1.0), 0.0)
        found += paired_bootstrap(np.zeros(rows), d, MeanOf(), seed=0, resamples=400).p_value < 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.06)  # 3 standard errors of 400 experiments


@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_is_said_of_rows_without_spread(rows):
    a = np.random.default_rng(1).random((rows, 1))
    assert power_of(row_deviation(a, a, MeanOf()), rows, 0.01) is None
    assert power_of(row_deviation(a, a + 0.1, MeanOf()), rows, 0.01) is None


def test_a_ratio_that_one_row_alone_defines_has_no_power():
    a = np.array([[0.0, 0], [1, 1], [0, 0]])
    assert power_of(row_deviation(a, 2 * a, RatioOfSums()), 3, 0.01) is None


def test_power_is_json_of_plain_numbers():
    assert Power(0.1, 0.01, 785).as_json() == {"detectable_difference": 0.1, "unit": 0.01, "rows_for_unit": 785}


def test_before_measuring_the_worst_rates_are_described():
    # 2.8016 / √400 = 0.1401; unrelated answers that are right half of the time differ with σ² = ¼ + ¼.
    assert describe_power(400) == (
        "400 rows detect a paired difference of a rate of 9.9 percentage points with 80% power if the models' answers "
        "are unrelated, and of 14.0 at worst (every row changes); less if most rows agree"
    )
