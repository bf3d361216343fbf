"""The local modules that a function's file imports, found in its source without importing them."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def local_modules(function: Callable) -> dict[str, Path]:
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
    """The file and the names of a module, without importing it; None if there is no file."""
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
    return (*(Path(sysconfig.get_paths()[kind]).resolve() for kind in kinds), Path(__file__).resolve().parents[2])


def _is_local(file: Path) -> bool:
    return not any(file.is_relative_to(folder) for folder in _elsewhere()) and not (
        {"site-packages", "dist-packages"} & set(file.parts)
    )
