"""Reward files: imported by their location, or described without being imported.

A file is a module under a private name; `sys.path` is never edited.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing.process import current_process
from pathlib import Path
from types import ModuleType
from typing import Any

from rlseq.errors import RewardError


def load_address(address: str, source: bytes | None = None) -> Callable:
    """Load a function from `Found.address`, of the given source in place of its file's; what a worker process does."""
    place, function = address.rsplit(":", 1)
    if place.endswith(".py"):
        module = load_file(Path(place), source)
    else:
        module = importlib.import_module(place) if source is None else _import_from(place, source)
    return getattr(module, function)


def _import_from(name: str, source: bytes) -> ModuleType:
    """Import a module whose file may have been edited, or be gone, since `source` was read from it."""
    spec: Any = importlib.util.find_spec(name)  # imports the packages around it
    if spec is None or not spec.origin:
        raise RewardError(f"the module {name!r} is not there any more")
    file = Path(spec.origin)
    if file.is_file() and file.read_bytes() == source:
        return importlib.import_module(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source, spec.origin, "exec"), vars(module))
    return module


def load_file(path: Path, source: bytes | None = None) -> ModuleType:
    """Import a file by its location; an unchanged file is imported once, a changed one afresh.

    Args:
        path: the file; it need not be there where its source is given.
        source: what to run in place of what the file holds now.

    Raises:
        RewardError: when importing it fails; names the extra to install where the file declares one.
    """
    source = path.read_bytes() if source is None else source
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:12]
    name = f"_rlseq_reward_{path.stem}_{digest}"
    _files.add({name: (path, source)})
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise RewardError(_import_advice(path, error)) from error
    except Exception as error:
        raise RewardError(f"{path} fails when imported: {type(error).__name__}: {error}") from error
    module.rlseq_source = source  # type: ignore[attr-defined]  # modules take any attribute
    return module


class _Files:
    """Imports the files that were loaded here, by their private names.

    Processes that multiprocessing starts look for what they are sent by the name of its module. They receive this
    with multiprocessing's own settings, which reach them before that: without it, a pool of a reward file would start
    processes for ever, none of which finds the function it is to call.
    """

    def __init__(self) -> None:
        self.held: dict[str, tuple[Path, bytes]] = {}

    def add(self, files: dict[str, tuple[Path, bytes]]) -> None:
        """Make files importable, here and in processes that this one starts."""
        self.held |= files
        if self not in sys.meta_path:
            sys.meta_path.append(self)
        current_process()._config["rlseq"] = self  # type: ignore[attr-defined]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As an entry of `sys.meta_path` is asked."""
        if name not in self.held:
            return None
        path, source = self.held[name]
        return importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path), source))

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_files, (self.held,)


class _Source(SourceFileLoader):
    """Runs a source that was read before: not a .pyc, which can be older, and not what the file holds now."""

    def __init__(self, name: str, path: str, source: bytes):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")


_files = _Files()


def _take_files(held: dict[str, tuple[Path, bytes]]) -> _Files:
    _files.add(held)
    return _files


def _import_advice(path: Path, error: ImportError) -> str:
    extra = describe_file(path)["extra"]
    if extra:
        return f"reward {path.stem!r} needs the extra {extra!r}: pip install 'rlseq[{extra}]' ({error})"
    sibling = path.parent / f"{(error.name or '').split('.')[0]}.py"
    if error.name and sibling.is_file():
        return (
            f"{path} imports {error.name!r}, which is in the same folder; files are loaded by location and sys.path is "
            "not edited. Put the helper in the same file, or install both as a package."
        )
    return f"{path} fails when imported: {error}. Install what it needs into this environment."


def describe_file(path: Path, function: str | None = None) -> dict[str, Any]:
    """Read from a reward file, without importing it: its `@reward` arguments and its docstring's first
    line.

    Returns:
        {"description", "range", "extra", "scope"} of the function named, or without one of the reward that the
        file is named after, or else of its first.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    marked = [node for node in functions if any(_decorator_name(d) == "reward" for d in node.decorator_list)]
    if function is None:
        offered = marked or functions
        node = next((n for n in offered if n.name == path.stem), offered[0] if offered else None)
    else:
        node = next((n for n in functions if n.name == function), None)
    about: dict[str, Any] = {"description": "", "range": None, "extra": None, "scope": "sample"}
    if node is None:
        return about
    docstrings = [ast.get_docstring(tree), ast.get_docstring(node)]
    docstring = next(filter(None, docstrings[::-1] if function else docstrings), "")
    about["description"] = docstring.strip().split("\n")[0]
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and _decorator_name(decorator) == "reward":
            for keyword in decorator.keywords:
                if keyword.arg in about:
                    about[keyword.arg] = _literal(keyword.value)
    return about


def _decorator_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _literal(node: ast.expr) -> Any:
    """A decorator's argument; `float("inf")` and its negative among them."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return tuple(map(_literal, node.elts)) if isinstance(node, ast.Tuple) else _number(ast.unparse(node))


def _number(text: str) -> Any:
    match = re.fullmatch(r"(-?)(?:math\.inf|inf|float\(['\"]inf['\"]\))", text)
    return float(f"{match[1]}inf") if match else text
