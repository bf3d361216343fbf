"""The primary comparison: the one that has a claim, as users name it and as results do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rlseq.decoding import parse_strategy
from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.aggregate import COMPLETION_METRICS, GENERATION_METRICS
from rlseq.evaluation.names import Names
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import RewardSuite


def with_primary_name(settings: ContrastSettings, suite: RewardSuite) -> ContrastSettings:
    """The settings with the metric of the primary comparison by its name in the results.

    Raises:
        ConfigError: it is no METRIC:STRATEGY, or names no metric or two.
    """
    if settings.primary is None:
        return settings
    metric, colon, strategy = settings.primary.partition(":")
    if not colon:
        raise ConfigError(f"--primary is {settings.primary!r}; expected METRIC:STRATEGY, for example wer:greedy")
    name = Names.of(suite).find(metric, [*COMPLETION_METRICS, *GENERATION_METRICS], "primary")
    return dataclasses.replace(settings, primary=f"{name}:{strategy}")


def check_primary(settings: ContrastSettings, measured: Sequence[str]) -> None:
    """Check that the primary comparison is of strategies with these signatures, and of a metric that they have.

    Raises:
        ConfigError: it is not.
    """
    if settings.primary is None:
        if settings.primary_against is not None:
            raise ConfigError(f"--primary_against {settings.primary_against!r} needs --primary METRIC:STRATEGY")
        return
    metric, _, strategy = settings.primary.partition(":")
    for flag, text in (("primary", strategy), ("primary_against", settings.primary_against)):
        if text is not None and parse_strategy(text).signature not in measured:
            raise ConfigError(
                f"--{flag} names the strategy {text!r}, which is not among --strategies {' '.join(measured)}."
                + did_you_mean(text, measured)
            )
        if text is not None and metric in GENERATION_METRICS and not parse_strategy(text).samples:
            raise ConfigError(
                f"--{flag} asks for {metric} under {text!r}, which draws from no distribution; name a strategy that "
                "samples, or the metric exact_match"
            )


def refuse_oracle_claims(settings: ContrastSettings, chosen_by: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if the primary comparison is of a strategy that knows the answers."""
    if settings.primary is None:
        return
    for flag, text in (("primary", settings.primary.partition(":")[2]), ("primary_against", settings.primary_against)):
        strategy = parse_strategy(text).signature if text else None
        if strategy in chosen_by:
            raise ConfigError(
                f"--{flag} names {strategy!r}, an oracle: it chooses by a reward that reads "
                f"{', '.join(chosen_by[strategy])}. No claim can rest on it; name a strategy that decodes."
            )


def primary_comparison(settings: ContrastSettings, names: list[str]) -> dict[str, str] | None:
    """Which comparison has the claim, as results.json names it; None where there is none."""
    if settings.primary is None or len(names) < 2:
        return None
    metric, _, strategy = settings.primary.partition(":")
    primary = {"metric": metric, "strategy": parse_strategy(strategy).signature, "a": names[0], "b": names[1]}
    against = primary["strategy"]
    if settings.primary_against:
        against = parse_strategy(settings.primary_against).signature
    return primary if against == primary["strategy"] else {**primary, "strategy_a": against}
