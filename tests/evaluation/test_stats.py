"""Row statistics against scipy, hand arithmetic and listings of every subset."""

import itertools

import numpy as np
import pytest
import scipy.stats

from rlseq.errors import RlseqError
from rlseq.evaluation.stats.bootstrap import bootstrap, bootstrap_many, paired_bootstrap, paired_bootstrap_many
from rlseq.evaluation.stats.estimators import ExpRatioOfSums, MeanOf, RatioOfSums, best_of_k, pass_at_k


def error_counts(rows: int, rate: float, seed: int) -> np.ndarray:
    """(rows, 2): edits and lengths of made-up words."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, size=rows)
    return np.stack([rng.binomial(lengths, rate), lengths], axis=1).astype(float)


def test_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(1).gamma(2.0, size=150)
    ours = bootstrap(x, np.mean, seed=0)
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=7)
    assert ours.value == pytest.approx(x.mean())
    # Two sets of 10,000 resamples differ by a few percent of the interval's width.
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.ci95[0] == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.ci95[1] == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_interval_of_a_corpus_error_rate_agrees_with_scipy():
    stats = error_counts(120, 0.2, seed=2)
    ours = bootstrap(stats, RatioOfSums(0, 1), seed=3)
    theirs = scipy.stats.bootstrap(
        (stats[:, 0], stats[:, 1]),
        lambda edits, lengths, axis=-1: edits.sum(axis) / lengths.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=8,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(stats[:, 0].sum() / stats[:, 1].sum())
    assert ours.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_paired_p_value_agrees_with_scipys_permutation_test():
    rng = np.random.default_rng(4)
    a = rng.normal(size=60)
    b = a + rng.normal(0.12, 0.5, size=60)
    ours = paired_bootstrap(a, b, MeanOf(), seed=5)
    theirs = scipy.stats.permutation_test(
        (b, a),
        lambda x, y, axis=-1: x.mean(axis) - y.mean(axis),
        permutation_type="samples",
        n_resamples=10_000,
        rng=9,
    )
    assert 0.01 < theirs.pvalue < 0.5  # or the comparison would say little
    assert ours.difference == pytest.approx(theirs.statistic)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.02)  # 4 standard errors of a p near 0.1


def test_paired_p_value_approaches_the_share_of_all_sign_flips():
    a, b = np.array([0.0, 1, 0, 2, 1, 0]), np.array([1.0, 3, 1, 1, 2, 2])
    d = b - a  # every one of the 2^6 ways to swap rows, listed
    flips = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9 for signs in itertools.product([1, -1], repeat=6)]
    result = paired_bootstrap(a, b, np.mean, seed=1, resamples=50_000)
    assert result.p_value == pytest.approx(np.mean(flips), abs=0.006)


def test_p_value_of_a_corpus_rate_swaps_whole_rows_not_ratios():
    a, b = error_counts(8, 0.4, seed=5), error_counts(8, 0.2, seed=6)
    b[:, 1] = a[:, 1] + 1

    def rate(x):
        return x[:, 0].sum() / x[:, 1].sum()

    observed = abs(rate(b) - rate(a))
    hits = []
    for swap in itertools.product([False, True], repeat=8):
        mask = np.array(swap)[:, None]
        hits.append(abs(rate(np.where(mask, a, b)) - rate(np.where(mask, b, a))) >= observed - 1e-12)
    result = paired_bootstrap(a, b, RatioOfSums(), seed=2, resamples=50_000)
    assert result.p_value == pytest.approx(np.mean(hits), abs=0.006)


@pytest.mark.parametrize("aggregate", [RatioOfSums(), MeanOf(1), ExpRatioOfSums()])
def test_summed_path_equals_row_by_row_path(aggregate):
    a, b = error_counts(37, 0.3, seed=1), error_counts(37, 0.25, seed=2)

    def slow(stats):  # no from_sums: every resample is indexed and aggregated on its own
        return aggregate(stats)

    assert bootstrap(a, aggregate, seed=6, resamples=300).ci95 == pytest.approx(
        bootstrap(a, slow, seed=6, resamples=300).ci95, rel=1e-9
    )
    fast_result = paired_bootstrap(a, b, aggregate, seed=6, resamples=300)
    slow_result = paired_bootstrap(a, b, slow, seed=6, resamples=300)
    assert fast_result.ci95 == pytest.approx(slow_result.ci95, rel=1e-9)
    assert fast_result.difference == pytest.approx(slow_result.difference)
    assert fast_result.p_value == slow_result.p_value


def test_resamples_taken_in_chunks_equal_those_taken_at_once(monkeypatch):
    a, b = error_counts(41, 0.3, seed=1), error_counts(41, 0.25, seed=2)
    whole = paired_bootstrap(a, b, RatioOfSums(), seed=6, resamples=501)
    monkeypatch.setattr("rlseq.evaluation.stats.bootstrap._CHUNK_ENTRIES", 41 * 7)
    parts = paired_bootstrap(a, b, RatioOfSums(), seed=6, resamples=501)
    assert parts.ci95 == pytest.approx(whole.ci95, rel=1e-9)
    assert parts.p_value == whole.p_value


def test_a_metric_gives_the_same_numbers_alone_and_among_others():
    a, b, c = (error_counts(50, 0.3, seed=s) for s in (1, 2, 3))
    alone = paired_bootstrap(a, b, RatioOfSums(), seed=4, resamples=400)
    among = paired_bootstrap_many(
        {"other": (a[:, 0], c[:, 0], np.mean), ("sample", "per"): (a, b, RatioOfSums())},
        seed=4,
        resamples=400,
    )
    assert among["sample", "per"].ci95 == pytest.approx(alone.ci95, rel=1e-9)
    assert among["sample", "per"].p_value == alone.p_value
    intervals = bootstrap_many({"x": (c[:, 0], np.mean), "per": (a, RatioOfSums())}, seed=4, resamples=400)
    assert intervals["per"].ci95 == pytest.approx(bootstrap(a, RatioOfSums(), seed=4, resamples=400).ci95, rel=1e-9)


def test_same_statistics_on_both_sides_differ_by_exactly_zero():
    x = np.random.default_rng(0).random((501, 3)) / 7
    for aggregate in (MeanOf(2), RatioOfSums(0, 2), ExpRatioOfSums(1, 2), lambda s: float(s[:, 0].sum())):
        result = paired_bootstrap(x, x.copy(), aggregate, seed=1, resamples=200)
        assert (result.difference, result.ci95, result.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_difference_is_b_minus_a():
    a, b = np.zeros(30), np.linspace(0.5, 1.5, 30)
    result = paired_bootstrap(a, b, np.mean, seed=0, resamples=500)
    assert result.difference == pytest.approx(1.0)
    assert 0 < result.ci95[0] < 1.0 < result.ci95[1]
    assert result.p_value == pytest.approx(1 / 501)  # no swap of all 30 rows in 500 permutations


def test_ninety_five_percent_intervals_cover_the_truth_about_that_often():
    # 400 corpora of 150 rows; edits ~ Binomial(length, 0.2), so the true rate is 0.2 and the true gap is 0.
    covered_rate = covered_gap = small_p = 0
    for seed in range(400):
        a, b = error_counts(150, 0.2, seed=2 * seed), error_counts(150, 0.2, seed=2 * seed + 1)
        low, high = bootstrap(a, RatioOfSums(), seed=seed, resamples=400).ci95
        covered_rate += low <= 0.2 <= high
        gap = paired_bootstrap(a, b, RatioOfSums(), seed=seed, resamples=400)
        covered_gap += gap.ci95[0] <= 0 <= gap.ci95[1]
        small_p += gap.p_value <= 0.05
    # Binomial(400, 0.95) lies in 0.92..0.98 with chance 0.99; percentile intervals run a little narrow.
    assert 0.915 <= covered_rate / 400 <= 0.98
    assert 0.915 <= covered_gap / 400 <= 0.98
    assert 0.02 <= small_p / 400 <= 0.085


def test_seed_zero_and_seed_one_resample_different_rows_and_each_repeats():
    x = np.random.default_rng(0).random(40)
    first, again, other = (bootstrap(x, np.mean, seed=s, resamples=200).ci95 for s in (0, 0, 1))
    assert first == again != other


def test_perplexity_is_the_exponential_of_mean_nats():
    stats = np.array([[2.0, 4], [1.0, 2], [3.0, 6]])  # exp(6 / 12), and every resample has the same ratio
    interval = bootstrap(stats, ExpRatioOfSums(), seed=0, resamples=50)
    assert interval.value == pytest.approx(1.6487212707)
    assert interval.ci95 == pytest.approx((1.6487212707, 1.6487212707))


def test_rows_that_abstain_leave_the_mean():
    stats = np.array([[1.0, 1], [0.0, 0], [0.5, 1]])  # the middle row abstained
    assert bootstrap(stats, RatioOfSums(), seed=0, resamples=200).value == pytest.approx(0.75)


def test_interval_is_undefined_where_every_row_abstains():
    interval = bootstrap(np.zeros((5, 2)), RatioOfSums(), seed=0, resamples=20)
    assert np.isnan(interval.value) and np.isnan(interval.ci95).all()


def test_non_finite_statistics_are_refused_by_name_and_row():
    with pytest.raises(RlseqError, match=r"'per'.*row 1"):
        bootstrap_many({"per": (np.array([0.0, np.inf]), np.mean)}, seed=0)


def test_unequal_rows_are_refused():
    with pytest.raises(RlseqError, match="same rows"):
        paired_bootstrap(np.zeros(3), np.zeros(4), np.mean, seed=0)
    with pytest.raises(RlseqError, match="shapes"):
        paired_bootstrap(np.zeros((3, 1)), np.zeros((3, 2)), MeanOf(), seed=0)
    with pytest.raises(RlseqError, match="shape"):
        bootstrap(np.zeros((0, 2)), MeanOf(), seed=0)


def test_from_sums_that_disagrees_with_its_aggregate_is_refused():
    class Wrong(MeanOf):
        def from_sums(self, sums):
            return sums[..., 0] * 2

    with pytest.raises(RlseqError, match="from_sums"):
        bootstrap(np.ones(4), Wrong(), seed=0)


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        listed = np.mean([any(subset) for subset in itertools.combinations(right, k)])
        assert pass_at_k(n, c, k) == pytest.approx(listed)


def test_pass_at_k_takes_arrays_and_stays_exact_for_many_samples():
    # c = 1: the right one is among k of n with chance k / n.
    assert pass_at_k(256, np.array([0, 1, 256]), 100) == pytest.approx([0, 100 / 256, 1])
    assert pass_at_k(10, 1, np.array([1, 5, 10])) == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (4, 1.5, 1)])
def test_pass_at_k_refuses_impossible_counts(arguments):
    with pytest.raises(RlseqError, match="pass_at_k got"):
        pass_at_k(*arguments)


def test_best_of_k_is_the_mean_best_over_all_subsets():
    rewards = np.array([0.3, -1.0, 0.3, 2.5, 0.9])
    for k in range(1, 6):
        listed = np.mean([max(subset) for subset in itertools.combinations(rewards, k)])
        assert best_of_k(rewards, k) == pytest.approx(listed)
    both = best_of_k(np.stack([rewards, rewards + 1]), 2)
    assert both[1] - both[0] == pytest.approx(1.0)


def test_best_of_k_refuses_more_than_it_was_given():
    with pytest.raises(RlseqError, match="k=3 and 2 rewards"):
        best_of_k([1.0, 2.0], 3)
