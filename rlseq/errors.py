"""The errors rlseq raises on purpose. Every message says what was given, what was expected, and what to do.

A recipe process that ends with an `RlseqError` prints its message alone and exits with its `exit_code`: 2 for what
was wrong from the start, 1 for what went wrong in training; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 4000  # characters of a message


class RlseqError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""

    exit_code = 2

    def __str__(self) -> str:
        text = super().__str__()  # what was given may be as long as a file
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class ConfigError(RlseqError):
    """A flag, a YAML key or a combination of settings that cannot work."""


class DataError(RlseqError):
    """A data set, file, column or row that is missing or malformed."""


class FormatError(DataError):
    """A file of rlseq's own whose format version this rlseq does not read."""


class RewardError(RlseqError):
    """A reward that cannot be found, does not fit a known form, or failed while scoring."""


class ModelError(RlseqError):
    """A model or tokenizer path that cannot be loaded or does not fit the task."""


class ConsistencyError(RlseqError):
    """Two measurements that must agree do not, so that neither can be trusted."""


class RunDirectoryError(RlseqError):
    """A run directory that is in use, already holds a run, or cannot be resumed."""


class TrainingError(RlseqError):
    """A run that started well and cannot continue: memory, disk, numbers that are not finite, a process that is lost.

    Attributes:
        on_every_rank: whether all processes raise the same error, so that one of them reports it.
    """

    exit_code = 1

    def __init__(self, message: str, *, on_every_rank: bool = False):
        super().__init__(message)
        self.on_every_rank = on_every_rank


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest valid name, or an empty string when none is near."""
    near = difflib.get_close_matches(given, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
