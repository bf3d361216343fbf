"""Flags of a command, made from the fields of plain dataclasses, without trl; and how flags look in `--help`.

They read what `rlseq.config.parser` reads, which TRL's parser makes of the same dataclasses. A field's type hint says
how its flag is read: a text, number or truth value, or a list of them, each perhaps None. Its metadata (help, metavar)
is what argparse gets.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rlseq.config.fields import default_of, for_argparse

Settings = TypeVar("Settings")


def add_flags(parser: argparse.ArgumentParser, dataclass_type: type) -> None:
    """Declare a flag --name for every field, spelled --na-me as well, under the dataclass's title in `--help`.

    A truth value may be left out, which is true; a list of texts or mappings takes texts; what is no text and may be
    None takes `none` for it.
    """
    group = parser.add_argument_group(getattr(dataclass_type, "_argument_group_name", dataclass_type.__name__))
    hints = get_type_hints(dataclass_type)
    for field in dataclasses.fields(dataclass_type):
        spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        group.add_argument(
            *spellings, default=default_of(field), **_reading(hints[field.name]), **for_argparse(field.metadata)
        )


def from_flags(dataclass_type: type[Settings], parsed: argparse.Namespace) -> Settings:
    """Build the dataclass from what a parser with its flags has read."""
    names = [field.name for field in dataclasses.fields(dataclass_type)]
    return dataclass_type(**{name: getattr(parsed, name) for name in names})


def _reading(hint: Any) -> dict[str, Any]:
    """What argparse gets for a field's type."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    kinds = [member for member in members if member is not types.NoneType]
    if get_origin(kinds[0]) is list:
        element = get_args(kinds[0])[0]
        return {"nargs": "+", "type": _reader(str if str in get_args(element) else element)}
    if kinds == [bool]:
        return {"nargs": "?", "const": True, "type": string_to_bool}
    reader = _reader(kinds[0])
    return {"type": reader if reader is str or len(kinds) == len(members) else _or_none(reader)}


def _reader(kind: type) -> Any:
    return _number if kind is float else kind


def _number(text: str) -> float:
    number = float(text)
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a number")
    return number


_number.__name__ = "float"  # by which argparse calls what it cannot read


def string_to_bool(text: str) -> bool:
    """Read true or false, under any of the names that TRL's parser knows."""
    for words, value in ((("yes", "true", "t", "y", "1"), True), (("no", "false", "f", "n", "0"), False)):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"given {text!r}; expected true or false")


def _or_none(reader: Any) -> Any:
    def read(text: str) -> Any:
        return None if text.lower() in ("none", "null") else reader(text)

    read.__name__ = reader.__name__
    return read


class HelpFormatter(argparse.HelpFormatter):
    """One spelling a flag, the type in a word, defaults where they say something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]
        if action.nargs == 0:
            return option
        kind = action.metavar or getattr(action.type, "__name__", "value")
        if action.choices is not None:
            kind = "|".join(map(str, action.choices)) if len(action.choices) <= 6 else "NAME"
        names = {"string_to_bool": "true|false", "json_mapping": "JSON", "json_or_text": "JSON"}
        kind = names.get(kind, kind.upper() if kind in ("int", "float", "str", "value") else kind)
        return f"{option} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help or ''} (default: {' '.join(map(str, action.default))})"
        return f"{action.help or ''} (default: %(default)s)"
