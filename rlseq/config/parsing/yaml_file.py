"""Settings that were given, by flags and a YAML file, whose lines messages name; and paths of the bundled recipes."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from rlseq.common.formats import RUN_CONFIG
from rlseq.common.passwords import ADVICE, holds_password
from rlseq.config.fields import default_of
from rlseq.config.parsing.values import TypeMismatch, check_value
from rlseq.config.validation.validate import check_kind, overruled
from rlseq.errors import ConfigError, did_you_mean
from rlseq.scoring.specs.find import bundled_folder

MOST_VALUES = 100_000  # of a YAML file with its aliases written out: ten lines may stand for billions
WRITTEN = ("output_dir", "output")  # settings whose path is not read


def given_settings(
    dataclass_types: Sequence[type], flags: Mapping[str, Any], config: str | os.PathLike | None
) -> dict[str, Any]:
    """The values given for the fields of dataclasses, by name: those of flags, else those of a YAML file.

    What a file sets and a flag leaves without effect is left out.

    Raises:
        ConfigError: as `read_settings`; or a field without a default is not given, or a value is not one of its
            choices, not a number or holds a password.
        FormatError: as `read_settings`.
    """
    from_file = read_settings(find_config(config), dataclass_types) if config else {}
    for dataclass_type in dataclass_types:
        for name in overruled(dataclass_type, from_file, flags):
            del from_file[name]
    given = bundled_paths({**from_file, **flags})
    for name, value in given.items():
        if holds_password(value):
            raise ConfigError(f"--{name} holds a password or key in a URL, which the run's files would show; {ADVICE}")
    fields = [field for part in dataclass_types for field in dataclasses.fields(part) if field.init]
    missing = [f"--{f.name}" for f in fields if default_of(f) is dataclasses.MISSING and f.name not in given]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, as a flag or in the --config file.")
    for field in fields:
        check_kind(field, given.get(field.name))
    return given


def find_config(path: str | os.PathLike) -> Path:
    """A config file; one of recipes/ that the working directory lacks is the bundled one."""
    return Path(_bundled(os.fspath(path)))


def bundled_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the bundled file for each path recipes/... that the working directory lacks.

    A path may also be the PATH of NAME=PATH or of PATH:function, and stand in a list or a mapping.
    """
    return {name: value if name in WRITTEN else _in_bundle(value) for name, value in settings.items()}


def _in_bundle(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_bundle(item) for item in value]
    if isinstance(value, Mapping):
        return bundled_paths(value)
    return _bundled(value) if isinstance(value, str) else value


def _bundled(text: str) -> str:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        name, equals, rest = "", "", text
    path, colon, function = rest.partition(":")
    if Path(path).parts[:1] != ("recipes",) or os.path.exists(path):
        return text
    inside = bundled_folder("recipes").parent / path
    return f"{name}{equals}{inside}{colon}{function}" if os.path.exists(inside) else text


def read_settings(path: Path, dataclass_types: Iterable[type]) -> dict[str, Any]:
    """The values of a YAML file by name, each of the type that its field has in one of the dataclasses.

    Raises:
        ConfigError: as `read_yaml_mapping`; or a key that no dataclass has, or a value of another type.
        FormatError: a run wrote the file in a version that cannot be read.
    """
    lines, values = read_yaml_mapping(path)
    valid: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        valid |= {field.name: hints[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
    checked = {}
    for name, value in values.items():
        where = f"{path}, line {lines[name]}" if name in lines else str(path)
        if name == "env" and name not in valid:
            raise ConfigError(
                f"{where}: 'env' sets environment variables, and nothing is read from hidden environment "
                "variables. Set them in the shell that starts the run, or use the flags."
            )
        if name not in valid:
            raise ConfigError(f"{where}: unknown key {name!r}.{did_you_mean(name, valid)}")
        try:
            checked[name] = check_value(value, valid[name])
        except TypeMismatch as mismatch:
            raise ConfigError(f"{where}: {name} is {value!r}; expected {mismatch}") from None
    return checked


def read_yaml_mapping(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the line of each top-level key (from 1) and the values of a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, not a mapping, or gives a key twice.
        FormatError: a run wrote it in a version that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no config file {path}.{did_you_mean(path.name, nearby)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if _expanded_size(root, {}) > MOST_VALUES:
            raise ConfigError(f"{path}: its aliases stand for more than {MOST_VALUES:,} values, or for themselves.")
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.reason}.") from error
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply.") from None
    except (ValueError, AttributeError, TypeError) as error:  # of a value that is not what its tag says
        raise ConfigError(
            f"{path}: not valid YAML: a value is not of the type that its tag names ({error})."
        ) from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: expected lines of `name: value`, found {found}.")
    lines: dict[str, int] = {}
    for key_node, _ in root.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(f"{path}, line {line}: {key!r} is given twice (first on line {lines[key]}).")
        lines[key] = line
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not a name.")
    RUN_CONFIG.check(values, path)
    values.pop(RUN_CONFIG.key, None)
    return lines, values


def _expanded_size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Values that a node stands for with every alias written out; infinite for one that holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]
