"""Scores that another harness wrote, row by row: what its readers give, and what two of them are compared by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlseq.errors import DataError

Repeat = tuple[Hashable, int]  # a row's id, and which of its repeats (epochs)


@dataclass
class TaskScores:
    """One task of a harness: by metric the score of each repeat of a row, a tuple where it is a sum with a count.

    Attributes:
        contents: by row a digest of what it asks, so that equal ids of different rows are noticed.
        scores: by metric and repeat.
        left_out: metrics whose scores are no numbers (lm-eval's BLEU needs all texts at once).
    """

    contents: dict[Hashable, str] = field(default_factory=dict)
    scores: dict[str, dict[Repeat, tuple[float, ...]]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def add(self, metric: str, repeat: Repeat, score: tuple[float, ...] | None, path: Path) -> None:
        """Put a score in its place; None is a score that is no number.

        Raises:
            DataError: the repeat is there twice, or the score is not finite.
        """
        if score is None:
            self.left_out.add(metric)
            return
        row, epoch = repeat
        if not all(math.isfinite(part) for part in score):
            raise DataError(f"{str(path)!r}: {metric} of row {row!r} is not finite; nothing can be compared with it")
        if repeat in self.scores.setdefault(metric, {}):
            raise DataError(
                f"{str(path)!r} holds {metric} of row {row!r} (repeat {epoch}) twice; it is of several evaluations, "
                "or was appended to. Give the file of one."
            )
        self.scores[metric][repeat] = score

    def finish(self) -> TaskScores:
        """Without metrics that are numbers in some rows only."""
        for metric in self.left_out:
            self.scores.pop(metric, None)
        return self


@dataclass(frozen=True)
class HarnessScores:
    """All that one entry of --compare names."""

    harness: str  # lm-eval or inspect
    path: Path
    tasks: dict[str, TaskScores]


def digest(content: Any) -> str:
    """A digest of a row's content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def one_file_per_task(files: dict[str, list[Path]], place: Path) -> dict[str, Path]:
    """By task its file.

    Raises:
        DataError: a task has several, of which none is meant more than another.
    """
    for task, paths in files.items():
        if len(paths) > 1:
            raise DataError(
                f"{str(place)!r} holds {len(paths)} files of the task {task!r}, {paths[0].name!r} and "
                f"{paths[1].name!r} among them; name the one to compare"
            )
    return {task: paths[0] for task, paths in files.items()}
