"""Inspect's logs: .json by themselves, .eval by inspect_ai's own reader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.other_harnesses.scores import HarnessScores, TaskScores, digest, one_file_per_task

# CORRECT, PARTIAL, INCORRECT, NOANSWER, and the words that inspect's `value_to_float` takes for them.
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


def log_files(folder: Path) -> list[Path]:
    """The logs in a folder and those below it."""
    return [path for path in sorted([*folder.rglob("*.eval"), *folder.rglob("*.json")]) if is_log(path)]


def is_log(path: Path) -> bool:
    """Whether a file is a log of inspect: by its name, or what a JSON file has first."""
    if path.suffix == ".eval":
        return True
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(200).replace(" ", "").replace("\n", "")
    return start.startswith('{"version":') and '"status":' in start and '"eval":' in start


def read_inspect(path: Path) -> HarnessScores:
    """Read a log, or a folder of them.

    Raises:
        DataError: a log is unfinished, or has no samples or scores; a task has several logs.
        ConfigError: a log is an .eval file, and inspect_ai is not installed.
    """
    logs = {file: _load(file) for file in (log_files(path) if path.is_dir() else [path])}
    files: dict[str, list[Path]] = {}
    for file, log in logs.items():
        files.setdefault(_field(log, file, "eval", "task"), []).append(file)
    return HarnessScores(
        "inspect", path, {task: _read(logs[file], file) for task, file in one_file_per_task(files, path).items()}
    )


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".eval":
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{str(path)!r} is not valid JSON ({error}); write the log again") from error
    try:
        from inspect_ai.log import read_eval_log
    except ImportError as error:
        raise ConfigError(
            f"{str(path)!r} is a log in inspect's .eval format, which inspect_ai reads: install it "
            "beside rlseq (pip install inspect_ai), or convert the log: `inspect log convert --to json --output-dir "
            "DIR LOG`"
        ) from error
    return read_eval_log(str(path)).model_dump(mode="json")


def _field(log: Mapping[str, Any], path: Path, *keys: str) -> Any:
    found: Any = log
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if found is None:
        raise DataError(f"{str(path)!r} has no {'.'.join(keys)}, which a log of inspect has; give a log of inspect_ai")
    return found


def _read(log: Mapping[str, Any], path: Path) -> TaskScores:
    if (status := _field(log, path, "status")) != "success":
        raise DataError(f"{str(path)!r} has the status {status!r}; finish the evaluation (`inspect eval-retry`) first")
    samples = log.get("samples") or []
    without = sum(1 for sample in samples if not sample.get("scores"))
    if without or not samples:
        what = f"no scores in {without:,} of {len(samples):,} samples" if samples else "no samples (--no-log-samples?)"
        raise DataError(f"{str(path)!r} has {what}; score it (`inspect score`), or evaluate again")
    found = TaskScores()
    for sample in samples:
        row, content = sample["id"], digest(sample["input"])
        if found.contents.setdefault(row, content) != content:
            raise DataError(f"{str(path)!r}: the samples of id {row!r} ask different things; give each its own id")
        for name, score in sample["scores"].items():
            for metric, value in _parts(name, score["value"]):
                found.add(metric, (row, sample["epoch"]), _number(value), path)
    return found.finish()


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A score by name; one with several values by its names."""
    if isinstance(value, Mapping):
        yield from ((f"{name}/{key}", part) for key, part in value.items())
    else:
        yield name, value


def _number(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, str):
        try:
            return (GRADES[value] if value in GRADES else GRADES.get(value.lower()) or float(value),)
        except ValueError:
            return None
    return (float(value),) if isinstance(value, bool | int | float) else None
