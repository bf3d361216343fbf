"""Copies of a reward's arguments: a reward that changes them changes nothing elsewhere."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

IMMUTABLE = frozenset((str, int, float, bool, complex, bytes, type(None)))
# their objects can be changed in place: arrays, tensors, images, frames, deques, sets
CHANGEABLE = frozenset(("builtins", "collections", "numpy", "torch", "PIL", "pandas"))


def as_messages(turns: Any) -> Any:
    """Chat messages as TRL hands them over, a list of dicts; text, and what holds other things, as it is."""
    if isinstance(turns, (list, tuple)):
        return [dict(turn) if isinstance(turn, Mapping) else turn for turn in turns]
    return turns


def fresh(value: Any) -> Any:
    """A copy of data, nested data included. What cannot be changed in place is not copied, and neither are objects
    that are not data (a client, a tokenizer).
    """
    kind = type(value)
    if kind in IMMUTABLE:
        return value
    if kind is list:
        return value[:] if IMMUTABLE.issuperset(map(type, value)) else [fresh(item) for item in value]
    if kind is dict:
        return {key: fresh(item) for key, item in value.items()}
    if kind is tuple:
        return value if IMMUTABLE.issuperset(map(type, value)) else tuple(map(fresh, value))
    if dataclasses.is_dataclass(value) or isinstance(value, (Mapping, list, tuple, set, bytearray)):
        return _deep(value)
    return _deep(value) if kind.__module__.partition(".")[0] in CHANGEABLE and not callable(value) else value


def as_returned(raw: Any) -> Any:
    """A copy of what a reward returned, because its next call may change that list or dict and return it again."""
    try:
        return fresh(raw) if type(raw) in (dict, list, tuple) else raw
    except RecursionError:  # it contains itself; `snapshot` cuts details off at a depth
        return raw


def _deep(value: Any) -> Any:
    if hasattr(value, "detach"):  # a tensor: only those that no graph made can be copied deeply
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # an object that cannot be copied is handed over as it is
        return value
