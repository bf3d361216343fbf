"""How far two verifiers agree on the same rollouts, with intervals over prompts.

Rollouts of one prompt are not independent, so a bootstrap resamples prompts. Every statistic is made of sums over a
prompt's rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlseq.evaluation.stats.bootstrap import Interval, bootstrap_many
from rlseq.evaluation.stats.estimators import Aggregate, RatioOfSums

VERDICTS = ({0.0, 1.0}, {-1.0, 1.0})  # what a binary reward gives; the larger one is a pass


@dataclass(frozen=True)
class Agreement:
    """Two rewards, a and b, of the same rollouts.

    Attributes:
        rollouts, prompts: how many both gave a value to, and how many prompts these are of.
        table: of binary rewards, rollouts that both pass, a alone passes, b alone passes, neither passes; else None.
        statistics: by name, each with its interval (NaN with a single prompt). Of binary rewards `equal` (share of
            equal verdicts), `kappa` and `pass_rate_difference` (b − a); of others `correlation` and
            `mean_difference` (b − a). Of both the shares of advantages that are `reversed` (the opposite sign),
            `gained` (0 under a alone) and `lost` (0 under b alone); NaN without a group of two or more.
    """

    rollouts: int
    prompts: int
    table: tuple[int, int, int, int] | None
    statistics: dict[str, Interval]


@dataclass(frozen=True)
class CohensKappa:
    """(p − e) / (1 − e), p the share of equal verdicts, e its value by chance (Cohen 1960, eq. 1).

    Columns are those of `Agreement.table`. NaN where e is 1: both give the same one verdict to everything.
    """

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        both, only_a, only_b, neither = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
        count = both + only_a + only_b + neither
        chance = (both + only_a) * (both + only_b) + (neither + only_a) * (neither + only_b)
        possible = count**2 - chance
        with np.errstate(divide="ignore", invalid="ignore"):
            kappa = (count * (both + neither) - chance) / possible
        return np.where(possible > 1e-12 * count**2, kappa, np.nan)


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation, from the columns n, Σx, Σy, Σx², Σy², Σxy. NaN where x or y takes one value only."""

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        n, *moments = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y, xx, yy, xy = (moment / n for moment in moments)
            variances = xx - x**2, yy - y**2
            correlation = (xy - x * y) / np.sqrt(variances[0] * variances[1])
        varies = (variances[0] > 1e-12 * xx) & (variances[1] > 1e-12 * yy)
        return np.where(varies, np.clip(correlation, -1, 1), np.nan)


def agreement(
    a: np.ndarray,
    b: np.ndarray,
    signs_a: np.ndarray,
    signs_b: np.ndarray,
    prompts: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Agreement:
    """Compare two rewards, a and b, on the N rollouts of a log.

    Args:
        a, b: (N,) values, NaN where a reward gave none.
        signs_a, signs_b: (N,) signs of the advantages; NaN where a rollout is alone in its group.
        prompts: (N,) which prompt a rollout is of, by any number.

    Raises:
        RlseqError: no rollout has both values.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    a, b, signs_a, signs_b, prompts = (values[both] for values in (a, b, signs_a, signs_b, prompts))
    _, prompt = np.unique(prompts, return_inverse=True)
    count = int(prompt.max(initial=-1)) + 1

    def per_prompt(*columns: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(prompt, column, minlength=count) for column in columns], axis=1)

    one = np.ones(len(a))
    table: tuple[int, int, int, int] | None = None
    metrics: dict[str, tuple[np.ndarray, Aggregate]] = {}
    if is_binary(a) and is_binary(b):
        pass_a, pass_b = a > 0, b > 0
        cells = (pass_a & pass_b, pass_a & ~pass_b, ~pass_a & pass_b, ~pass_a & ~pass_b)
        counts = [int(cell.sum()) for cell in cells]
        table = counts[0], counts[1], counts[2], counts[3]
        metrics["equal"] = per_prompt(pass_a == pass_b, one), RatioOfSums()
        metrics["kappa"] = per_prompt(*cells), CohensKappa()
        metrics["pass_rate_difference"] = per_prompt(pass_b.astype(float) - pass_a, one), RatioOfSums()
    else:
        x, y = _standardised(a), _standardised(b)
        metrics["correlation"] = per_prompt(one, x, y, x * x, y * y, x * y), Correlation()
        metrics["mean_difference"] = per_prompt(b - a, one), RatioOfSums()
    grouped = ~(np.isnan(signs_a) | np.isnan(signs_b))
    changes: Mapping[str, np.ndarray] = {
        "reversed": signs_a * signs_b < 0,
        "gained": (signs_a == 0) & (signs_b != 0),
        "lost": (signs_a != 0) & (signs_b == 0),
    }
    for name, changed in changes.items():
        metrics[name] = per_prompt(changed & grouped, grouped), RatioOfSums()
    statistics = bootstrap_many(metrics, seed=seed, resamples=resamples)
    if count == 1:  # every resample is the sample: that says nothing of other prompts
        statistics = {name: Interval(found.value, (math.nan, math.nan)) for name, found in statistics.items()}
    return Agreement(len(a), count, table, statistics)


def is_binary(values: np.ndarray) -> bool:
    """Whether all values are 0 or 1, or all −1 or 1."""
    found = set(np.unique(values).tolist())
    return any(found <= pair for pair in VERDICTS)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Values about their mean, at most 1 in size, so that sums of squares lose no digits; 0 where all are equal."""
    if len(values) == 0 or values.min() == values.max():
        return np.zeros(len(values))
    centred = values - values.mean()
    return centred / np.abs(centred).max()
