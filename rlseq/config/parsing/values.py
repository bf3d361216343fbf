"""Values of settings and their types: what YAML gives is checked, what YAML can hold is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from rlseq.errors import did_you_mean

# PyYAML reads 1e-4 as text (YAML 1.1 wants 1.0e-4), and nobody means the text.
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class TypeMismatch(ValueError):
    """A value of another type than its field's; the message says what was expected."""


def check_value(value: Any, hint: Any) -> Any:
    """Return a YAML value as the type `hint` has it, or raise `TypeMismatch` with what was expected.

    Accepted beyond the exact type: an int for a float, `1e-4` (text to YAML) for a float, one element for a
    list, and false for a choice named "no" (which YAML reads as false). A field typed `SomeEnum | str` takes
    the values of the enum alone, as its flag does.
    """
    if hint is Any:
        return value
    members = _members(hint)
    for exact in (True, False):
        for member in members:
            converted = _convert(value, member, exact=exact)
            if converted is not _NO:
                return converted
    raise TypeMismatch(_expected(value, members))


_NO = object()


def _members(hint: Any) -> list[Any]:
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(_is_enum(member) for member in members):
        members = [member for member in members if member is not str]
    return members


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _choices(hint: Any) -> list[Any] | None:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [member.value for member in hint] if _is_enum(hint) else None


def _convert(value: Any, hint: Any, *, exact: bool) -> Any:
    """Return the value as one member of a union has it, or `_NO`."""
    origin, choices = get_origin(hint) or hint, _choices(hint)
    if choices is not None:
        if value is False and not exact and "no" in choices:
            return "no"
        return value if any(value == choice and type(value) is type(choice) for choice in choices) else _NO
    if origin is types.NoneType:
        return value if value is None else _NO
    if origin in (bool, int, str):
        return value if type(value) is origin else _NO
    if origin is float:
        if type(value) is float:
            return value
        number = type(value) is int or (type(value) is str and _SCIENTIFIC.fullmatch(value))
        return float(value) if number and not exact else _NO
    if origin is dict:
        return _convert_dict(value, hint) if isinstance(value, Mapping) else _NO
    if origin is list:
        return _convert_list(value, hint, exact=exact)
    if origin is Path:
        return Path(value) if type(value) is str else _NO
    return _NO


def _convert_dict(value: Mapping, hint: Any) -> Any:
    key_type, value_type = get_args(hint) or (Any, Any)
    try:
        return {check_value(k, key_type): check_value(v, value_type) for k, v in value.items()}
    except TypeMismatch:
        return _NO


def _convert_list(value: Any, hint: Any, *, exact: bool) -> Any:
    if not isinstance(value, list):
        if exact or value is None:
            return _NO
        value = [value]
    element_type = (get_args(hint) or (Any,))[0]
    try:
        checked = [check_value(element, element_type) for element in value]
    except TypeMismatch:
        return _NO
    # A flag makes members of an enum in a list, and their values outside of one.
    return [element_type(element) for element in checked] if _is_enum(element_type) else checked


def describe_choices(given: Any, choices: Iterable[Any]) -> str:
    """Return `"one of 'a', 'b'. Did you mean 'a'?"`, without the list where it is long and one is near."""
    choices = [choice for choice in choices if choice is not None]
    nearest = did_you_mean(str(given), [str(choice) for choice in choices])
    if nearest and len(choices) > 12:
        return f"one of {len(choices)} names.{nearest}"
    return f"one of {', '.join(repr(choice) for choice in choices)}.{nearest}"


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
    Path: "a path",
    Any: "anything",
}


def _name(hint: Any) -> str | None:
    """The type in words; None for one that YAML cannot give."""
    choices = _choices(hint)
    if choices is not None:
        return f"one of {', '.join(repr(choice) for choice in choices)}"
    origin, args = get_origin(hint), get_args(hint)
    if origin is list and args:
        elements = [name for member in _members(args[0]) if (name := _name(member))]
        return f"a list of: {' or '.join(elements)}"
    if origin is dict and args and args[1] is not Any:
        return f"a mapping to {_name(args[1])}"
    return _NAMES.get(origin or hint)


def _expected(value: Any, members: list[Any]) -> str:
    for member in members:
        choices = _choices(member)
        if choices is not None:
            return describe_choices(value, choices)
    text = " or ".join(dict.fromkeys(name for member in members if (name := _name(member)))) + "."
    if str in members and isinstance(value, bool | int | float):
        text += " Put it in quotes: YAML reads yes, no, on, off and numbers as other types than text."
    return text


def flag_type(hint: Any) -> Any:
    """Return the type that a flag for this field has: the field's own, or a simpler one that argparse knows.

    A list of texts or mappings is given as texts, a mapping as JSON.
    """
    members = _members(hint)
    inner = [member for member in members if member is not types.NoneType]
    origins = [get_origin(member) or member for member in inner]
    if origins == [dict]:
        return json_mapping
    if set(origins) == {dict, str}:
        return json_or_text
    if origins == [list] and str in get_args((get_args(inner[0]) or (str,))[0]):
        return list[str] | None if types.NoneType in members else list[str]
    return hint


def json_mapping(text: str) -> dict[str, Any] | None:
    """Read a mapping from the text of a flag (JSON); `none` and `null` give None.

    Raises:
        argparse.ArgumentTypeError: the text is not JSON, or not a mapping.
    """
    value = json_or_text(text)
    if isinstance(value, str):
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a mapping in JSON.")
    return value


def json_or_text(text: str) -> dict[str, Any] | str | None:
    """Read a mapping from a text that starts with a brace (JSON); another text, such as a path, stays.

    Raises:
        argparse.ArgumentTypeError: the text starts with a brace and is not JSON.
    """
    if text.lower() in ("none", "null"):
        return None
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"given {text!r}, which is not JSON: {error}.") from error


def plain(value: Any) -> Any:
    """Return the value in the types YAML has; enums by value, dataclasses and config objects as mappings.

    Raises:
        TypeError: for an object that has no such form.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, set | frozenset):  # of a YAML file with `!!set`
        return [plain(element) for element in sorted(value, key=str)]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, str | int | float):  # a subclass, such as a NumPy float
        return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))
    raise TypeError(f"{value!r} ({type(value).__name__}) has no form in YAML.")
