"""The one validator of settings: ranges, settings without effect, and conflicts.

A dataclass declares ranges and needs at its fields (`rlseq.config.fields`). Those of fields that it inherits from TRL
or transformers are its class attributes `ranges_of_inherited` and `needs_of_inherited` (`rlseq.config.inherited`), and
its conflicts are functions (`rlseq.config.checks`) in `conflicts_as_given`, before TRL fills defaults in, and
`conflicts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from rlseq.config.fields import NEEDS, RANGE, Need, default_of
from rlseq.config.values import describe_choices
from rlseq.errors import ConfigError


class Settings:
    """Base of rlseq's own settings, whose ranges are checked when they are made."""

    def __post_init__(self) -> None:
        check_ranges(self)


def validate_given(config: Any, *, filled_in: bool = False) -> None:
    """Refuse settings as they were given, before TRL fills defaults in.

    Args:
        filled_in: TRL has done so already: what has no effect cannot be distinguished from its defaults.

    Raises:
        ConfigError: names the first setting that is wrong, and what to do.
    """
    idle = {} if filled_in else _without_effect(type(config), config)
    for name, why in idle.items():
        raise ConfigError(f"{name} is {getattr(config, name)}, which has no effect{why}. Leave it out.")
    check_ranges(config, prefix="")
    for conflict in config.conflicts_as_given:
        conflict(config)


def validate(config: Any) -> None:
    """Refuse settings that contradict each other, once TRL has filled defaults in.

    Raises:
        ConfigError: says which, and what to do.
    """
    for conflict in config.conflicts:
        conflict(config)


def check_ranges(settings: Any, prefix: str = "--") -> None:
    """Refuse a number, or one in a list, outside the range that its field declares; None is inside each.

    Args:
        prefix: put before the name in the message.

    Raises:
        ConfigError: names the first setting, and its range.
    """
    inherited = getattr(settings, "ranges_of_inherited", {})
    for field in dataclasses.fields(settings):
        value, allowed = getattr(settings, field.name), field.metadata.get(RANGE) or inherited.get(field.name)
        if allowed is None or value is None:
            continue
        name = prefix + field.name
        if isinstance(value, list | tuple):
            if outside := [number for number in value if number not in allowed]:
                raise ConfigError(f"{name} holds {outside[0]:g}; expected each to be {allowed.words}")
        elif value not in allowed:
            raise ConfigError(f"{name} is {value}; expected {allowed.words}")


def check_kind(field: dataclasses.Field, value: Any) -> None:
    """Refuse what is not one of a field's choices, and what is not a number (NaN).

    Raises:
        ConfigError: names the field, and its choices.
    """
    choices = field.metadata.get("choices")
    if value is not None and choices and value not in choices:
        raise ConfigError(f"{field.name} is {value!r}; expected {describe_choices(value, choices)}")
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, float) and math.isnan(number) for number in numbers):
        raise ConfigError(f"{field.name} is {value}; expected a number")


def overruled(settings: type, from_file: Mapping[str, Any], flags: Mapping[str, Any]) -> set[str]:
    """Names of what a file sets with an effect that flags, which override the file, take away: it is left out.

    Args:
        settings: the dataclass that is to be filled.
        from_file: values by name, of which some may be for other dataclasses.
        flags: likewise.
    """
    alone = {field.name: default_of(field) for field in dataclasses.fields(settings)} | dict(from_file)
    idle = [_without_effect(settings, SimpleNamespace(**values)) for values in (alone, alone | dict(flags))]
    return (idle[1].keys() - idle[0].keys()) & (from_file.keys() - flags.keys())


def _without_effect(settings: type, config: Any) -> dict[str, str]:
    """The settings that nothing reads under the others, and why."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(config, field.name)
        if value == default_of(field) or value is None:
            continue
        for need in _needs(settings, field):
            if need.met is None or not need.met(config):
                found.setdefault(field.name, f": {need.words}" if need.met is None else f" without {need.words}")
    return found


def _needs(settings: type, field: dataclasses.Field) -> Iterator[Need]:
    if NEEDS in field.metadata:
        yield field.metadata[NEEDS]
    for names, need in getattr(settings, "needs_of_inherited", ()):
        if any(field.name == name or (name.endswith("_") and field.name.startswith(name)) for name in names):
            yield need
