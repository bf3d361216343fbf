"""Hashes of a reward and of the files it needs: what the cache and the signature know it by."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import CellType, ModuleType
from typing import Any

_WHOLE_BYTES = 2**26  # a larger file is known by its size, its head and pieces from one end to the other
_HEAD_BYTES = 2**23
_PIECES, _PIECE_BYTES = 256, 2**16
_MAY_BE_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


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
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))  # their repr is their content


def content_hash(value: Any) -> str:
    """8 digits that are equal for equal content, in every process; of images, for equal pixels."""
    return hashlib.sha256(_content(value, 100, whole=True).encode(errors="surrogatepass")).hexdigest()[:8]


def _content(value: Any, depth: int, whole: bool = False) -> str:
    """A text that is equal for equal content, in every process (no address is in it).

    Of arrays it holds their shapes, which may be weights; where `whole`, what is in them too.
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
    """Hashes of what decides a reward's values beside its own file and its arguments.

    Returns:
        By name: "module PATH", relative to the function's file, of each local module that it imports, directly or
        through others (in the standard library, an installed package or rlseq itself is none); "weights of ARGUMENT",
        of each argument that names the folder of a model.
    """
    found = {f"module {name}": file_hash(path) for name, path in sorted(_local_modules(function).items())}
    for name, value in kwargs.items():
        if isinstance(value, (str, Path)) and (Path(value).expanduser() / "config.json").is_file():
            digest = hashlib.sha256()
            for path in sorted(path for path in Path(value).expanduser().iterdir() if path.is_file()):
                digest.update(f"{path.name} {file_hash(path)}\n".encode())
            found[f"weights of {name}"] = digest.hexdigest()[:16]
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

        with suppress(ValueError):  # no hub id after all
            files = (try_to_load_from_cache(value, file) for file in ("config.json", "tokenizer_config.json"))
            if path := next((file for file in files if isinstance(file, str)), None):
                found[f"weights of {name}"] = Path(path).parent.name
    return found


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


def _local_modules(function: Callable) -> dict[str, Path]:
    """The files of local modules that a function's module imports, by their path relative to its own."""
    while isinstance(function, functools.partial):
        function = function.func
    inner = inspect.unwrap(function)
    first = sys.modules.get(getattr(inner, "__module__", None) or "")
    start = _file_of(first)
    if start is None:
        return {}
    found: dict[Path, None] = {}
    todo: list[tuple[Path, Mapping[str, Any]]] = [(start, vars(first))]
    while todo:
        path, names = todo.pop()
        if path in found:
            continue
        found[path] = None
        todo += [other for other in [*_imported(path, names), *_held(names)] if _is_local(other[0])]
    return {Path(os.path.relpath(path, start.parent)).as_posix(): path for path in found if path != start}


def _imported(path: Path, names: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The modules that a file's import statements name, those inside its functions too: their files and names."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # no Python source
        return
    package = str(names.get("__package__") or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in wanted:
            parts = name.split(".")  # importing a.b runs a/__init__.py first
            found = (_find_module(".".join(parts[:count])) for count in range(1, len(parts) + 1))
            yield from filter(None, found)


def _held(names: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The modules that a module's values are, or come from, however they were imported: their files and names."""
    for value in list(names.values()):
        if inspect.isfunction(value):
            inside: Mapping[str, Any] = value.__globals__
        else:
            module = value if isinstance(value, ModuleType) else sys.modules.get(_module_name(value))
            inside = vars(module) if module is not None else {}
        if (file := inside.get("__file__")) and Path(file).is_file():
            yield Path(file).resolve(), inside


def _module_name(value: Any) -> str:
    name = getattr(value if isinstance(value, type) else type(value), "__module__", None)
    return name if isinstance(name, str) else ""


def _find_module(name: str) -> tuple[Path, Mapping[str, Any]] | None:
    """The file and the names of a module, which is not imported for it; None where there is no file."""
    module = sys.modules.get(name)
    if module is not None:
        file = _file_of(module)
        return (file, vars(module)) if file else None
    spec = _find_spec(name)
    if spec is None or not spec.has_location or not Path(spec.origin).is_file():
        return None
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    return Path(spec.origin).resolve(), {"__package__": package}


def _find_spec(name: str) -> Any:
    """As `importlib.util.find_spec`, which would import the packages around a module."""
    parent, path = name.rpartition(".")[0], None
    if parent:
        above = sys.modules.get(parent) or _find_spec(parent)
        path = getattr(above, "__path__", None) or getattr(above, "submodule_search_locations", None)
        if path is None:
            return None
    found = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in found if spec is not None), None)


def _file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file and Path(file).is_file() else None


@functools.cache
def _elsewhere() -> tuple[Path, ...]:
    """Folders of what is installed: the standard library, packages, and rlseq itself."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return (*(Path(sysconfig.get_paths()[kind]).resolve() for kind in kinds), Path(__file__).resolve().parents[1])


def _is_local(file: Path) -> bool:
    return not any(file.is_relative_to(folder) for folder in _elsewhere()) and not (
        {"site-packages", "dist-packages"} & set(file.parts)
    )
