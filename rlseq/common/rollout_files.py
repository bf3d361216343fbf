"""The rollout log of a run as it lies on disk, read one record at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlseq.common.formats import ROLLOUTS
from rlseq.errors import RunDirectoryError


def rollout_files(run_directory: str | Path) -> list[Path]:
    """The files of a run's rollout log, in the order in which they were written.

    Raises:
        RunDirectoryError: the folder does not exist, or holds no rollouts.
    """
    run_directory = Path(run_directory)
    if not run_directory.is_dir():
        raise RunDirectoryError(f"{run_directory} is not a directory; give the --output_dir of a training run")
    files = sorted((run_directory / "rollouts").glob("*.jsonl"))
    if not files:
        raise no_rollouts(run_directory)
    return files


def no_rollouts(run_directory: Path) -> RunDirectoryError:
    """The error of a run whose log is empty or missing."""
    return RunDirectoryError(
        f"{run_directory} has no rollouts (rollouts/*.jsonl); only training runs that sampled have them"
    )


def read_records(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The records of these files; a last line that is still being written is left out.

    Raises:
        RunDirectoryError: a line is not JSON.
        FormatError: the log is of a version that cannot be read.
    """
    for path in files:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # no line break after it: a run is writing it, or was killed doing so
                    continue
                raise RunDirectoryError(
                    f"{path.name}, line {number}, is not JSON ({error.msg}); expected one rollout per line"
                ) from error
            ROLLOUTS.check(record, path)
            yield record
