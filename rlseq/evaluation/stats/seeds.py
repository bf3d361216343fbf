"""Training seeds: checkpoints that are samples of one method, and intervals over seeds and rows at once.

An interval over rows says how a number of *these checkpoints* varies with the rows. What a *method* gives varies with
the seed of its training too, and only several checkpoints show by how much. Seeds and rows are crossed (every
checkpoint is measured on the same rows), so that both are resampled, each by itself: the pigeonhole bootstrap (Owen
2007, Annals of Applied Statistics 1; Owen & Eckles 2012, Annals of Applied Statistics 6).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rlseq.errors import ConfigError
from rlseq.evaluation.stats.bootstrap import percentiles, resampled_values
from rlseq.evaluation.stats.estimators import Aggregate

Key = TypeVar("Key", bound=Hashable)

FEW = 3  # seeds; below that a spread is hardly known


def methods(names: Iterable[str]) -> dict[str, list[str]]:
    """By method its checkpoints: `rl#1` and `rl#2` are two seeds of `rl`; any other name is a method of its own.

    Raises:
        ConfigError: a checkpoint has the name of a method of several others.
    """
    names = list(names)
    found: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)#\d+", name)
        found.setdefault(match[1] if match else name, []).append(name)
    for method, checkpoints in found.items():
        if method in names and len(checkpoints) > 1:
            others = ", ".join(name for name in checkpoints if name != method)
            raise ConfigError(
                f"{method!r} names a checkpoint, and the method that {others} are seeds of; name each seed {method}#N, "
                "or repeat the bare name."
            )
    return {method if len(checkpoints) > 1 else checkpoints[0]: checkpoints for method, checkpoints in found.items()}


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with numbers for those that are given several times: rl, rl -> rl#1, rl#2.

    Raises:
        ConfigError: a numbered name is given, too.
    """
    times, seen = Counter(names), Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}#{seen[name]}" if times[name] > 1 else name)
    for name, count in Counter(found).items():
        if count > 1:
            method = name.rpartition("#")[0]
            raise ConfigError(
                f"{name!r} names a checkpoint, and one of several that are given as {method!r}; call all of them "
                f"{method!r}, or number each."
            )
    return found


@dataclass(frozen=True)
class MethodResamples:
    """A metric of a method: its mean over S seeds, that of each, and the means of N resamples of seeds and rows."""

    value: float
    per_seed: tuple[float, ...]
    resampled: np.ndarray  # (N,)

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95% percentile interval; NaN where nothing is defined."""
        return percentiles(self.resampled)


@dataclass(frozen=True)
class MethodDifference:
    """b − a of two methods on the same rows, with its 95% interval and two-sided bootstrap p-value."""

    difference: float
    ci95: tuple[float, float]
    p_value: float


def crossed_bootstrap_many(
    metrics: Mapping[Key, tuple[str, Sequence[np.ndarray], Aggregate]], *, seed: int, resamples: int = 10_000
) -> dict[Key, MethodResamples]:
    """Means over seeds of metrics of the same R rows, and their values under resamples of seeds and of rows.

    Resample n takes R rows and S seeds, both with replacement, independently. With m_s the metric of seed s on the rows
    resampled and m̄ their mean, its value is

        m̄ + √(S / c_n) · (mean of m_s over the seeds resampled − m̄),    c_n ~ χ² with S − 1 degrees of freedom.

    The plain bootstrap has √(S / c_n) = 1. Then the variance of S seeds resampled from S is (S − 1)/S of what it should
    be, and its tails are those of a normal where the spread is as good as unknown; the factor mends both: where seeds
    alone vary, the interval is that of Student's t with S − 1 degrees of freedom. It vanishes as S grows. Of one seed
    nothing is known beyond it: its rows alone are resampled.

    Rows are the same for all metrics, and those of `rlseq.evaluation.stats.bootstrap.bootstrap`; seeds are the
    same for all metrics of a method, and independent between methods.

    Args:
        metrics: by key a method's name, the per-row statistics (R,) or (R, K) of each of its S seeds, and an aggregate.
        seed: names the resamples, with the method's name.

    Raises:
        RlseqError: as `bootstrap`.
    """
    if not metrics:
        return {}
    tables = {
        (key, s): (table, aggregate) for key, (_, seeds, aggregate) in metrics.items() for s, table in enumerate(seeds)
    }
    values = resampled_values(tables, seed=seed, resamples=resamples)
    found = {}
    for key, (method, seeds, aggregate) in metrics.items():
        per_seed = tuple(float(aggregate(np.asarray(table, dtype=float))) for table in seeds)
        by_seed = np.stack([values[key, s] for s in range(len(seeds))], axis=1)  # (N, S)
        found[key] = resample_method(method, per_seed, by_seed, seed=seed)
    return found


def resample_method(method: str, per_seed: Sequence[float], by_seed: np.ndarray, *, seed: int) -> MethodResamples:
    """A metric of a method from that of each of its S seeds: on all rows, and under N resamples of them, (N, S).

    What `crossed_bootstrap_many` does of metrics that it knows how to resample, for those that it does not.
    """
    values = tuple(map(float, per_seed))
    resampled = by_seed.mean(axis=1) + _resampled_seeds(by_seed, seed, method)
    return MethodResamples(float(np.mean(values)), values, resampled)


def resample_pairs(a: str, b: str, by_pair: np.ndarray, *, seed: int) -> np.ndarray:
    """(N,) of what is measured between two methods, from its value for each pair of their seeds, (N, S_a, S_b).

    The mean over pairs, with the seeds of either resampled as `crossed_bootstrap_many` does, each by itself: where
    the value of a pair is b's less a's, this is `difference`. What single pairs have beyond that is not resampled.
    """
    of_a, of_b = (_resampled_seeds(by_pair.mean(axis=axis), seed, method) for method, axis in ((a, 2), (b, 1)))
    return by_pair.mean(axis=(1, 2)) + of_a + of_b


def _resampled_seeds(by_seed: np.ndarray, seed: int, method: str) -> np.ndarray:
    """(N,) what resampling seeds adds to their mean, from each seed's metric under N resamples of rows, (N, S)."""
    resamples, seeds = by_seed.shape
    if seeds == 1:
        return np.zeros(resamples)
    rng = np.random.default_rng([seed, 2, zlib.crc32(method.encode())])
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    factor = np.sqrt(seeds / rng.chisquare(seeds - 1, size=resamples))
    return factor * (weights * (by_seed - by_seed.mean(axis=1, keepdims=True))).sum(axis=1)


def difference(a: MethodResamples, b: MethodResamples) -> MethodDifference:
    """b − a, on the same resamples of rows.

    p is twice the smaller share of resamples on either side of 0, (hits + 1) / (N + 1): the interval at level p touches
    0. A sign-flip test over rows has no say here, as its null takes the seeds for given.
    """
    resampled = b.resampled - a.resampled
    defined = resampled[~np.isnan(resampled)]
    tails = [(np.sum(side) + 1) / (defined.size + 1) for side in (defined <= 0, defined >= 0)]
    p_value = min(1.0, 2 * float(min(tails))) if defined.size else float("nan")
    return MethodDifference(b.value - a.value, percentiles(resampled), p_value)


def seed_notes(names: Iterable[str]) -> list[str]:
    """What a reader must know of methods with several seeds; nothing where every method is one checkpoint."""
    found = methods(names)
    repeated = {method: len(checkpoints) for method, checkpoints in found.items() if len(checkpoints) > 1}
    if not repeated:
        return []
    counts = ", ".join(f"{method} ({count} seeds)" for method, count in repeated.items())
    notes = [
        f"Methods with several seeds: {counts}. A method's value is the mean over its seeds, and its intervals "
        "resample seeds and rows; only its comparisons speak of the method."
    ]
    alone = [method for method in found if method not in repeated]
    if alone:
        notes.append(
            f"One checkpoint stands for {', '.join(alone)}: how much that would change with another seed of its "
            "training is in no interval."
        )
    few = [f"{method} has {count}" for method, count in repeated.items() if count < FEW]
    if few:
        notes.append(
            f"Few seeds: {', '.join(few)}. The spread of so few is hardly known, and their interval is very wide or, "
            "if they happen to agree, too narrow; give 5 or more."
        )
    return notes


def claim_of(seeds_a: int, seeds_b: int) -> dict[str, Any]:
    """What a comparison speaks of, as results.json says it."""
    claim = "checkpoints" if seeds_a == seeds_b == 1 else "method"
    return {"claim": claim, "seeds_a": seeds_a, "seeds_b": seeds_b}
