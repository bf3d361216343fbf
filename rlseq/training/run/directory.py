"""The run directory: claimed by one run at a time, never overwritten unasked, continued without duplicates.

config.yaml  metrics.jsonl  rollouts/*.jsonl  rollouts.html  audit.json  checkpoint-N/  evaluation/  curves.png
reloaded.json
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rlseq.common.formats import METRICS, ROLLOUTS
from rlseq.config.parsing.yaml_file import read_yaml_mapping
from rlseq.errors import ConfigError, RunDirectoryError
from rlseq.training.run.checkpoints import (
    check_format,
    checkpoint_step,
    newest_whole_checkpoint,
    require_whole,
    restore_earlier,
)
from rlseq.training.run.records import append_jsonl, first_record, trim_jsonl, write_json_atomic

__all__ = ["RunDirectory", "append_jsonl", "holds_run", "prepare", "write_json_atomic"]

logger = logging.getLogger(__name__)

_CONTINUE_OR_REPLACE = (
    "Continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir true "
    "(the earlier run is moved aside, not deleted)"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run, and its claim on them while the process lives.

    Attributes:
        path: the directory.
        resume_from: the checkpoint to resume from, or None for a new run.
        moved_to: where an earlier run was moved, or None.
    """

    path: Path
    resume_from: Path | None = None
    moved_to: Path | None = None
    _lock: FileLock | None = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def reloaded(self) -> Path:
        return self.path / "reloaded.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def release(self) -> None:
        """Give up the claim, as the end of the process does."""
        if self._lock is not None:
            self._lock.release()


def prepare(
    output_dir: str | os.PathLike, *, resume: str | bool | None, overwrite: bool, main_process: bool
) -> RunDirectory:
    """Claim a directory for a run that starts, or resumes from a checkpoint.

    Args:
        output_dir: the directory; made if missing.
        resume: None for a new run; "latest" (or True, "true") for the newest whole checkpoint in the
            directory; else the path of a checkpoint, or its name in the directory. What was logged after that
            checkpoint's step is dropped from metrics.jsonl and rollouts/, and checkpoints of later steps are
            renamed, so that nothing appears twice. Second saves of a step that were killed are undone before.
        overwrite: move an earlier run to `NAME.previous-DATE-TIME` beside it and start again.
        main_process: only the main process claims, moves and trims; others get the same paths, once it has,
            and touch nothing.

    Raises:
        RunDirectoryError: the directory holds a run and neither flag was given, or both were; another run is
            using it; it cannot be written; or there is no complete checkpoint to resume from.
        FormatError: what the run wrote is of a version that this rlseq cannot resume.
    """
    path = _absolute(output_dir)
    wanted = None if resume in (None, False, "", "false", "False", "none") else resume
    if wanted and overwrite:
        raise RunDirectoryError(
            "--resume_from_checkpoint continues a run, --overwrite_output_dir replaces it: give one of them."
        )
    resume_from = None if wanted is None else _checkpoint_to_resume(path, wanted, warn=False)
    if resume_from is not None:
        _check_formats(path, resume_from)
    if not main_process:
        return RunDirectory(path, resume_from)
    lock = _claim(path)
    try:
        moved_to = None
        if resume_from is not None:
            _check_belongs(path, resume_from)
            restore_earlier(path)
            resume_from = _checkpoint_to_resume(path, wanted, warn=True)
            _drop_after(path, checkpoint_step(resume_from))
        elif holds_run(path):
            _check_replaceable(path, overwrite)
            moved_to = _move_aside(path)
            lock.release()
            lock = _claim(path)
    except BaseException:
        lock.release()
        raise
    return RunDirectory(path, resume_from, moved_to, lock)


def check_available(output_dir: str | os.PathLike, *, resume: str | bool | None, overwrite: bool) -> Path | None:
    """Refuse what `prepare` would refuse, as far as that shows without claiming, moving or writing anything.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        RunDirectoryError, FormatError: as `prepare`.
    """
    path = _absolute(output_dir)
    resume_from = prepare(path, resume=resume, overwrite=overwrite, main_process=False).resume_from
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise RunDirectoryError(f"{nearest} is a file; --output_dir names a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"Cannot write into {nearest}. Make it writable, or change --output_dir.")
    if (path / ".lock").exists():
        with (path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                raise RunDirectoryError(_in_use(path)) from None
    if resume_from is not None:
        _check_belongs(path, resume_from)
    elif holds_run(path):
        _check_replaceable(path, overwrite)
    return resume_from


def _absolute(output_dir: str | os.PathLike) -> Path:
    if not str(output_dir).strip():
        raise RunDirectoryError("--output_dir is empty; name a directory for the run (is a shell variable unset?).")
    return Path(os.path.expanduser(output_dir)).absolute()


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise RunDirectoryError(f"{path} already holds a run. {_CONTINUE_OR_REPLACE}.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise RunDirectoryError(f"{path} holds the working directory, and will not be moved. Run from outside it.")


def _in_use(path: Path) -> str:
    return f"{path} is in use by another run. Wait for it to end, or give another --output_dir."


def holds_run(path: Path) -> bool:
    """Whether a directory holds what a run writes: a configuration, metrics, rollouts or checkpoints."""
    if not path.is_dir():
        return False
    files = (path / "config.yaml", path / "metrics.jsonl", path / "rollouts")
    return any(file.exists() for file in files) or any(_CHECKPOINT.fullmatch(p.name) for p in path.iterdir())


def _claim(path: Path) -> FileLock:
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunDirectoryError(_in_use(path)) from None
    except FileExistsError:
        raise RunDirectoryError(f"{path} is a file; --output_dir names a directory.") from None
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write into {path}: {error.strerror or error}. Make it writable, or change --output_dir."
        ) from error
    return lock


def _move_aside(path: Path) -> Path:
    stem = f"{path.name}.previous-{datetime.now():%Y%m%d-%H%M%S}"
    target = path.with_name(stem)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{stem}-{number}")
    try:
        path.rename(target)
    except OSError as error:
        raise RunDirectoryError(f"Cannot move the run in {path} to {target}: {error.strerror}.") from error
    logger.warning("The earlier run was moved to %s", target)
    return target


def _checkpoint_to_resume(path: Path, wanted: str | bool, *, warn: bool) -> Path:
    if wanted in (True, "latest", "true", "True"):
        checkpoint, incomplete = newest_whole_checkpoint(path)
        for reason in incomplete if warn else ():
            logger.warning("Skipping a checkpoint that was not written to its end: %s", reason)
        if checkpoint is None:
            found = f" ({'; '.join(incomplete)})" if incomplete else ""
            raise RunDirectoryError(
                f"There is no whole checkpoint in {path}{found}. Leave out --resume_from_checkpoint to start "
                "again, with --overwrite_output_dir true if the directory holds a run."
            )
        return checkpoint
    given = Path(os.path.expanduser(str(wanted)))
    checkpoint = given if given.exists() else path / given
    return require_whole(checkpoint.absolute())


def _check_belongs(path: Path, checkpoint: Path) -> None:
    """A checkpoint of another run may start a new directory, not resume in one that holds a run."""
    if checkpoint.parent.resolve() != path.resolve() and holds_run(path):
        raise RunDirectoryError(
            f"{checkpoint} is no checkpoint of the run in {path}. Give another --output_dir to resume from it."
        )


def _check_formats(path: Path, checkpoint: Path) -> None:
    """Refuse what the run that resumes would add to and could not read; a run is of one version from its start."""
    check_format(checkpoint)
    with suppress(ConfigError):  # it is gone, or was edited
        read_yaml_mapping(path / "config.yaml")
    METRICS.check(first_record(path / "metrics.jsonl"), path / "metrics.jsonl")
    for file in sorted((path / "rollouts").glob("*.jsonl"))[:1]:
        ROLLOUTS.check(first_record(file), file)


def _drop_after(path: Path, step: int) -> None:
    """Remove what the run did after `step`: it will do it again. A checkpoint is renamed, not removed."""
    trim_jsonl(path / "metrics.jsonl", step)
    for file in sorted((path / "rollouts").glob("**/*.jsonl")):
        trim_jsonl(file, step)
    for later in path.iterdir():
        if _CHECKPOINT.fullmatch(later.name) and int(later.name.split("-")[1]) > step:
            target = later.with_name(f"superseded-{later.name}-{datetime.now():%Y%m%d-%H%M%S}")
            later.rename(target)
            logger.warning("%s is later than the checkpoint to resume from: renamed to %s", later, target.name)
