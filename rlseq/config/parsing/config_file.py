"""Settings made of what was given, and written to a YAML file so that reading it again repeats the run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from rlseq.common.formats import RUN_CONFIG
from rlseq.config.parsing.values import plain
from rlseq.config.parsing.yaml_file import read_yaml_mapping
from rlseq.config.validation.batch_sizes import batch_advice
from rlseq.errors import ConfigError, RlseqError

# Orders to one process, and secrets: a file that repeats the run must hold neither.
_NOT_WRITTEN = ("resume_from_checkpoint", "overwrite_output_dir", "resume_with_changes", "dry_run", "hub_token")


def construct(dataclass_type: type, given: dict[str, Any]) -> Any:
    """Build the dataclass from the values given by name; its other fields keep their defaults.

    What was given is remembered for `resolved_values`: `__post_init__` fills in fields that may not be given.

    Raises:
        ConfigError: the dataclass refuses the values.
    """
    fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    kwargs = {field.name: given[field.name] for field in fields if field.name in given}
    as_given = {field.name: plain(kwargs.get(field.name, _default(field))) for field in fields}
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
    lines += [f"{RUN_CONFIG.key}: {RUN_CONFIG.version}"]
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
