"""Intervals and paired tests over rows, from per-row statistics alone.

A metric is per-row statistics (R rows, K columns) and an aggregate that turns them into one number: a mean,
or a ratio of sums such as edits over lengths. A bootstrap then resamples rows of statistics and never looks
at a text again. Where the aggregate only needs column sums, N resamples are one matrix product: a count
matrix (N, R) times the statistics (R, K).

Differences are b − a everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rlseq.errors import RlseqError
from rlseq.evaluation.stats.estimators import Aggregate, MeanOf
from rlseq.evaluation.stats.power import row_deviation

Key = TypeVar("Key", bound=Hashable)

_CHUNK_ENTRIES = 2**21  # entries of a resampling matrix held at once: 16 MB as float64
_KEPT_ENTRIES = 2**26  # of all chunks, where they are kept: 64 MB as bytes


@dataclass(frozen=True)
class Interval:
    """A value and its 95% percentile bootstrap interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class PairedResult:
    """The difference b − a on the same rows, its 95% interval and its two-sided sign-flip p-value.

    Attributes:
        deviation: standard deviation of the row differences (`rlseq.evaluation.stats.power.row_deviation`).
        rows: R.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    resamples: int
    deviation: float
    rows: int


def bootstrap(stats: np.ndarray, aggregate: Aggregate, *, seed: int, resamples: int = 10_000) -> Interval:
    """The aggregate and its 95% percentile interval over resampled rows (Efron & Tibshirani 1993, ch. 13).

    Args:
        stats: per-row statistics, (R,) or (R, K), finite; a row holds all samples of a prompt.
        aggregate: statistics -> number; `np.mean`, `MeanOf`, `RatioOfSums` and their like are fast.
        seed: names the resampled rows: the same seed and R resample the same rows for every metric.

    Raises:
        RlseqError: no rows, a non-finite statistic, or a `from_sums` that disagrees with its aggregate.
    """
    return bootstrap_many({"": (stats, aggregate)}, seed=seed, resamples=resamples)[""]


def bootstrap_many(
    metrics: Mapping[Key, tuple[np.ndarray, Aggregate]], *, seed: int, resamples: int = 10_000
) -> dict[Key, Interval]:
    """`bootstrap` for many metrics of the same R rows in one pass: every metric sees the same resamples."""
    resampled = resampled_values(metrics, seed=seed, resamples=resamples)
    return {
        key: Interval(float(_fast(aggregate)(np.asarray(stats, dtype=float))), percentiles(resampled[key]))
        for key, (stats, aggregate) in metrics.items()
    }


def resampled_values(
    metrics: Mapping[Key, tuple[np.ndarray, Aggregate]], *, seed: int, resamples: int = 10_000
) -> dict[Key, np.ndarray]:
    """The aggregate of every resample of the R rows, (N,) by metric; `bootstrap` takes its interval from these."""
    tables = {key: _table(stats, key) for key, (stats, _) in metrics.items()}
    aggregates = {key: _fast(aggregate) for key, (_, aggregate) in metrics.items()}
    rows = _common_rows(tables)
    for key in metrics:
        _check_from_sums(aggregates[key], tables[key], key)

    resampled = {key: [] for key in metrics}
    for index, sums in _resampled(tables, aggregates, rows, seed, resamples):
        for key, aggregate in aggregates.items():
            if key in sums:
                resampled[key].append(aggregate.from_sums(sums[key]))
            else:
                resampled[key].append(np.array([_call(aggregate, metrics[key][0], i) for i in index]))
    return {key: np.concatenate(found) for key, found in resampled.items()}


def paired_bootstrap(
    stats_a: np.ndarray, stats_b: np.ndarray, aggregate: Aggregate, *, seed: int, resamples: int = 10_000
) -> PairedResult:
    """aggregate(b) − aggregate(a) on the same rows, with interval and p-value.

    The interval resamples rows, the same for both sides (Koehn 2004). The p-value swaps a and b of each row
    with chance ½ and counts the swaps whose difference is at least as large, (hits + 1) / (N + 1): the
    two-sided sign-flip permutation test. The same statistics on both sides give 0, (0, 0) and 1 exactly.

    Args:
        stats_a, stats_b: per-row statistics, equal shapes (R,) or (R, K), row i of both of the same prompt.
        aggregate, seed: as in `bootstrap`.

    Raises:
        RlseqError: as `bootstrap`, or shapes that differ.
    """
    return paired_bootstrap_many({"": (stats_a, stats_b, aggregate)}, seed=seed, resamples=resamples)[""]


def paired_bootstrap_many(
    comparisons: Mapping[Key, tuple[np.ndarray, np.ndarray, Aggregate]],
    *,
    seed: int,
    resamples: int = 10_000,
) -> dict[Key, PairedResult]:
    """`paired_bootstrap` for many comparisons on the same R rows in one pass."""
    a = {key: _table(stats_a, key) for key, (stats_a, _, _) in comparisons.items()}
    b = {key: _table(stats_b, key) for key, (_, stats_b, _) in comparisons.items()}
    aggregates = {key: _fast(aggregate) for key, (_, _, aggregate) in comparisons.items()}
    rows = _common_rows({**{(0, key): x for key, x in a.items()}, **{(1, key): x for key, x in b.items()}})
    for key in comparisons:
        if a[key].shape != b[key].shape:
            raise RlseqError(
                f"Statistics of {key!r} have shapes {a[key].shape} and {b[key].shape}; "
                "a paired comparison needs the same rows and columns on both sides."
            )
        _check_from_sums(aggregates[key], a[key], key)

    # Sums of b are sums of a plus sums of b − a: where both sides are equal that adds an exact zero, which
    # two separate matrix products would not.
    tables = {key: np.hstack([a[key], b[key] - a[key]]) for key in comparisons}
    observed = {key: _difference(aggregates[key], *comparisons[key][:2]) for key in comparisons}
    sizes = {key: abs(float(aggregates[key](np.asarray(x[0], dtype=float)))) for key, x in comparisons.items()}

    resampled = {key: [] for key in comparisons}
    for index, sums in _resampled(tables, aggregates, rows, seed, resamples):
        for key, aggregate in aggregates.items():
            if key in sums:
                sums_a, gap = np.split(sums[key], 2, axis=-1)
                resampled[key].append(aggregate.from_sums(sums_a + gap) - aggregate.from_sums(sums_a))
            else:
                stats_a, stats_b = (np.asarray(x, dtype=float) for x in comparisons[key][:2])
                resampled[key].append(np.array([_difference(aggregate, stats_a[i], stats_b[i]) for i in index]))

    hits = dict.fromkeys(comparisons, 0)
    for flips, sums in _flipped(tables, aggregates, rows, seed, resamples):
        for key, aggregate in aggregates.items():
            if key in sums:
                moved = np.split(sums[key], 2, axis=-1)[1]
                mean_a, mean_b = a[key].mean(axis=0), b[key].mean(axis=0)
                permuted = aggregate.from_sums(mean_b - moved) - aggregate.from_sums(mean_a + moved)
            else:
                permuted = np.array([_swapped(aggregate, *comparisons[key][:2], flip) for flip in flips])
            hits[key] += _as_extreme(permuted, observed[key], sizes[key] + abs(observed[key]))

    return {
        key: PairedResult(
            observed[key],
            percentiles(np.concatenate(resampled[key])),
            (hits[key] + 1) / (resamples + 1),
            resamples,
            row_deviation(a[key], b[key], aggregates[key]),
            rows,
        )
        for key in comparisons
    }


def resampled_counts(rows: int, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row is in each resample, (n, R) at a time: those of `bootstrap` with this seed."""
    return _weights(_counts, rows, seed, resamples)


def _table(stats: Any, key: Hashable) -> np.ndarray:
    """Statistics as (R, K) floats, refused unless finite (0 resamples of an inf would be NaN)."""
    table = np.asarray(stats, dtype=float)
    if table.ndim not in (1, 2) or table.shape[0] == 0:
        raise RlseqError(f"Statistics of {key!r} have shape {table.shape}; expected (rows,) or (rows, columns).")
    if not np.all(np.isfinite(table)):
        row = int(np.argwhere(~np.isfinite(table))[0][0])
        raise RlseqError(
            f"Statistics of {key!r} are not finite in row {row}. Give an absent value as 0, with a count "
            "of 0 in a second column, and aggregate with RatioOfSums."
        )
    return table.reshape(table.shape[0], -1)


def _common_rows(tables: Mapping[Any, np.ndarray]) -> int:
    counts = {key: table.shape[0] for key, table in tables.items()}
    if len(set(counts.values())) > 1:
        raise RlseqError(f"Metrics bootstrapped together need the same rows, but have {counts}.")
    return next(iter(counts.values()), 0)


def _fast(aggregate: Aggregate) -> Aggregate:
    return MeanOf() if aggregate is np.mean else aggregate


def _call(aggregate: Aggregate, stats: Any, index: np.ndarray) -> float:
    return float(aggregate(np.asarray(stats, dtype=float)[index]))


def _difference(aggregate: Aggregate, stats_a: Any, stats_b: Any) -> float:
    return float(aggregate(np.asarray(stats_b, dtype=float))) - float(aggregate(np.asarray(stats_a, dtype=float)))


def _swapped(aggregate: Aggregate, stats_a: Any, stats_b: Any, flip: np.ndarray) -> float:
    stats_a, stats_b = np.asarray(stats_a, dtype=float), np.asarray(stats_b, dtype=float)
    flip = flip.astype(bool).reshape(-1, *[1] * (stats_a.ndim - 1))
    return _difference(aggregate, np.where(flip, stats_b, stats_a), np.where(flip, stats_a, stats_b))


def _as_extreme(permuted: np.ndarray, observed: float, size: float) -> int:
    """How many differences are at least the observed one, up to rounding of metrics of this size."""
    return int(np.sum(~(np.abs(permuted) < abs(observed) - 1e-12 * size)))  # an undefined one counts


def _check_from_sums(aggregate: Aggregate, table: np.ndarray, key: Hashable) -> None:
    if not hasattr(aggregate, "from_sums"):
        return
    direct, from_sums = float(aggregate(table)), float(aggregate.from_sums(table.mean(axis=0)))
    if not np.isclose(direct, from_sums, rtol=1e-6, atol=1e-12, equal_nan=True):
        raise RlseqError(
            f"The aggregate of {key!r} gives {direct} from the rows and {from_sums} by `from_sums`, which "
            "gets column sums divided by the number of rows. Make them agree, or remove `from_sums`."
        )


def _products(
    weights: np.ndarray, tables: Mapping[Key, np.ndarray], aggregates: Mapping[Key, Aggregate]
) -> dict[Key, np.ndarray]:
    """weights (n, R) @ every table whose aggregate works on sums, as one product, over the number of rows."""
    fast = [key for key in tables if hasattr(aggregates[key], "from_sums")]
    if not fast:
        return {}
    sums = weights @ np.hstack([tables[key] for key in fast]) / weights.shape[1]
    edges = np.cumsum([tables[key].shape[1] for key in fast])[:-1]
    return dict(zip(fast, np.split(sums, edges, axis=1), strict=True))


def _chunks(rows: int, resamples: int) -> Iterator[int]:
    size = max(1, _CHUNK_ENTRIES // max(rows, 1))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _resampled(
    tables: Mapping[Key, np.ndarray],
    aggregates: Mapping[Key, Aggregate],
    rows: int,
    seed: int,
    resamples: int,
) -> Iterator[tuple[np.ndarray, dict[Key, np.ndarray]]]:
    """Resamples of the rows: by key, the (n, K) sums of statistics, with (n, R) indices if an aggregate needs them."""
    if all(hasattr(aggregate, "from_sums") for aggregate in aggregates.values()):
        for counts in _weights(_counts, rows, seed, resamples):
            yield np.empty(0), _products(counts, tables, aggregates)
        return
    for index in _indices(rows, seed, resamples):
        yield index, _products(_counted(index).astype(float), tables, aggregates)


def _flipped(
    tables: Mapping[Key, np.ndarray],
    aggregates: Mapping[Key, Aggregate],
    rows: int,
    seed: int,
    resamples: int,
) -> Iterator[tuple[np.ndarray, dict[Key, np.ndarray]]]:
    """Which rows swap sides: (n, R) zeros and ones and, by key, the (n, K) sums of the swapped rows."""
    for flips in _weights(_flips, rows, seed, resamples):
        yield flips, _products(flips, tables, aggregates)


# (rows, seed, resamples) -> arrays (n, R) of small integers
_Resampler = Callable[[int, int, int], Iterator[np.ndarray]]


def _weights(resampler: _Resampler, rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """What `resampler` gives, as floats, a chunk at a time; computed once for all calls with the same arguments."""
    small = rows * resamples <= _KEPT_ENTRIES
    chunks = _kept(resampler, rows, seed, resamples) if small else resampler(rows, seed, resamples)
    return (chunk.astype(float) for chunk in chunks)


@functools.lru_cache(maxsize=4)
def _kept(resampler: _Resampler, rows: int, seed: int, resamples: int) -> list[np.ndarray]:
    return [chunk.astype(np.min_scalar_type(chunk.max())) for chunk in resampler(rows, seed, resamples)]


def _indices(rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Rows resampled with replacement, (n, R)."""
    rng = np.random.default_rng([seed, 0])
    for n in _chunks(rows, resamples):
        yield rng.integers(rows, size=(n, rows))


def _counts(rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row is in a resample, (n, R)."""
    return map(_counted, _indices(rows, seed, resamples))


def _counted(index: np.ndarray) -> np.ndarray:
    n, rows = index.shape
    return np.bincount((index + rows * np.arange(n)[:, None]).ravel(), minlength=n * rows).reshape(n, rows)


def _flips(rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Which rows swap sides, (n, R) zeros and ones."""
    rng = np.random.default_rng([seed, 1])
    for n in _chunks(rows, resamples):
        yield rng.integers(2, size=(n, rows))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles over n resamples; those where the metric is undefined (0 / 0) are left out."""
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
