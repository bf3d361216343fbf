"""Methods with several training seeds: the crossed bootstrap against exact laws and simulations, and on file."""

import itertools

import numpy as np
import pytest
import scipy.stats
from tiny import tiny_model

from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import Pair, Statistic
from rlseq.evaluation.stats.bootstrap import bootstrap, paired_bootstrap
from rlseq.evaluation.stats.estimators import MeanOf, RatioOfSums
from rlseq.evaluation.stats.seeds import crossed_bootstrap_many, difference, methods, numbered, seed_notes
from rlseq.evaluation.studies.study import StudyMetric, summarise
from rlseq.types import Prompt

WRONG, OF = Statistic("test", "wrong"), Statistic("test", "of")

ERROR_RATE = RatioOfSums()


def crossed(seeds, aggregate=ERROR_RATE, *, method="m", seed=0, resamples=2000):
    return crossed_bootstrap_many({"x": (method, seeds, aggregate)}, seed=seed, resamples=resamples)["x"]


def counts(rows, rates, seed):
    """A table (rows, 2) of errors and lengths for each rate."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, size=rows)
    return [np.stack([rng.binomial(lengths, rate), lengths], axis=1).astype(float) for rate in rates]


def test_a_methods_value_is_the_mean_of_its_seeds_metrics_not_that_of_the_pooled_rows():
    one, two = np.array([[1.0, 2], [1, 2]]), np.array([[0.0, 10], [5, 10]])
    found = crossed([one, two])
    assert found.per_seed == (0.5, 0.25)
    assert found.value == 0.375  # pooled it would be 7 / 24


def test_one_seed_is_the_ordinary_bootstrap_over_rows():
    (table,) = counts(60, [0.2], seed=1)
    interval = bootstrap(table, RatioOfSums(), seed=3, resamples=500)
    found = crossed([table], seed=3, resamples=500)
    assert (found.value, found.ci95) == (interval.value, interval.ci95)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_where_seeds_alone_vary_the_resamples_follow_the_law_of_every_resample_listed(seeds):
    values = np.array([0.1, 0.4, 0.9, 0.2])[:seeds]
    found = crossed([np.full(20, v) for v in values], MeanOf(), resamples=20_000)
    means = [np.mean(resample) - values.mean() for resample in itertools.product(values, repeat=seeds)]

    def cdf(x):  # P(√(S / c) d ≤ x), c ~ χ², over the S^S equally likely means d
        shares = []
        for d in means:
            with np.errstate(divide="ignore"):
                beyond = scipy.stats.chi2.cdf(seeds * d**2 / (x - values.mean()) ** 2, seeds - 1)  # |√(S/c) d| ≥ |x|
            if abs(d) < 1e-12:
                shares.append((x >= values.mean() - 1e-12).astype(float))
            else:
                shares.append(np.where(x < values.mean(), beyond if d < 0 else 0, 1 - (0 if d < 0 else beyond)))
        return np.mean(shares, axis=0)

    points = np.linspace(-1, 2, 31) + 0.003
    empirical = np.mean(found.resampled[:, None] <= points, axis=0)
    assert np.abs(empirical - cdf(points)).max() < 0.0115  # the Kolmogorov-Smirnov bound of 20,000 resamples at 1%


def test_with_rows_alike_the_interval_is_students():
    values = np.random.default_rng(2).normal(size=10)
    found = crossed([np.full(30, v) for v in values], MeanOf(), resamples=40_000)
    low, high = scipy.stats.t.interval(0.95, 9, values.mean(), values.std(ddof=1) / np.sqrt(10))
    assert found.ci95 == pytest.approx((low, high), abs=0.05 * (high - low))  # ten seeds give no exact normal


def covered(simulate, seeds_a, seeds_b, *, times=300, rows=200, resamples=300):
    """How often the crossed interval of b − a holds the true difference, and how often that of the rows alone does."""
    hits = np.zeros(2)
    for i in range(times):
        rng = np.random.default_rng([7, i])
        a, b = simulate(rng, seeds_a, rows), simulate(rng, seeds_b, rows)
        both = crossed_bootstrap_many({"a": ("a", a, MeanOf()), "b": ("b", b, MeanOf())}, seed=i, resamples=resamples)
        low, high = difference(both["a"], both["b"]).ci95
        row_low, row_high = bootstrap(
            np.mean(b, axis=0) - np.mean(a, axis=0), np.mean, seed=i, resamples=resamples
        ).ci95
        hits += low <= 0 <= high, row_low <= 0 <= row_high
    return hits / times


def random_effects(seed_effect):
    """Statistics of a row under a seed: a seed's effect, a row's, and noise; all methods are the same."""

    def simulate(rng, seeds, rows):
        effects = rng.normal(0, seed_effect, size=(seeds, 1)) + rng.normal(0, 0.5, size=rows)
        return list(effects + rng.normal(0, 0.7, size=(seeds, rows)))

    return simulate


def test_with_five_seeds_the_interval_over_seeds_and_rows_covers_and_that_over_rows_does_not():
    for seed_effect in (0.1, 0.3):
        crossed_hits, row_hits = covered(random_effects(seed_effect), 5, 5)
        assert crossed_hits >= 0.92
        assert row_hits < (0.9 if seed_effect == 0.1 else 0.6)
    # Three seeds, and nothing but them varies much: Student's factor is what covers.
    assert covered(random_effects(0.5), 3, 3, times=200)[0] >= 0.92


def test_with_equal_seeds_the_interval_is_hardly_wider_than_over_rows():
    hits, row_hits = covered(random_effects(0.0), 5, 5, times=200)
    assert hits >= row_hits >= 0.9


def test_rows_are_paired_and_seeds_of_two_methods_are_resampled_apart():
    rows = np.random.default_rng(0).normal(0, 100, size=80)
    a, b = ([rows + effect for effect in effects] for effects in ((0.0, 1.0, 2.0), (10.0, 11.0, 12.0)))
    tables = {"a": ("a", a, MeanOf()), "b": ("b", b, MeanOf()), "again": ("a", [x + 10 for x in a], MeanOf())}
    both = crossed_bootstrap_many(tables, seed=1, resamples=4000)
    found = difference(both["a"], both["b"])
    assert found.difference == pytest.approx(10)
    # The rows' spread of 100 / √80 is gone from the difference, and that of the seeds is in it twice.
    alone = np.ptp(crossed([np.full(9, v) for v in (0.0, 1.0, 2.0)], MeanOf(), resamples=4000).ci95)
    assert 1.1 * alone < np.ptp(found.ci95) < 2.2 * alone
    # One method's metrics see the same seeds.
    assert both["again"].resampled - both["a"].resampled == pytest.approx(10)
    # And equal seeds of two methods do not meet: another name, other resamples.
    assert crossed(a, MeanOf(), method="a").ci95 != crossed(a, MeanOf(), method="b").ci95


def test_p_is_below_one_in_twenty_where_the_interval_excludes_zero():
    small = 0
    for i in range(60):
        rng = np.random.default_rng(i)
        a, b = (list(rng.normal(size=(4, 40)) + rng.normal(mean, 0.1, size=(4, 1))) for mean in (0, 0.6))
        both = crossed_bootstrap_many({"a": ("a", a, MeanOf()), "b": ("b", b, MeanOf())}, seed=i, resamples=999)
        found = difference(both["a"], both["b"])
        excludes = found.ci95[0] > 0 or found.ci95[1] < 0
        assert excludes == (found.p_value <= 0.05) or 0.045 < found.p_value < 0.055  # a quantile lies between resamples
        small += excludes
    assert 5 < small < 55  # else the agreement would say little


def test_p_is_two_sided_and_one_where_nothing_differs():
    same = [np.arange(5.0), np.arange(5.0)]
    both = crossed_bootstrap_many({"a": ("a", same, MeanOf()), "b": ("b", same, MeanOf())}, seed=0, resamples=200)
    found = difference(both["a"], both["b"])
    assert (found.difference, found.ci95, found.p_value) == (0, (0, 0), 1)
    far = crossed_bootstrap_many({"c": ("c", [x + 9 for x in same], MeanOf())}, seed=0, resamples=200)["c"]
    for pair in ((both["a"], far), (far, both["a"])):
        assert difference(*pair).p_value == pytest.approx(2 / 201)


def test_a_seed_that_measured_nothing_leaves_the_method_without_a_number():
    found = crossed([np.array([[1.0, 1], [0, 1]]), np.zeros((2, 2))])
    assert np.isnan(found.value) and np.isnan(found.ci95).all()
    assert np.isnan(difference(found, found).p_value)


def test_a_checkpoint_sampled_under_two_seeds_differs_by_chance_alone():
    fields = {"vocab_size": 3, "pad_token_id": 2, "bos_token_id": None, "eos_token_id": 2, "num_hidden_layers": 1}
    model = tiny_model("llama", initializer_range=0.5, **fields)
    prompts = [Prompt(str(i), "", tuple(int(bit) for bit in f"{i + 2:b}"[1:]), {}) for i in range(62)]  # 0, 1, 00, ...

    def table(seed):
        options = {"num_samples": 2, "max_new_tokens": 2, "strategy": Sample(), "seed": seed, "stop_ids": {2}}
        groups = sample(model, prompts, **options)
        ones = [sum(r.completion_ids.count(1) for r in group) for group in groups]
        return np.array([[n, len(group)] for n, group in zip(ones, groups, strict=True)], dtype=float)

    tables = [table(seed) for seed in range(400)]
    found = [
        paired_bootstrap(a, b, ERROR_RATE, seed=i, resamples=400)
        for i, (a, b) in enumerate(zip(tables[::2], tables[1::2], strict=True))
    ]
    assert np.std([f.difference for f in found]) > 0.02  # or there would be nothing to cover
    assert 0.92 <= np.mean([f.ci95[0] <= 0 <= f.ci95[1] for f in found]) <= 0.98
    assert 0.02 <= np.mean([f.p_value <= 0.05 for f in found]) <= 0.08


def test_studies_compare_methods_by_their_seeds():
    names = ("base", "rl#1", "rl#2", "x")
    found = {
        name: [{WRONG: float(n), OF: float(of)} for n, of in table]
        for name, table in zip(names, counts(30, [0.3, 0.2, 0.25, 0.4], seed=3), strict=True)
    }
    rates = {name: sum(r[WRONG] for r in rows) / sum(r[OF] for r in rows) for name, rows in found.items()}
    settings = ContrastSettings(resamples=300, seed=4)
    metrics = {"rate": StudyMetric(Pair(WRONG, OF), ERROR_RATE)}
    *alone, of_method = summarise(found, metrics, settings)["comparisons"]
    assert [(c["a"], c["b"]) for c in alone] == [("base", "rl#1"), ("base", "rl#2"), ("base", "x")]
    assert (of_method["a"], of_method["b"], of_method["claim"]) == ("base", "rl", "method")
    assert (of_method["seeds_a"], of_method["seeds_b"]) == (1, 2)
    assert of_method["difference"] == pytest.approx((rates["rl#1"] + rates["rl#2"]) / 2 - rates["base"])
    low, high = of_method["ci95"]
    assert high - low > max(np.ptp(c["ci95"]) for c in alone)
    # Where the first method has seeds, all is compared with their mean, and nothing with one of them.
    turned = summarise({name: found[name] for name in names[1:]}, metrics, settings)["comparisons"]
    assert [(c["a"], c["b"], c["seeds_a"], c["seeds_b"]) for c in turned] == [("rl", "x", 2, 1)]
    assert turned[0]["difference"] == pytest.approx(rates["x"] - (rates["rl#1"] + rates["rl#2"]) / 2)


def test_numbered_names_are_seeds_of_one_method():
    assert numbered(["base", "rl", "rl", "x"]) == ["base", "rl#1", "rl#2", "x"]
    assert numbered(["rl#1", "rl#2", "rl"]) == ["rl#1", "rl#2", "rl"]
    with pytest.raises(ConfigError, match="'rl#1' names a checkpoint, and one of several that are given as 'rl'"):
        numbered(["rl", "rl", "rl#1"])  # else one of the three would stand for two
    assert methods(["base", "rl#1", "x#7", "rl#2"]) == {"base": ["base"], "rl": ["rl#1", "rl#2"], "x#7": ["x#7"]}
    with pytest.raises(ConfigError, match="'rl' names a checkpoint, and the method that rl#1 are seeds of"):
        methods(["rl", "rl#1"])


def test_notes_warn_of_few_seeds_and_of_a_side_without_any():
    assert seed_notes(["a", "b"]) == []
    notes = " ".join(seed_notes(["base", "rl#1", "rl#2"]))
    assert "rl (2 seeds)" in notes and "One checkpoint stands for base" in notes and "Few seeds: rl has 2" in notes
    five = seed_notes([f"{name}#{i}" for name in ("base", "rl") for i in range(5)])
    assert len(five) == 1 and "base (5 seeds), rl (5 seeds)" in five[0]
