"""The errors rlseq raises on purpose. Every message says what was given, what was expected, and what to do.

A recipe process that ends with an `RlseqError` prints its message alone and exits 2; anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlseqError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""


class ConfigError(RlseqError):
    """A flag, a YAML key or a combination of settings that cannot work."""


class DataError(RlseqError):
    """A data set, file, column or row that is missing or malformed."""


class RewardError(RlseqError):
    """A reward that cannot be found, does not fit a known form, or failed while scoring."""


class ModelError(RlseqError):
    """A model or tokenizer path that cannot be loaded or does not fit the task."""


class ConsistencyError(RlseqError):
    """Two measurements that must agree do not, so that neither can be trusted."""


class RunDirectoryError(RlseqError):
    """A run directory that is in use, already holds a run, or cannot be resumed."""


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest valid name, or an empty string when none is near."""
    near = difflib.get_close_matches(given, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
