"""The fields of settings: a default, help, a range, what a setting needs to have an effect, and what it cannot be with.

    samples_per_row: int = setting(4, "Completions per row.", range=at_least(1))
    kl_target: float | None = setting(None, "...", needs=Need("beta above 0", lambda config: config.beta))
    target_kl: float | None = setting(
        None, "...", conflicts=Conflict("is not for the loss scaling of fp16; take bf16", lambda config: config.fp16)
    )

`rlseq.config.validation.validate` reads them. For fields that TRL or transformers declares they stand in
`rlseq.config.validation.inherited`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RANGE, NEEDS, CONFLICTS = "range", "needs", "conflicts"  # keys of a field's metadata that argparse does not get


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


@dataclass(frozen=True)
class Need:
    """What a setting has no effect without.

    Attributes:
        words: name it in a message; where `met` is None, say why nothing reads the setting.
        met: whether the settings have it.
    """

    words: str
    met: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Conflict:
    """What a setting that is given cannot stand beside.

    Attributes:
        words: say so in a message, after the setting's name; `{name}` in them is the value of the setting `name`.
        when: whether the settings are so; None: whatever they are.
    """

    words: str
    when: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class OneOf:
    """Names that a setting may be, where its type does not say so."""

    names: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.names


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
        more: `range`, `needs` and `conflicts` (one or a tuple of them), and what argparse takes: `metavar`, `choices`.
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def as_declared(settings: type, name: str, **other: Any) -> Any:
    """A field that is the setting `name` of another dataclass: its default, range and help; a list becomes a tuple.

    Args:
        other: what differs here: `default`, and what `setting` takes.
    """
    declared = {field.name: field for field in dataclasses.fields(settings)}[name]
    value = default_of(declared)
    value = other.pop("default", tuple(value) if isinstance(value, list) else value)
    return dataclasses.field(default=value, metadata={**declared.metadata, **other})


def range_of(settings: type, name: str) -> Range:
    """The range that the setting `name` of a dataclass declares."""
    return {field.name: field for field in dataclasses.fields(settings)}[name].metadata[RANGE]


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, made where there is a factory of it."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def for_argparse(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A field's metadata without what only this module reads."""
    return {name: value for name, value in metadata.items() if name not in (RANGE, NEEDS, CONFLICTS)}
