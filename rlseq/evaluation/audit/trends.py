"""The test of an audit: from the first, or the middle, third of a run's steps to the last, did a reward rise or fall?

Rollouts of a prompt are not independent, so prompts are resampled, each with all its rollouts of all steps. With d the
difference of two means and s its standard deviation over the resamples, d / s has under no change about a Student t
distribution with C − 1 degrees of freedom, C prompts. A held-out reward raises the alarm over two thirds where the
optimised reward rose and it fell: p = max(p of the rise, p of the fall), one-sided (an intersection-union test; Berger
1982), adjusted by Holm over all held-out rewards and both pairs of thirds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from rlseq.evaluation.stats.bootstrap import percentiles, resampled_counts
from rlseq.evaluation.stats.holm import holm

LEVEL = 0.05
RESAMPLES = 2_000
THIRDS = ("first", "middle", "last")
PAIRS = ((0, 2), (1, 2))  # of thirds that are compared


@dataclass(frozen=True)
class Mean:
    """The mean of a column over some rollouts with its 95% interval; NaN where no rollout has a value."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Change:
    """The difference of a column's means between two sets of rollouts, later − earlier.

    Attributes:
        p_rise, p_fall: one-sided p-values of a rise and of a fall; 1 where the change is not defined.
    """

    difference: float
    ci95: tuple[float, float]
    p_rise: float
    p_fall: float


@dataclass(frozen=True)
class Trends:
    """Means and changes of columns over a run.

    Attributes:
        steps: (first, last) step of every bin.
        by_bin: column -> its mean in every bin.
        thirds: (first, last) step of every third.
        by_third: column -> its mean in every third.
        changes: column -> one change per pair of `PAIRS`.
        prompts: how many are resampled.
    """

    steps: list[tuple[int, int]]
    by_bin: dict[str, list[Mean]]
    thirds: list[tuple[int, int]]
    by_third: dict[str, list[Mean]]
    changes: dict[str, list[Change]]
    prompts: int


@dataclass(frozen=True)
class Verdict:
    """What the test says of one held-out reward and one pair of thirds."""

    held_out: str
    pair: tuple[int, int]
    p: float
    adjusted_p: float

    @property
    def alarm(self) -> bool:
        return self.adjusted_p <= LEVEL


def split_steps(steps: np.ndarray, parts: int) -> np.ndarray:
    """The part of each rollout, (N,): the sorted distinct steps cut into parts of about equal size."""
    distinct, index = np.unique(steps, return_inverse=True)
    return (np.arange(len(distinct)) * parts // len(distinct))[index]


def find_trends(columns: Mapping[str, np.ndarray], steps: np.ndarray, prompts: np.ndarray, *, bins: int = 8) -> Trends:
    """Means over steps and changes between thirds, with intervals from one set of resampled prompts.

    Args:
        columns: name -> (N,) values, NaN where there is none.
        steps: (N,) step of each rollout, three different ones at least.
        prompts: (N,) which prompt a rollout is of, by any number.
    """
    distinct = np.unique(steps)
    bins = min(bins, len(distinct))
    part, third = split_steps(steps, bins), split_steps(steps, 3)
    cells = [part == i for i in range(bins)] + [third == i for i in range(3)]
    _, prompt = np.unique(prompts, return_inverse=True)
    count = int(prompt.max()) + 1
    sums = []  # per column and cell, of each prompt: the sum of its values, and how many there are
    for values in columns.values():
        there = ~np.isnan(values)
        for cell in cells:
            sums.append(np.bincount(prompt, np.where(cell & there, values, 0.0), minlength=count))
            sums.append(np.bincount(prompt, cell & there, minlength=count))
    table = np.stack(sums, axis=1)  # (C, 2 · columns · cells)
    resampled = [counts @ table for counts in resampled_counts(count, seed=0, resamples=RESAMPLES)]
    shape = (-1, len(columns), len(cells), 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = _ratio(table.sum(axis=0).reshape(shape))[0]  # (columns, cells)
        means = _ratio(np.concatenate(resampled).reshape(shape))  # (N, columns, cells)

    by_bin, by_third, changes = {}, {}, {}
    for c, name in enumerate(columns):
        found = [Mean(float(observed[c, i]), percentiles(means[:, c, i])) for i in range(len(cells))]
        by_bin[name], by_third[name] = found[:bins], found[bins:]
        pairs = [(bins + a, bins + b) for a, b in PAIRS]
        changes[name] = [
            _change(observed[c, b] - observed[c, a], means[:, c, b] - means[:, c, a], count) for a, b in pairs
        ]
    ranges = [(int(steps[cell].min()), int(steps[cell].max())) for cell in cells]
    return Trends(ranges[:bins], by_bin, ranges[bins:], by_third, changes, count)


def verdicts(trends: Trends, optimised: str, held_out: Sequence[str]) -> list[Verdict]:
    """The test of every held-out reward and pair of thirds."""
    tested = [(name, i) for name in held_out for i in range(len(PAIRS))]
    p = [max(trends.changes[optimised][i].p_rise, trends.changes[name][i].p_fall) for name, i in tested]
    adjusted = holm(p)
    return [Verdict(name, PAIRS[i], p[n], float(adjusted[n])) for n, (name, i) in enumerate(tested)]


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _change(difference: float, resampled: np.ndarray, prompts: int) -> Change:
    defined = resampled[~np.isnan(resampled)]
    interval = percentiles(resampled)
    if math.isnan(difference) or len(defined) < len(resampled) / 2 or prompts < 2:
        return Change(float(difference), interval, 1.0, 1.0)
    deviation = float(defined.std(ddof=1))
    if deviation <= 1e-12 * max(1.0, abs(difference)):  # no value differs between prompts
        rise, fall = float(difference <= 1e-12), float(difference >= -1e-12)
        return Change(float(difference), interval, rise, fall)
    statistic = difference / deviation
    rise, fall = (float(student_t.sf(sign * statistic, prompts - 1)) for sign in (1, -1))
    return Change(float(difference), interval, rise, fall)
