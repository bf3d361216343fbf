"""The primary comparison: the one that has a claim, as users name it and as results do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlseq.engine.strategies import parse_strategy
from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.metrics import CHANCE_METRICS, COMPLETION_METRICS, EXACT_MATCH, THOUGHT_METRICS
from rlseq.evaluation.names import Names
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.stats.holm import holm
from rlseq.evaluation.stats.seeds import methods
from rlseq.scoring import RewardSuite


@dataclass(frozen=True)
class Primary:
    """The primary comparison as settings have it.

    Attributes:
        metric: its name, as the user or (after `with_primary_name`) the results have it.
        strategy: of the other model and, without `against`, of the first one.
        against: strategy of the first model.
    """

    metric: str
    strategy: str
    against: str | None

    @classmethod
    def of(cls, settings: ContrastSettings) -> Primary | None:
        """That of the settings; None where they declare none.

        Raises:
            ConfigError: it is no METRIC:STRATEGY.
        """
        if settings.primary is None:
            return None
        metric, colon, strategy = settings.primary.partition(":")
        if not colon:
            raise ConfigError(f"--primary is {settings.primary!r}; expected METRIC:STRATEGY, for example wer:greedy")
        return cls(metric, strategy, settings.primary_against)

    @property
    def spec(self) -> str:
        return parse_strategy(self.strategy).spec

    @property
    def spec_against(self) -> str:
        return parse_strategy(self.against or self.strategy).spec

    @property
    def flags(self) -> tuple[tuple[str, str | None], ...]:
        """The flags that name strategies, and these."""
        return ("primary", self.strategy), ("primary_against", self.against)


def with_primary_name(settings: ContrastSettings, suite: RewardSuite) -> ContrastSettings:
    """The settings with the metric of the primary comparison by its name in the results.

    Raises:
        ConfigError: it is no METRIC:STRATEGY, or names no metric or two.
    """
    primary = Primary.of(settings)
    if primary is None:
        return settings
    of_thoughts = THOUGHT_METRICS if settings.think_end is not None else ()
    name = Names.of(suite).find(primary.metric, [*COMPLETION_METRICS, *of_thoughts, *CHANCE_METRICS], "primary")
    return dataclasses.replace(settings, primary=f"{name}:{primary.strategy}")


def check_primary(settings: ContrastSettings, measured: Sequence[str]) -> None:
    """Check that the primary comparison is of strategies with these specs, and of a metric that they have.

    Raises:
        ConfigError: it is not.
    """
    primary = Primary.of(settings)
    if primary is None:
        if settings.primary_against is not None:
            raise ConfigError(f"--primary_against {settings.primary_against!r} needs --primary METRIC:STRATEGY")
        return
    for flag, text in primary.flags:
        if text is not None and parse_strategy(text).spec not in measured:
            raise ConfigError(
                f"--{flag} names the strategy {text!r}, which is not among --strategies {' '.join(measured)}."
                + did_you_mean(text, measured)
            )
        if text is not None and primary.metric in CHANCE_METRICS and not parse_strategy(text).is_stochastic:
            raise ConfigError(
                f"--{flag} asks for {primary.metric} under {text!r}, which does not sample; name a strategy "
                f"that samples, or the metric {EXACT_MATCH.name}"
            )


def validate_no_oracle_claim(settings: ContrastSettings, chosen_by: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if the primary comparison is of a strategy that knows the answers."""
    primary = Primary.of(settings)
    for flag, text in primary.flags if primary else ():
        strategy = parse_strategy(text).spec if text else None
        if strategy in chosen_by:
            raise ConfigError(
                f"--{flag} names {strategy!r}, an oracle: it chooses by a reward that reads "
                f"{', '.join(chosen_by[strategy])}. No claim can rest on it; name a strategy that decodes."
            )


def primary_comparison(settings: ContrastSettings, names: list[str]) -> dict[str, str] | None:
    """Which comparison has the claim, as results.json names it; None where there is none."""
    primary = Primary.of(settings)
    if primary is None or len(names) < 2:
        return None
    found = {"metric": primary.metric, "strategy": primary.spec, "a": names[0], "b": names[1]}
    against = primary.spec_against
    return found if against == primary.spec else {**found, "strategy_a": against}


def is_primary(comparison: Mapping[str, Any], primary: Mapping[str, str] | None) -> bool:
    """Whether a comparison of results.json is the one with the claim."""
    keys = ("a", "b", "strategy", "strategy_a", "metric")
    return bool(primary) and all(comparison.get(key) == primary.get(key) for key in keys)


def adjusted(
    comparisons: Sequence[Mapping[str, Any]], primary: Mapping[str, str] | None, models: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The comparisons with `p_adjusted`, and what results.json says of the adjustment.

    All secondary comparisons are one family. The primary one is not adjusted, and single seeds of a method, for which
    the method's comparisons stand, do not count: their `p_adjusted` is NaN.
    """
    seeds = {name for names in methods(models).values() if len(names) > 1 for name in names}
    p_values = [math.nan if is_primary(c, primary) or {c["a"], c["b"]} & seeds else c["p_value"] for c in comparisons]
    found = [c | {"p_adjusted": float(p)} for c, p in zip(comparisons, holm(p_values), strict=True)]
    return found, {"method": "holm", "comparisons": sum(not math.isnan(p) for p in p_values)}
