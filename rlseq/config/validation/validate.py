"""The one validator of settings: ranges, settings without effect, and conflicts.

A dataclass declares ranges, needs and conflicts at its fields (`rlseq.config.fields`). Those of fields that it inherits
from TRL or transformers are its class attributes `ranges_of_inherited`, `needs_of_inherited` and
`conflicts_of_inherited` (`rlseq.config.validation.inherited`). What takes more than a condition is a function
(`rlseq.config.validation.checks`) in `checks_as_given`, before TRL fills defaults in, and `checks_filled_in`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from rlseq.config.fields import CONFLICTS, NEEDS, RANGE, OneOf, default_of
from rlseq.config.parsing.values import describe_choices
from rlseq.errors import ConfigError


class Settings:
    """Base of rlseq's own settings, which are checked against what their fields declare when they are made."""

    def __post_init__(self) -> None:
        check_declared(self)


def validate_given(config: Any, *, filled_in: bool = False) -> None:
    """Refuse settings as they were given, before TRL fills defaults in.

    Args:
        filled_in: TRL has done so already: what has no effect cannot be distinguished from its defaults.

    Raises:
        ConfigError: names the first setting that is wrong, and what to do.
    """
    check_declared(config, prefix="", filled_in=filled_in)
    for check in config.checks_as_given:
        check(config)


def validate(config: Any) -> None:
    """Refuse settings that contradict each other, once TRL has filled defaults in.

    Raises:
        ConfigError: says which, and what to do.
    """
    for check in config.checks_filled_in:
        check(config)


def check_declared(settings: Any, prefix: str = "--", *, filled_in: bool = False) -> None:
    """Refuse settings that are not as their fields declare.

    Args:
        prefix: put before a name in the message.
        filled_in: as for `validate_given`.

    Raises:
        ConfigError: names the first setting that is wrong, and what to do.
    """
    check_ranges(settings, prefix)
    idle = {} if filled_in else _without_effect(type(settings), settings)
    for why in idle.values():
        given = [f"{prefix}{name} is {_plain(settings, name)}" for name, other in idle.items() if other == why]
        verb, it = ("has", "it") if len(given) == 1 else ("have", "them")
        raise ConfigError(f"{' and '.join(given)}, which {verb} no effect{why}. Leave {it} out.")
    for field in _given(type(settings), settings):
        for conflict in _declared(type(settings), field, CONFLICTS):
            if conflict.when is None or conflict.when(settings):
                values = {other.name: _plain(settings, other.name) for other in dataclasses.fields(settings)}
                raise ConfigError(f"{prefix}{field.name} {conflict.words.format_map(values)}")


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
        if isinstance(allowed, OneOf):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; expected {describe_choices(value, allowed.names)}")
        elif isinstance(value, list | tuple):
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
    for field in _given(settings, config):
        for need in _declared(settings, field, NEEDS):
            if need.met is None or not need.met(config):
                found.setdefault(field.name, f": {need.words}" if need.met is None else f" without {need.words}")
    return found


def _given(settings: type, config: Any) -> Iterator[dataclasses.Field]:
    """The fields whose values are neither None nor their defaults."""
    for field in dataclasses.fields(settings):
        value = getattr(config, field.name)
        if value is not None and value != default_of(field):
            yield field


def _declared(settings: type, field: dataclasses.Field, kind: str) -> Iterator[Any]:
    """The needs or conflicts of a field: its own, then those of a name of TRL's or transformers'."""
    own = field.metadata.get(kind, ())
    yield from own if isinstance(own, tuple) else (own,)
    for names, declared in getattr(settings, f"{kind}_of_inherited", ()):
        if any(field.name == name or (name.endswith("_") and field.name.startswith(name)) for name in names):
            yield declared


def _plain(settings: Any, name: str) -> Any:
    value = getattr(settings, name)
    return getattr(value, "value", value)
