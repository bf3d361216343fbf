"""How numbers are printed: a metric's values, intervals and differences in its unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "n/a"  # shown where a value is null or was not measured


@dataclass(frozen=True)
class Shown:
    """How one metric is named, read and printed. `better` is True (higher), False (lower) or None."""

    name: str = ""
    label: str = ""
    better: bool | None = None
    percent: bool = False
    description: str = ""
    decimals: int = 1
    table: str = ""  # `rlseq.evaluation.metrics.Metric` has these two
    fault: bool = False

    def value(self, x: float | None) -> str:
        """A value: `8.2%` or `0.2104`; `n/a` for None, where nothing was measured."""
        text = number(self._scaled(x), self.decimals)
        return f"{text}%" if self.percent and text != NOTHING else text

    def interval(self, ci95: Any) -> str:
        """An interval: `7.9 to 8.5`; the unit is the value's."""
        low, high = (number(self._scaled(x), self.decimals) for x in ci95)
        return f"{low} to {high}"

    def difference(self, x: float | None) -> str:
        """A signed difference; shares differ by percentage points, one decimal finer than their values."""
        text = number(self._scaled(x), self.decimals + self.percent, signed=True)
        return f"{text} pp" if self.percent and text != NOTHING else text

    def difference_interval(self, ci95: Any) -> str:
        low, high = (self.difference(x).removesuffix(" pp") for x in ci95)
        return f"{low} to {high}"

    def cell(self, found: Mapping[str, Any] | None) -> str:
        """A `{"value", "ci95"}` with its interval: `8.2% (7.9 to 8.5)`; `n/a` where nothing was measured."""
        if found is None or found["value"] is None or math.isnan(found["value"]):
            return NOTHING
        return f"{self.value(found['value'])} ({self.interval(found['ci95'])})"

    def change(self, found: Mapping[str, Any] | None, key: str = "difference") -> str:
        """The difference that stands under a key, with its interval; `n/a` where it is undefined."""
        if found is None or found[key] is None:
            return NOTHING
        return f"{self.difference(found[key])} ({self.difference_interval(found['ci95'])})"

    def _scaled(self, x: float | None) -> float | None:
        return 100 * x if self.percent and x is not None else x


def number(x: float | None, decimals: int, *, signed: bool = False) -> str:
    """A decimal with a true minus sign and commas between thousands; `n/a` for None and NaN."""
    if x is None or math.isnan(x):
        return NOTHING
    text = f"{x:{'+' if signed else ''},.{decimals}f}"
    if not text.strip("+-0.,"):  # no sign on a zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


def p_text(p: float | None) -> str:
    if p is None or math.isnan(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
