"""lm-eval's per-sample files: samples_TASK_TIME.jsonl, as `lm_eval --log_samples --output_path` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.errors import DataError
from rlseq.evaluation.other_harnesses.scores import HarnessScores, TaskScores, digest, one_file_per_task

PATTERN = "samples_*.jsonl"
_FILE = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl")
# Of a document these have two numbers: its log-likelihood, and its words or bytes.
WEIGHTED = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def sample_files(path: Path) -> list[Path]:
    """The per-sample files that a path names: itself, or all in a folder and the folders of its models."""
    return sorted(path.rglob(PATTERN)) if path.is_dir() else [path]


def read_lm_eval(path: Path) -> HarnessScores:
    """Read a per-sample file, or a folder of them.

    Raises:
        DataError: a line is not one of lm-eval's, or a task has several files.
    """
    files: dict[str, list[Path]] = {}
    for file in sample_files(path):
        match = _FILE.fullmatch(file.name)
        files.setdefault(match[1] if match else file.stem, []).append(file)
    return HarnessScores("lm-eval", path, {task: _read(file) for task, file in one_file_per_task(files, path).items()})


def _read(path: Path) -> TaskScores:
    found = TaskScores()
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    several = _has_several_filters(lines)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            row, metrics = record["doc_id"], record["metrics"]
            content = record.get("doc_hash") or digest(record["doc"])
            scores = {metric: record[metric] for metric in metrics}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{str(path)!r}, line {number}: not a line of lm-eval's per-sample file ({error}); write it with "
                "`lm_eval --log_samples --output_path FOLDER`"
            ) from error
        if found.contents.setdefault(row, content) != content:
            raise DataError(f"{str(path)!r}, line {number}: row {row!r} is another one before; the file is of two")
        for metric, value in scores.items():
            name = f"{metric},{record.get('filter', 'none')}" if several else metric
            found.add(name, (row, 1), _numbers(metric, value), path)
    return found.finish()


def _has_several_filters(lines: list[str]) -> bool:
    """Whether rows are scored under several filters, so that a metric's name needs that of its filter."""
    filters = set()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # said with its number where it is read
            continue
        filters |= {record.get("filter")} if isinstance(record, Mapping) else set()
    return len(filters) > 1


def _numbers(metric: str, value: Any) -> tuple[float, ...] | None:
    if isinstance(value, bool | int | float):
        return (float(value),)
    if metric in WEIGHTED and isinstance(value, list) and len(value) == 2:
        return float(value[0]), float(value[1])
    return None
