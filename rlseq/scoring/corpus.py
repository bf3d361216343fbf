"""Corpus metrics over the details of completions: which completions count, and the sums of their statistics."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.errors import RewardError
from rlseq.scoring.outcome import plain, shorten


def statistics_of(name: str, metric: Any, details: Mapping[str, Any]) -> list[float] | None:
    """The statistics of one completion, in the metric's order; None where the details lack one of them.

    Such a completion (its reward abstained, failed, or gave no details) is left out; it does not count as 0.

    Args:
        name: of the metric.
        metric: a `CorpusMetric` or `Ratio` of a loaded suite.
        details: what the reward returned next to its value.

    Raises:
        RewardError: a statistic is present and not a finite number.
    """
    if any(key not in details for key in metric.statistics):
        return None
    return [_number(name, metric.reward, key, details[key]) for key in metric.statistics]


def _number(name: str, reward: str, key: str, value: Any) -> float:
    value = plain(value)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value  # an array of one element
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise RewardError(
        f"reward {reward!r} gave {shorten(value, 80)} as {key!r} in its details, of which the corpus metric {name!r} "
        "is computed; expected a finite number, or no such key where a completion has none."
    )


def value_of(name: str, metric: Any, sums: Mapping[str, Any]) -> Any:
    """Compute the metric from the sums of its statistics; arrays keep their shape.

    Raises:
        RewardError: the metric's own function raised.
    """
    try:
        return metric.compute(sums)
    except Exception as error:
        raise RewardError(
            f"the corpus metric {name!r} of reward {metric.reward!r} raised {type(error).__name__}: {error}. Its "
            "function gets sums of each statistic as arrays, which may be 0."
        ) from error


def of_completions(name: str, metric: Any, details: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """The metric over completions, and how many of them have its statistics; NaN if none has."""
    found = [row for one in details if (row := statistics_of(name, metric, one)) is not None]
    if not found:
        return math.nan, 0
    sums = {key: math.fsum(column) for key, column in zip(metric.statistics, zip(*found, strict=True), strict=True)}
    return float(value_of(name, metric, sums)), len(found)
