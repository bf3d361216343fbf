"""What a suite said of rollouts: values, statuses, the weighted sum and details of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlseq.scoring.outcome import FAILURES
from rlseq.types import ScoredRollout


@dataclass(frozen=True)
class ScoreTable:
    """What a suite said of N rollouts; every list has N entries, in the order of the rollouts.

    Attributes:
        names: of the rewards.
        scored: the rollouts with their values, statuses, weighted sums and details.
        messages: by reward name, {row: what went wrong} for the failures.
    """

    names: list[str]
    scored: list[ScoredRollout]
    messages: dict[str, dict[int, str]]

    @cached_property
    def values(self) -> dict[str, list[float | None]]:
        """Value by reward name; None where it abstained or failed."""
        return {name: [row.values[name] for row in self.scored] for name in self.names}

    @cached_property
    def status(self) -> dict[str, list[str]]:
        """Status by reward name: "ok", "abstained", "error", "timeout" or "invalid"."""
        return {name: [row.status[name] for row in self.scored] for name in self.names}

    @cached_property
    def totals(self) -> list[float | None]:
        """The weighted sum of each rollout's values, which is its reward; as `ScoredRollout.total`."""
        return [row.total for row in self.scored]

    @cached_property
    def details(self) -> dict[str, list[Mapping[str, Any]]]:
        """By reward name, what it returned next to each value."""
        return {name: [row.details[name] for row in self.scored] for name in self.names}

    @property
    def failures(self) -> dict[str, int]:
        """How many completions each reward failed on (error, timeout or invalid)."""
        return {name: sum(s in FAILURES for s in statuses) for name, statuses in self.status.items()}

    @property
    def failure_counts(self) -> dict[str, dict[str, int]]:
        """The same by kind: {reward: {"abstained": .., "error": .., "timeout": .., "invalid": ..}}."""
        kinds = ("abstained", *FAILURES)
        return {name: {kind: statuses.count(kind) for kind in kinds} for name, statuses in self.status.items()}


def weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Σ w·v over the values present, times Σ|w| over all / Σ|w| over those present; None if none is.

    An abstention therefore leaves the scale unchanged. If only rewards of weight 0 are present, the sum is None, unless
    every weight is 0: then it is 0.
    """
    present = [(w, v) for w, v in zip(weights, values, strict=True) if v is not None]
    if len(present) == len(values):
        return float(sum(w * v for w, v in present))
    if not present:
        return None
    everything, there = sum(map(abs, weights)), sum(abs(w) for w, _ in present)
    if there == 0:
        return 0.0 if everything == 0 else None
    return float(sum(w * v for w, v in present) * everything / there)
