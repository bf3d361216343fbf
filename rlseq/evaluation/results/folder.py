"""The folder of an evaluation: claimed by one at a time, and what is said where it cannot be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from rlseq.common.disk import WRITE_ERRNOS, write_error_message
from rlseq.errors import ConfigError

_LOCK = ".evaluating"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and keep it from other evaluations meanwhile; called by all processes of one.

    Raises:
        ConfigError: another evaluation writes there, or it cannot be written (in every process).
    """
    lock, refused = FileLock(folder / _LOCK, timeout=0), None
    if PartialState().is_main_process:
        refused = _refusal(folder, lock)
    (refused,) = broadcast_object_list([refused])
    if refused is not None:
        raise ConfigError(refused)
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        raise ConfigError(
            write_error_message(
                Path(error.filename or folder),
                error,
                "Make room, or change --output_dir; in the same one the same command resumes from what is finished.",
            )
        ) from error
    finally:
        lock.release()


def _refusal(folder: Path, lock: FileLock) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make {str(folder)!r}: {error.strerror or error}. Give another --output_dir."
    try:
        lock.acquire()
    except Timeout:
        return (
            f"another evaluation is writing into {str(folder)!r}: each would replace the other's files. Wait for it to "
            "end, or give another --output_dir."
        )
    except OSError as error:
        return write_error_message(folder, error)
    return None
