"""Reward specs in, a suite out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.errors import RewardError
from rlseq.scoring.calls.runner import Reward
from rlseq.scoring.specs.options import parse_spec, reward_from_spec
from rlseq.scoring.suite import RewardSuite


def load_rewards(
    specs: Iterable[Any] | str,
    *,
    weights: Sequence[float] | None = None,
    search_root: str | Path | None = None,
    max_error_rate: float = 0.05,
    think_end: str | None = None,
) -> RewardSuite:
    """Find and load rewards.

    Args:
        specs: strings (a bundled name, `path/to/file.py:function`, `package.module:function`, a model id or
            path), functions, or mappings {func, name, weight, kwargs, columns, where, scope, timeout, on_error,
            floor, workers, concurrency, retries, cache}, also as JSON text; see docs/rewards.md.
        weights: one number per spec; 1 for each by default. Given here or in the specs, not both.
        search_root: where relative paths and `./rewards/` start; the working directory by default.
        max_error_rate: the largest share of a step (one `score` call, over all processes) that may fail before it
            raises.
        think_end: the text that ends a thought in a completion, as "</think>"; rewards may then ask for `thought` and
            `answer`.

    Raises:
        RewardError: a reward cannot be found, matches no signature, or its options do not fit together.
    """
    specs = [specs] if isinstance(specs, (str, Mapping)) or callable(specs) else list(specs)
    specs = [parse_spec(spec) for spec in specs]
    if not specs:
        raise RewardError("no rewards were given; expected at least one. `rlseq reward list` shows the bundled ones.")
    root = Path(search_root) if search_root is not None else Path.cwd()
    in_specs = [spec.get("weight") if isinstance(spec, Mapping) else None for spec in specs]
    if weights is not None:
        if any(weight is not None for weight in in_specs):
            raise RewardError("weights are given both in the reward specs and in reward_weights; keep one of the two.")
        if len(weights) != len(specs):
            raise RewardError(f"reward_weights has {len(weights)} numbers for {len(specs)} rewards; expected one each.")
        in_specs = list(weights)
    resolved = [1.0 if weight is None else _number(weight, spec) for weight, spec in zip(in_specs, specs, strict=True)]
    rewards: list[Reward] = []
    for spec in specs:
        reward = reward_from_spec(spec, root)
        rewards.append(reward.renamed(_unique(reward.name, [other.name for other in rewards])))
    suite = RewardSuite(rewards, resolved, max_error_rate)
    suite.specs = specs
    return suite.with_think_end(think_end)


def _number(weight: Any, spec: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RewardError(f"the weight of {spec!r} is {weight!r}; expected a finite number.")
    return float(weight)


def _unique(name: str, taken: list[str]) -> str:
    """`name`, or `name-2`, `name-3`, ...: two rewards of one name stay two series."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
