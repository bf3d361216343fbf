"""The YAML file of a run: read with line numbers, written so that reading it again repeats the run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from rlseq.config.batch_sizes import batch_advice
from rlseq.config.values import describe_choices, plain
from rlseq.errors import ConfigError, RlseqError, did_you_mean
from rlseq.scoring.find import bundled_folder

MOST_VALUES = 100_000  # of a YAML file with its aliases written out: ten lines may stand for billions
# Orders to one process, and secrets: a file that repeats the run must hold neither.
_NOT_WRITTEN = ("resume_from_checkpoint", "overwrite_output_dir", "resume_with_changes", "dry_run", "hub_token")


def find_config(path: str | os.PathLike) -> Path:
    """A config file; one of recipes/ that the working directory lacks is the bundled one."""
    return Path(_bundled(os.fspath(path)))


def beside_config(value: Any, config: Path) -> Any:
    """A value of a config file; the bundled ones name what lies beside them as recipes/..., which holds anywhere."""
    if not config.resolve().is_relative_to(bundled_folder("recipes").resolve()):
        return value
    if isinstance(value, list):
        return [beside_config(item, config) for item in value]
    return _bundled(value) if isinstance(value, str) else value


def _bundled(text: str) -> str:
    path, colon, function = text.partition(":")  # path/to/file.py:function
    inside = bundled_folder("recipes").parent / path
    lacking = Path(path).parts[:1] == ("recipes",) and not os.path.exists(path) and os.path.exists(inside)
    return f"{inside}{colon}{function}" if lacking else text


def read_yaml_mapping(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the line of each top-level key (from 1) and the values of a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, not a mapping, or gives a key twice.
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


def construct(dataclass_type: type, given: dict[str, Any]) -> Any:
    """Build the dataclass from the values given by name; its other fields keep their defaults.

    What was given is remembered for `resolved_values`: `__post_init__` fills in fields that may not be given.

    Raises:
        ConfigError: the dataclass refuses the values.
    """
    fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    kwargs = {field.name: given[field.name] for field in fields if field.name in given}
    as_given = {field.name: plain(kwargs.get(field.name, _default(field))) for field in fields}
    for field in fields:
        _check_given(field, kwargs.get(field.name))
    try:
        instance = dataclass_type(**kwargs)
    except RlseqError:
        raise
    except Exception as error:  # TRL's and transformers' dataclasses refuse values by errors of many kinds
        advice = ""
        if "divisible" in str(error) and "num_generations" in as_given:
            advice = batch_advice(as_given, processes=PartialState().num_processes)
        raise ConfigError(f"{' '.join(str(error).split())}{advice}") from error
    after_init = {field.name: plain(getattr(instance, field.name)) for field in fields}
    object.__setattr__(instance, "_parsed", (as_given, after_init))  # a frozen dataclass too
    return instance


def _check_given(field: dataclasses.Field, value: Any) -> None:
    choices = field.metadata.get("choices")
    if value is not None and choices and value not in choices:
        raise ConfigError(f"{field.name} is {value!r}; expected {describe_choices(value, choices)}")
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, float) and math.isnan(number) for number in numbers):
        raise ConfigError(f"{field.name} is {value}; expected a number")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def resolved_values(*configs: Any) -> dict[str, Any]:
    """Return every setting of parsed dataclasses by name, in plain YAML values; reading them repeats the run.

    A field has the value it was given, or its default. What `__post_init__` derived from others (the
    generation batch size of GRPO, say) is derived again on reading: it may not be given beside what it comes
    from. A field that was changed after parsing has its present value. Secrets and orders to one process are
    left out.
    """
    values: dict[str, Any] = {}
    for config in configs:
        now = _present_values(config)
        if hasattr(config, "_parsed"):
            as_given, after_init = config._parsed
            now = {n: as_given[n] if value == after_init[n] else value for n, value in now.items()}
        elif now.get("steps_per_generation") is not None and "generation_batch_size" in now:
            now["generation_batch_size"] = None  # GRPOConfig fills in both and refuses to be given both
        values.update(now)
    return values


def write_config(path: str | os.PathLike, *configs: Any) -> None:
    """Write `resolved_values` to a YAML file that `--config` reads back.

    A value that this machine or other settings decided is left open, with what it came to in a comment.
    """
    lines = ["# Every setting of this run; `--config` with this file repeats it."]
    for config in configs:
        lines += ["", f"# {type(config).__name__}"]
        present = _present_values(config)
        for name, value in resolved_values(config).items():
            line = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=10**6).rstrip("\n")
            if present[name] != value and "\n" not in line:
                line += f"  # here: {json.dumps(present[name], ensure_ascii=False)}"
            lines.append(line)
    temporary = Path(f"{path}.tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


def changed_values(path: Path, *configs: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> (before, now) of the settings that are not those of a config.yaml that `write_config` wrote."""
    _, had = read_yaml_mapping(path)
    has = {name: value for config in configs for name, value in resolved_values(config).items()}
    return {name: (had[name], has[name]) for name in has if name in had and had[name] != has[name]}


def _present_values(config: Any) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(config) if field.init and field.name not in _NOT_WRITTEN]
    return {field.name: plain(getattr(config, field.name)) for field in fields}
