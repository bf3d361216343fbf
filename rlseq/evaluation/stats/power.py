"""What a paired comparison could have seen: the smallest detectable difference, and the rows that a smaller one needs.

A two-sided test at level α of the mean of n row differences with standard deviation σ detects a true difference δ with
power 1 − β if, by the normal approximation, δ is at least

    (z_{1−α/2} + z_{1−β}) · σ / √n

(Cohen 1988; Card et al. 2020, "With little power comes great responsibility").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from rlseq.evaluation.stats.estimators import Aggregate

POWER, LEVEL = 0.8, 0.05
_FACTOR = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)  # 2.8016


@dataclass(frozen=True)
class Power:
    """What rows with this spread detect at 80% power, two-sided 5%.

    Attributes:
        detectable_difference: the smallest, in absolute value.
        unit: a difference of one point, in the metric's own scale.
        rows_for_unit: rows that detect one point.
    """

    detectable_difference: float
    unit: float
    rows_for_unit: int

    def as_json(self) -> dict[str, Any]:
        """As results.json has it."""
        return asdict(self)


def detectable_difference(deviation: float, rows: int) -> float:
    """The smallest difference that n rows detect, from the standard deviation of their differences."""
    return _FACTOR * deviation / math.sqrt(rows)


def power_of(deviation: float, rows: int, unit: float) -> Power | None:
    """What was detectable; None where the rows show no spread, from which nothing can be said."""
    if not deviation > 0:
        return None
    return Power(detectable_difference(deviation, rows), unit, math.ceil((_FACTOR * deviation / unit) ** 2))


def describe_power(rows: int, of: str = "rows") -> str:
    """What rows (or clusters) can detect, before anything is measured: of a rate, by its largest deviations."""
    related, worst = (100 * detectable_difference(deviation, rows) for deviation in (math.sqrt(0.5), 1.0))
    return (
        f"{rows:,} {of} detect a paired difference of a rate of {related:.1f} percentage points with 80% power if the "
        f"models' answers are unrelated, and of {worst:.1f} at worst (every {of[:-1]} changes); less if most {of} agree"
    )


def row_deviation(a: np.ndarray, b: np.ndarray, aggregate: Aggregate) -> float:
    """The standard deviation of the row differences b − a: σ, so that the difference has standard error σ / √R.

    By the jackknife, (R − 1) times the standard deviation of the differences that each leave one row out (Efron &
    Tibshirani 1993, ch. 11). Of a mean it is the ordinary standard deviation, with R − 1 degrees of freedom.

    Args:
        a, b: per-row statistics, (R, K).

    Returns:
        σ; 0 where all rows contribute equally (up to rounding), NaN for one row or if a difference is not defined.
    """
    rows = len(a)
    if rows < 2:
        return math.nan
    sides = []
    for table in (a, b):
        if hasattr(aggregate, "from_sums"):
            without = (table.sum(axis=0) - table) / (rows - 1)  # (R, K)
            sides.append(np.asarray(aggregate.from_sums(without), dtype=float))
        else:
            sides.append(np.array([float(aggregate(np.delete(table, i, axis=0))) for i in range(rows)]))
    spread = float(np.std(sides[1] - sides[0], ddof=1))
    size = max(float(np.abs(side).max()) for side in sides)
    return 0.0 if spread <= 1e-13 * size else (rows - 1) * spread
