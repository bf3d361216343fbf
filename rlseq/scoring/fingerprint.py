"""A hash of a reward: what the cache and the signature know it by."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CellType, ModuleType
from typing import Any


def code_hash(function: Callable, depth: int = 5) -> str:
    """A hash of what decides the values of a function beside its arguments; the same in every process.

    That is the source file that defines it (helpers included), or its bytecode without one; and what it carries: a
    partial's arguments, an object's attributes and a closure's variables, as they are when it is loaded, `depth`
    levels deep.
    """
    inner, carried = function, []
    while isinstance(inner, functools.partial):
        carried += [inner.args, inner.keywords]
        inner = inner.func
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    holder = getattr(inner, "__self__", inner)
    if not inspect.isroutine(holder) and not inspect.ismodule(holder):
        carried.append(getattr(holder, "__dict__", {}))
    inner = inspect.unwrap(inner)
    carried += [cell.cell_contents for cell in getattr(inner, "__closure__", None) or () if cell != _EMPTY_CELL]
    try:
        source = Path(inspect.getsourcefile(inner if inspect.isroutine(inner) else type(inner)) or "").read_bytes()
    except (TypeError, OSError):
        code = getattr(inner, "__code__", None)
        source = (repr((code.co_code, code.co_consts, code.co_names)) if code else name).encode()
    content = _content(carried, depth) if depth else ""
    return hashlib.sha256(f"{name}\0{content}\0".encode() + source).hexdigest()[:16]


_EMPTY_CELL = CellType()


def _content(value: Any, depth: int) -> str:
    """A text that is equal for equal content, in every process (no address is in it); of arrays, their shapes."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
        return repr(value)
    kind = type(value).__qualname__
    if depth == 0 or isinstance(value, (type, ModuleType)):
        return getattr(value, "__qualname__", kind)
    if callable(value):
        return code_hash(value, depth - 1)
    if hasattr(value, "shape"):
        return f"{kind} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{kind} {[_content(item, depth - 1) for item in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{kind} {sorted(_content(item, depth - 1) for item in value)}"
    pairs = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return f"{kind} {sorted((_content(k, depth - 1), _content(v, depth - 1)) for k, v in pairs.items())}"
