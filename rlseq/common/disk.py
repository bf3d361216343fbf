"""Free space, and error messages for disks that are full or cannot be written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

# Errors that only a write raises; other errors of the system may come from a read.
WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_error_message(path: Path, error: BaseException, then: str = "") -> str:
    """The message for a failed write: the path, the reason, how much is free there, and what to do (`then`)."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot write {path}: {reason} ({free_space(path)}). {then or 'Make room, or change --output_dir.'}"


def free_space(path: Path) -> str:
    """Return how much the file system of a path, which need not exist, has left: `"1.23 GB of 64 GB free"`."""
    nearest = next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path.cwd())
    usage = shutil.disk_usage(nearest)
    return f"{readable_size(usage.free)} of {readable_size(usage.total)} free"


def readable_size(size: float) -> str:
    """A number of bytes with three digits, in kB, MB or GB."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:,.0f} {unit}" if size >= 1000 * least else f"{size / least:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
