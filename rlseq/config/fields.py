"""The fields of settings: what is declared in a field's metadata, and the one check of it.

    samples_per_row: int = setting(4, "Completions per row.", range=at_least(1))

A range may stand at a field that TRL or transformers declares: in the class attribute `ranges_of_inherited`, by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlseq.errors import ConfigError

RANGE = "range"  # the key of a field's metadata that argparse does not get


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, above `above` and below `below`; `words` describe them in a message."""

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value <= self.most
        return inside and (self.above is None or value > self.above) and (self.below is None or value < self.below)


def at_least(least: int) -> Range:
    """Numbers from `least`."""
    return Range(f"at least {least}", least=least)


ABOVE_0 = Range("a number above 0", above=0)
FINITE_ABOVE_0 = Range("a finite number above 0", above=0, below=math.inf)
NATS_ABOVE_0 = Range("nats above 0", above=0)
SHARE = Range("a share, 0 to 1", least=0, most=1)
FROM_0_TO_1 = Range("0 to 1", least=0, most=1)
FROM_0_BELOW_1 = Range("a number in [0, 1)", least=0, below=1)


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field with this default, or a new copy of it where that is a list.

    Args:
        more: `range`, `metavar`, `choices`.
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def as_declared(settings: type, name: str, **default: Any) -> Any:
    """A field that is the setting `name` of another dataclass: its default, range and help; a list becomes a tuple.

    Args:
        default: `default=VALUE` where it differs here.
    """
    declared = {field.name: field for field in dataclasses.fields(settings)}[name]
    value = default_of(declared)
    value = default.get("default", tuple(value) if isinstance(value, list) else value)
    return dataclasses.field(default=value, metadata=declared.metadata)


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, made where there is a factory of it."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def for_argparse(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A field's metadata without what only this module reads."""
    return {name: value for name, value in metadata.items() if name != RANGE}


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


class Settings:
    """Base of rlseq's own settings, whose ranges are checked when they are made."""

    def __post_init__(self) -> None:
        check_ranges(self)
