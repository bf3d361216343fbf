"""Hashes of a reward and of the files it needs: what identifies it in the cache and in results."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import CellType, ModuleType
from typing import Any

from rlseq.scoring.specs.local_modules import local_modules

_WHOLE_BYTES = 2**26  # a larger file is known by its size, its head and pieces from one end to the other
_HEAD_BYTES = 2**23
_PIECES, _PIECE_BYTES = 256, 2**16
_MAY_BE_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def code_hash(function: Callable, depth: int = 5) -> str:
    """A hash of what decides the values of a function besides its arguments; the same in every process.

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
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))  # their repr is their content


def content_hash(value: Any) -> str:
    """8 digits that are equal for equal content, in every process; of images, for equal pixels."""
    return hashlib.sha256(_content(value, 100, whole=True).encode(errors="surrogatepass")).hexdigest()[:8]


def _content(value: Any, depth: int, whole: bool = False) -> str:
    """A text that is equal for equal content, in every process (no address is in it).

    Arrays count by their shape, because they may be weights; with `whole`, by their content.
    """
    if type(value) in _PLAIN or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
        return repr(value)
    kind = type(value).__qualname__
    if depth == 0 or isinstance(value, (type, ModuleType)):
        return getattr(value, "__qualname__", kind)
    if callable(value):
        return code_hash(value, depth - 1)

    def inner(item: Any) -> str:
        return repr(item) if type(item) in _PLAIN else _content(item, depth - 1, whole)

    if hasattr(value, "shape"):
        return f"{kind} {tuple(value.shape)} {_array_content(value, inner) if whole else ''}"
    if isinstance(value, (list, tuple)):
        return f"{kind} {[*map(repr if _PLAIN.issuperset(map(type, value)) else inner, value)]}"
    if isinstance(value, (set, frozenset)):
        return f"{kind} {sorted(map(inner, value))}"
    if all(hasattr(value, name) for name in ("mode", "size", "tobytes", "getpalette")):  # of PIL, read already or not
        return f"image {value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()} {value.getpalette()}"
    if not isinstance(value, Mapping) and not hasattr(value, "__dict__"):  # a date, a decimal number
        text = repr(value)
        return kind if " at 0x" in text else f"{kind} {text}"
    pairs = value if isinstance(value, Mapping) else vars(value)
    return f"{kind} {sorted((inner(k), inner(v)) for k, v in pairs.items())}"


def _array_content(value: Any, inner: Callable[[Any], str]) -> str:
    kind = str(getattr(value, "dtype", ""))
    if hasattr(value, "tobytes") and kind != "object":
        return f"{kind} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return f"{kind} {inner(value.tolist()) if hasattr(value, 'tolist') else value!r}"


def needed_files(function: Callable, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what decides a reward's values besides its own file and its arguments.

    Returns:
        By name: "module PATH", relative to the function's file, of each local module that it imports, directly or
        through others (not of the standard library, an installed package or rlseq); "weights of ARGUMENT",
        of each argument that names the folder of a model.
    """
    found = {f"module {name}": file_hash(path) for name, path in sorted(local_modules(function).items())}
    for name, value in kwargs.items():
        if isinstance(value, (str, Path)) and (Path(value).expanduser() / "config.json").is_file():
            found[f"weights of {name}"] = folder_hash(Path(value).expanduser())
    return found


def hub_commits(kwargs: Mapping[str, Any]) -> dict[str, str]:
    """By name ("weights of ARGUMENT") the commit in the hub's cache of each argument that is a hub id.

    A model that has not been downloaded yet, which its first use does, has none.
    """
    found = {}
    for name, value in kwargs.items():
        if not isinstance(value, str) or not _MAY_BE_HUB_ID.fullmatch(value) or Path(value).exists():
            continue
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # not a hub id after all
            files = (try_to_load_from_cache(value, file) for file in ("config.json", "tokenizer_config.json"))
            if path := next((file for file in files if isinstance(file, str)), None):
                found[f"weights of {name}"] = Path(path).parent.name
    return found


def folder_hash(folder: Path, *, times: bool = False) -> str:
    """A hash of a folder's files (`file_hash`) and their names; with `times`, also of their modification times."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        changed = f" {path.stat().st_mtime_ns}" if times else ""
        digest.update(f"{path.name} {file_hash(path)}{changed}\n".encode())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """A hash of a file's content. Of one over 64 MiB: its size, its first 8 MiB and 256 pieces of 64 KiB, evenly."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_HEAD_BYTES))
            for piece in range(_PIECES):
                file.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]
