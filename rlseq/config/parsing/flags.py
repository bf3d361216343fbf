"""Flags of a command, made from the fields of plain dataclasses, without trl; and how flags look in `--help`.

They read what `rlseq.config.parsing.parser` reads, which TRL's parser makes of the same dataclasses. A field's type
hint says how its flag is read: a text, number or truth value, or a list of them, each perhaps None. Its metadata (help,
metavar) is what argparse gets.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from rlseq.config.fields import default_of, for_argparse
from rlseq.config.parsing.values import describe_choices
from rlseq.errors import ConfigError

CONFIG_HELP = "YAML file of settings, a line `name: value` each; flags override it."


class OneLineErrors(argparse.ArgumentParser):
    """Raises `ConfigError`, of one line, where argparse prints a page of usage and exits."""

    def error(self, message: str) -> NoReturn:
        # "argument --eval_rows/--eval-rows: ..." names one flag twice.
        message = re.sub(r"^argument (--?[\w-]+)[^:]*: ", r"\1: ", message).removeprefix("argument ")
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            expected = describe_choices(value, action.choices)
            raise argparse.ArgumentError(action, f"given {value!r}; expected {expected}")


def add_flags(parser: argparse.ArgumentParser, dataclass_types: Sequence[type]) -> None:
    """Declare --config, and a flag --name for every field, spelled --na-me as well, under its dataclass's title.

    A truth value may be left out, which is true; a list of texts or mappings takes texts; what is no text and may be
    None takes `none` for it. A flag that is not given leaves nothing behind.
    """
    parser.formatter_class = HelpFormatter
    parser.add_argument("--config", metavar="FILE.yaml", help=CONFIG_HELP)
    for dataclass_type in dataclass_types:
        group = parser.add_argument_group(getattr(dataclass_type, "_argument_group_name", dataclass_type.__name__))
        hints = get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            reading = {**_reading(hints[field.name]), **for_argparse(field.metadata)}
            action = group.add_argument(*spellings, default=argparse.SUPPRESS, **reading)
            action.default_in_help = default_of(field)


def from_flags(dataclass_types: Sequence[type], parsed: argparse.Namespace) -> tuple[Any, ...]:
    """Build the dataclasses from what a parser with their flags has read, and from its --config file.

    Raises:
        ConfigError, FormatError: as `rlseq.config.parsing.yaml_file.given_settings`; or the dataclasses refuse a value.
    """
    from rlseq.config.parsing.yaml_file import given_settings

    names = {field.name for part in dataclass_types for field in dataclasses.fields(part)}
    flags = {name: value for name, value in vars(parsed).items() if name in names}
    given = given_settings(dataclass_types, flags, parsed.config)
    return tuple(
        part(**{field.name: given[field.name] for field in dataclasses.fields(part) if field.name in given})
        for part in dataclass_types
    )


def _reading(hint: Any) -> dict[str, Any]:
    """What argparse gets for a field's type."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    kinds = [member for member in members if member is not types.NoneType]
    if get_origin(kinds[0]) is list:
        element = get_args(kinds[0])[0]
        return {"nargs": "+", "type": _reader(str if str in get_args(element) else element)}
    if get_origin(kinds[0]) is Literal:
        return {"choices": list(get_args(kinds[0]))}
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
        width = max(min(shutil.get_terminal_size().columns - 2, 110), 60)
        super().__init__(prog, max_help_position=40 if width > 90 else 28, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill each paragraph; a line that is indented, a command, stays as it is."""
        parts = text.split("\n\n")
        fill = super()._fill_text
        filled = [part if part.startswith(" ") else fill(part, width, indent) for part in parts]
        return "\n\n".join(filled)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]
        if action.nargs == 0:
            return option
        kind = action.metavar or getattr(action.type, "__name__", "value")
        if action.choices is not None:
            kind = "|".join(map(str, action.choices)) if len(action.choices) <= 6 else "NAME"
        names = {"string_to_bool": "true|false", "json_mapping": "JSON", "json_or_text": "JSON", "Path": "PATH"}
        kind = names.get(kind, kind.upper() if kind in ("int", "float", "str", "value") else kind)
        return f"{option} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = getattr(action, "default_in_help", action.default)
        if action.dest == "help":
            return "Show this message and exit."
        if default in (None, argparse.SUPPRESS, dataclasses.MISSING, "", []) or action.nargs == 0:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
        return f"{action.help or ''} (default: {shown.replace('%', '%%')})"
