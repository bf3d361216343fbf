"""From a spec to a function: `name`, `path/to/file.py:function`, `package.module:function` or a model id."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.specs.reward_files import describe_file, load_file

ENTRY_POINT_GROUP = "rlseq.rewards"


@dataclass(frozen=True)
class Found:
    """A reward function and where it came from.

    Attributes:
        function: the function itself.
        name: its name, as the series is called.
        address: "path.py:function" or "module:function", from which another process loads the same function;
            None for a function object that no other process can find.
        kwargs: arguments the spec implies (the model of a model id).
        source: of the file that holds it, as it was loaded: a process that starts later runs this, whatever became of
            the file. None where there is no Python file.
    """

    function: Callable
    name: str
    address: str | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: bytes | None = None


def bundled_folder(name: str = "rewards") -> Path:
    """The folder of the bundled "rewards" or "recipes": inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "bundled" / name
    return installed if installed.is_dir() else package.parent / name


def named_files(search_root: Path) -> dict[str, list[Path]]:
    """Reward files by name: `./rewards/*.py`, then the bundled ones.

    A file found twice counts once, and so does a copy of it: a checkout as working directory beside an installed
    wheel holds the bundled ones again.
    """
    files: dict[str, list[Path]] = {}
    for folder in (search_root / "rewards", bundled_folder()):
        for path in map(Path.resolve, sorted(folder.glob("[!_]*.py"))) if folder.is_dir() else ():
            if not any(_same_file(path, other) for other in files.setdefault(path.stem, [])):
                files[path.stem].append(path)
    return files


def _same_file(path: Path, other: Path) -> bool:
    return path == other or path.read_bytes() == other.read_bytes()


def entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Rewards that installed packages offer under the entry point group `rlseq.rewards`, by name.

    A name that several packages offer has several; a package found twice on sys.path counts once.
    """
    points: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.value not in [other.value for other in points.setdefault(point.name, [])]:
            points[point.name].append(point)
    return points


def find(spec: str | Callable, search_root: Path) -> Found:
    """Resolve one spec; file paths and `./rewards/` are relative to `search_root`.

    Raises:
        RewardError: when nothing is found, a name is found in two places, or a needed extra is missing.
    """
    if callable(spec):
        address = _address_of(spec)
        source = _source_of(spec.__module__) if address else None
        return Found(spec, getattr(spec, "__name__", type(spec).__name__), address, source=source)
    if match := re.fullmatch(r"(?P<path>.+\.py)(?::(?P<function>\w+))?", spec):
        return _from_file(_existing(match["path"], search_root), match["function"])
    if ":" in spec:
        return _from_module(*spec.split(":", 1))
    folder = (search_root / Path(spec).expanduser()).resolve()
    is_model = (folder / "config.json").is_file()
    files, points = named_files(search_root).get(spec, []), entry_points().get(spec, [])
    places = [str(path) for path in files] + [f"entry point {_describe_point(point)}" for point in points]
    if is_model and places:
        places.append(f"model {folder}")
    if len(places) > 1:
        raise RewardError(
            f"reward {spec!r} is found in {'two' if len(places) == 2 else len(places)} places: {' and '.join(places)}. "
            "Rename one, or say which: path/to/file.py:function, package.module:function, or the model's whole path."
        )
    if is_model:
        return _model(str(folder), search_root)
    if files:
        return _from_file(files[0], None)
    if points:
        return _from_point(points[0])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith(".") and not folder.exists():
        return _model(spec, search_root)
    if "/" in spec or folder.is_dir():
        raise RewardError(
            f"reward {spec!r} is not a model: {folder} {'has no config.json' if folder.is_dir() else 'does not exist'}."
            " Expected a folder with a saved sequence-classification model, its id on the hub (owner/name), or "
            "path/to/file.py:function."
        )
    names = sorted({*named_files(search_root), *entry_points()})
    raise RewardError(
        f"no reward is called {spec!r}.{did_you_mean(spec, names)} Expected one of {', '.join(names)}; or "
        "path/to/file.py:function; package.module:function; or a model (a folder, or owner/name)."
    )


def describe_point(point: importlib.metadata.EntryPoint) -> dict[str, Any]:
    """As `describe_file`, of a reward that a package offers; its module is not imported (the package around it is)."""
    try:
        spec: Any = importlib.util.find_spec(point.module)
        about = describe_file(Path(spec.origin), point.attr)
    except Exception:  # whatever the package does when it is looked at: it still has a name
        about = {"description": "", "range": None, "extra": None, "scope": "sample"}
    about["description"] = f"{about['description']} [{_describe_point(point)}]".lstrip()
    return about


def _describe_point(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.value} of the package {point.dist.name}" if point.dist else point.value


def _from_point(point: importlib.metadata.EntryPoint) -> Found:
    if not point.attr:
        raise RewardError(
            f"the entry point {point.name!r} of {_describe_point(point)} names no function; expected module:function."
        )
    return _from_module(point.module, point.attr, name=point.name)


def _existing(given: str, search_root: Path) -> Path:
    path = (search_root / Path(given).expanduser()).resolve()
    if path.is_file():
        return path
    near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
    raise RewardError(f"there is no file {given!r} (looked at {path}).{near}")


def _from_file(path: Path, function_name: str | None) -> Found:
    module = load_file(path)
    own = {
        name: value
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not isinstance(value, type)
    }
    if function_name is None:
        marked = {name: value for name, value in own.items() if hasattr(value, "rlseq_reward")}
        public = marked or {name: value for name, value in own.items() if not name.startswith("_")}
        if path.stem in public:
            function_name = path.stem
        elif len(public) == 1:
            function_name = next(iter(public))
        else:
            raise RewardError(
                f"{path} has {len(public)} rewards ({', '.join(public) or 'none'}); name one as {path.name}:function."
            )
    function = own.get(function_name) or getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(
            f"{path} has no function {function_name!r}.{did_you_mean(function_name, own)} It has "
            f"{', '.join(own) or 'none'}."
        )
    return Found(function, function_name, f"{path}:{function_name}", source=module.rlseq_source)


def _from_module(module_name: str, function_name: str, name: str | None = None) -> Found:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(
            f"cannot import {module_name!r} of {module_name}:{function_name}: {error}. Is its package "
            "installed in this environment? A file is given as path/to/file.py:function."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise RewardError(f"{module_name} has no function {function_name!r}.{did_you_mean(function_name, names)}")
    address = f"{module_name}:{function_name}"
    return Found(function, name or function_name, address, source=_source_of(module_name))


def _model(model: str, search_root: Path) -> Found:
    found = _from_file(bundled_folder() / "reward_model.py", "reward_model")
    return Found(found.function, model.rstrip("/").rsplit("/", 1)[-1], found.address, {"model": model}, found.source)


def _source_of(module_name: str) -> bytes | None:
    file = getattr(sys.modules.get(module_name), "__file__", None) or ""
    return Path(file).read_bytes() if file.endswith(".py") and Path(file).is_file() else None


def _address_of(function: Callable) -> str | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None) if module and name.isidentifier() else None
    return f"{module}:{name}" if found is function and module != "__main__" else None
