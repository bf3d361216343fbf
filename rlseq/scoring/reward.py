"""What a reward says about itself: the `@reward` mark and the corpus metrics that go with it.

This module, and all of `rlseq.scoring` that a worker process imports, needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from rlseq.errors import RewardError, did_you_mean

SCOPES = ("sample", "group", "batch")


@dataclass(frozen=True)
class CorpusMetric:
    """A score of a whole set of completions, computed from sums of per-completion statistics.

    As in sacrebleu, a metric is statistics -> sums -> score; a bootstrap then only resamples the statistics.

    Attributes:
        statistics: names of numbers in the details a reward returns next to its value. A completion whose details lack
            one of them is left out.
        function: maps {statistic: sums, any array shape (..., )} to scores of that shape.
        higher_is_better: which way is good.
        description: one line for tables and reports, or a function that makes it from the kwargs of the reward's spec
            (sacrebleu's signature depends on them); text once a suite is loaded.
        label: what tables and reports call it; by default its name.
        reward: the name of the reward whose details hold the statistics; set when a suite is loaded.
    """

    statistics: tuple[str, ...]
    function: Callable[[Mapping[str, Any]], Any]
    higher_is_better: bool = True
    description: str | Callable[..., str] = ""
    label: str = ""
    reward: str = ""

    def compute(self, sums: Mapping[str, Any]) -> Any:
        """Return the score(s) for sums of each statistic; a leading axis of resamples is kept."""
        return self.function(sums)


@dataclass(frozen=True)
class Ratio:
    """The corpus metric Σ numerator / Σ denominator (an error rate, for one); see `CorpusMetric`."""

    numerator: str
    denominator: str
    higher_is_better: bool = False
    description: str | Callable[..., str] = ""
    label: str = ""
    reward: str = ""

    @property
    def statistics(self) -> tuple[str, ...]:
        return (self.numerator, self.denominator)

    def compute(self, sums: Mapping[str, Any]) -> Any:
        """Return Σ numerator / Σ denominator; NaN where the denominator is 0. Arrays keep their shape."""
        import numpy as np

        numerator, denominator = (
            np.asarray(sums[self.numerator], float),
            np.asarray(sums[self.denominator], float),
        )
        nothing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
        return np.divide(numerator, denominator, out=nothing, where=denominator != 0)


@dataclass(frozen=True)
class RewardInfo:
    """What `@reward` records; an unmarked function has all the defaults.

    Attributes:
        range: lowest and highest value the reward gives, or None if unknown.
        extra: the extra of rlseq that installs what the reward needs.
        scope: "sample" (a value depends on its own completion alone), "group" (the G completions of a
            prompt are handed over at once) or "batch" (all at once, never split).
        corpus: corpus metrics by name.
        marked: whether the function carries `@reward`: its `completions` are then always text.
    """

    range: tuple[float, float] | None = None
    extra: str | None = None
    scope: str = "sample"
    corpus: Mapping[str, CorpusMetric | Ratio] = field(default_factory=dict)
    marked: bool = False


_F = TypeVar("_F", bound=Callable)


@overload
def reward(function: _F) -> _F: ...


@overload
def reward(
    *,
    range: tuple[float, float] | None = None,
    extra: str | None = None,
    scope: str = "sample",
    corpus: Mapping[str, CorpusMetric | Ratio] | None = None,
) -> Callable[[_F], _F]: ...


def reward(
    function: Callable | None = None,
    *,
    range: tuple[float, float] | None = None,
    extra: str | None = None,
    scope: str = "sample",
    corpus: Mapping[str, CorpusMetric | Ratio] | None = None,
) -> Callable:
    """Mark a function as a reward and return that same function; used plain or with arguments.

    Args:
        range: lowest and highest value it gives; `on_error: floor` and `rlseq reward check` read it.
        extra: the extra of rlseq that installs what it needs.
        scope: "sample", "group" or "batch"; see `RewardInfo`.
        corpus: corpus metrics by name, over the details that the reward returns next to its value.

    Raises:
        RewardError: for an unknown scope or an inverted range.
    """
    if scope not in SCOPES:
        raise RewardError(f"scope is {scope!r}; expected one of {', '.join(SCOPES)}.{did_you_mean(scope, SCOPES)}")
    if range is not None and not range[0] <= range[1]:
        raise RewardError(f"range is {range!r}; expected (lowest, highest).")
    info = RewardInfo(range, extra, scope, dict(corpus or {}), marked=True)

    def mark(function: Callable) -> Callable:
        function.rlseq_reward = info  # type: ignore[attr-defined]  # functions take any attribute
        return function

    return mark if function is None else mark(function)


def info_of(function: Callable) -> RewardInfo:
    """Return what `@reward` recorded on a function, or the defaults."""
    return getattr(function, "rlseq_reward", None) or RewardInfo()
