"""What is computed from per-row statistics: aggregates over rows, and unbiased estimators over a row's samples.

An aggregate is any callable on statistics (n,) or (n, K). One that also has `from_sums` is fast to resample
(`rlseq.evaluation.stats.bootstrap`): it gets column sums (..., K) *divided by the number of rows*, so that a mean is a
column and a ratio of sums is what it was, and returns the metric (...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from rlseq.errors import RlseqError

Aggregate = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class MeanOf:
    """The mean of one column."""

    column: int = 0

    def __call__(self, stats: np.ndarray) -> float:
        return float(np.mean(stats if stats.ndim == 1 else stats[:, self.column]))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return sums[..., self.column]


@dataclass(frozen=True)
class RatioOfSums:
    """Σ numerator / Σ denominator over rows: a corpus error rate, or a mean over the values present.

    A row that abstains puts 0 in both columns. Without any denominator the ratio is NaN.
    """

    numerator_column: int = 0
    denominator_column: int = 1

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[..., self.numerator_column] / sums[..., self.denominator_column]


@dataclass(frozen=True)
class ExpRatioOfSums(RatioOfSums):
    """exp(Σ numerator / Σ denominator): perplexity, from summed nats and token counts."""

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return np.exp(super().from_sums(sums))


@dataclass(frozen=True)
class SumOfRatios:
    """Σ_j sign_j · (Σ numerator_j / Σ denominator_j) over the same rows: a difference of means, of differences, ...

    Columns come in pairs, numerator and denominator, one pair a sign: (−1, 1) is second minus first.
    """

    signs: tuple[float, ...]

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sums[..., ::2] / sums[..., 1::2]) @ np.array(self.signs)


def pass_at_k(n: Any, c: Any, k: Any) -> Any:
    """Chance that k of n samples, chosen without replacement, hold a right one, when c of the n are right.

    1 − C(n−c, k) / C(n, k): the unbiased estimator of pass@k of Chen et al. 2021 (eq. 1). Scalars give a
    float, arrays broadcast.

    Raises:
        RlseqError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n, all whole.
    """
    n_, c_, k_ = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (n, c, k)))
    whole = all(np.all(x == np.floor(x)) for x in (n_, c_, k_))
    if not whole or np.any((c_ < 0) | (c_ > n_) | (k_ < 1) | (k_ > n_)):
        raise RlseqError(
            f"pass_at_k got n={n}, c={c}, k={k}; it needs whole numbers with 0 <= c <= n and 1 <= k <= n. "
            "Generate more samples per row for a larger k."
        )
    all_wrong = np.ones(n_.shape)  # C(n−c, k) / C(n, k) = Π_j (n−c−j) / (n−j), j = 0..k−1
    for j in range(int(k_.max(initial=0))):
        factor = np.clip(n_ - c_ - j, 0, None) / np.maximum(n_ - j, 1)
        all_wrong = np.where(j < k_, all_wrong * factor, all_wrong)
    result = 1.0 - all_wrong
    return float(result) if result.ndim == 0 else result


def best_of_k(rewards_n: Any, k: int) -> Any:
    """Expected best reward of k out of n samples chosen without replacement: unbiased for best-of-k.

    Σ_i C(i−1, k−1) / C(n, k) · r_(i) over the rewards in ascending order: r_(i) is the best of those subsets
    whose other k−1 lie among the i−1 below it.

    Args:
        rewards_n: (n,) or (..., n) rewards.
        k: how many are chosen, 1 ≤ k ≤ n.

    Raises:
        RlseqError: when k is out of range or a reward is not finite.
    """
    rewards = np.sort(np.asarray(rewards_n, dtype=float), axis=-1)
    n = rewards.shape[-1] if rewards.ndim else 0
    if not 1 <= k <= n or not np.all(np.isfinite(rewards)):
        raise RlseqError(f"best_of_k got k={k} and {n} rewards; it needs 1 <= k <= n and finite rewards.")
    weights = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])
    best = rewards @ weights
    return float(best) if best.ndim == 0 else best


def wilson_interval(passed: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a share, passed of n (Wilson 1927): it holds also where none or all of few passed.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    Raises:
        RlseqError: unless 0 ≤ passed ≤ n and n ≥ 1.
    """
    if not 0 <= passed <= n or n < 1:
        raise RlseqError(f"wilson_interval got passed={passed}, n={n}; it needs 0 <= passed <= n and n >= 1.")
    p, z = passed / n, NormalDist().inv_cdf((1 + level) / 2)
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low = 0.0 if passed == 0 else (centre - half) / scale
    high = 1.0 if passed == n else (centre + half) / scale
    return low, high
