"""Which checkpoints were written to their end, on the disk too, and can be gone on from."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlseq.common.formats import CHECKPOINT
from rlseq.errors import RunDirectoryError, did_you_mean

logger = logging.getLogger(__name__)

RESUME_STATE = "resume_state"  # the folder of a checkpoint that rlseq writes beside the files of transformers
_FORMAT_FILE = "format.json"
_NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.earlier")


def earlier_of(checkpoint: Path) -> Path:
    """Return where a checkpoint waits while the same step is saved a second time."""
    return checkpoint.with_name(f".{checkpoint.name}.earlier")


@contextlib.contextmanager
def through_to_disk(state: Any, checkpoint: Path, *, wait: Callable[[], None]) -> Iterator[None]:
    """Let the mark of a whole checkpoint, which the body writes, hold after a loss of power too.

    The kernel writes files to the disk in an order of its own. So all of the checkpoint's files and folders are
    flushed (fsync) before trainer_state.json is written, and that itself before older ones are deleted.

    Args:
        state: the trainer's; the body calls its `save_to_json` once every rank's files are written.
        checkpoint: the folder that the body writes.
        wait: returns once every process has written its files; the others call it after their last.
    """
    write = state.save_to_json

    def save_to_json(json_path: str) -> None:
        wait()
        for path in (*checkpoint.rglob("*"), checkpoint):
            flush(path)
        write(json_path)
        for path in (Path(json_path), checkpoint, checkpoint.parent):
            flush(path)

    state.save_to_json = save_to_json
    try:
        yield
    finally:
        del state.save_to_json


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before returning (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that flush no folders
            raise
    finally:
        os.close(descriptor)


def restore_earlier(run: Path) -> None:
    """Undo second saves of a step that were killed: the first comes back, unless the second is whole.

    Only for the process that has claimed the run: in a run that lives, a second save may be under way.
    """
    for earlier in list(run.glob(".checkpoint-*.earlier")):
        checkpoint = run / earlier.name.removeprefix(".").removesuffix(".earlier")
        if find_defect(checkpoint) is None:
            shutil.rmtree(earlier)
        elif find_defect(earlier) is None:
            shutil.rmtree(checkpoint, ignore_errors=True)
            earlier.rename(checkpoint)
            logger.warning("%s was being saved a second time when the run ended: the first is restored", checkpoint)


def newest_whole_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, or None, and why each newer one is not whole.

    Where a second save of a step was killed, the first is named as `restore_earlier` found it: `.checkpoint-N.earlier`.
    """
    steps = set()
    if run.is_dir():
        matches = (_NAME.fullmatch(path.name) for path in run.iterdir() if path.is_dir())
        steps = {int(match[1] or match[2]) for match in matches if match}
    incomplete = []
    for step in sorted(steps, reverse=True):
        checkpoint = _held(run / f"checkpoint-{step}")
        defect = find_defect(checkpoint)
        if defect is None:
            return checkpoint, incomplete
        incomplete.append(f"{checkpoint.name}: {defect}")
    return None, incomplete


def _held(checkpoint: Path) -> Path:
    """The folder that holds a checkpoint: its own or, if that is not whole, that of the step's first save."""
    earlier = earlier_of(checkpoint)
    return earlier if find_defect(checkpoint) is not None and earlier.is_dir() else checkpoint


def require_whole(checkpoint: Path) -> Path:
    """Return the checkpoint if training can resume from it.

    Raises:
        RunDirectoryError: it does not exist (the nearest that does is named), or is not whole.
    """
    checkpoint = _held(checkpoint)
    if not checkpoint.is_dir():
        beside = checkpoint.parent.iterdir() if checkpoint.parent.is_dir() else []
        near = did_you_mean(checkpoint.name, (path.name for path in beside))
        raise RunDirectoryError(f"There is no checkpoint {checkpoint}.{near} 'latest' takes the newest of the run.")
    defect = find_defect(checkpoint)
    if defect is not None:
        raise RunDirectoryError(f"Training cannot resume from {checkpoint}: {defect}.")
    return checkpoint


def write_format(checkpoint: Path) -> None:
    """Say beside the resume state of which version it is."""
    file = checkpoint / RESUME_STATE / _FORMAT_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(CHECKPOINT.stamp({})) + "\n", encoding="utf-8")


def check_format(checkpoint: Path) -> None:
    """Refuse a checkpoint whose resume state this rlseq cannot read.

    Raises:
        FormatError: it is of another version; 0 where none is named.
    """
    folder = checkpoint / RESUME_STATE
    file = folder / _FORMAT_FILE
    if file.is_file():
        CHECKPOINT.check(json.loads(file.read_text(encoding="utf-8")), checkpoint)
    elif any(folder.glob("rank-*.pt")):  # teacher forcing has no such state
        CHECKPOINT.check({}, checkpoint)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step at which a whole checkpoint was written."""
    return read_state(checkpoint)["global_step"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state as a whole checkpoint has it: global_step, max_steps (in all) and others."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def find_defect(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a checkpoint, or None if it can.

    It needs safetensors weights (of the model or of an adapter), the optimizer's and the schedule's state, and the
    trainer's state, which is written last. All of these, and whatever else is read when a run is resumed (random
    states, configuration, tokenizer), must be complete: a file that was cut short would end in a traceback.
    """
    try:
        step = checkpoint_step(checkpoint)
        if type(step) is not int:
            return "its trainer_state.json has no step"
        named = _NAME.fullmatch(checkpoint.name)
        if named and int(named[1] or named[2]) != step:  # a copy: transformers would look for its own name
            return f"its trainer_state.json is of step {step}"
    except FileNotFoundError:
        return "it has no trainer_state.json"
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return "its trainer_state.json was cut short"
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError):
            return f"its {index.name} was cut short"
        weights = [checkpoint / name for name in names]
    else:
        candidates = (checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors")
        weights = [path for path in candidates if path.exists()]
    if not weights:
        return "it has no weights (model.safetensors)"
    for path in weights:
        if not is_whole_safetensors(path):
            return f"its {path.name} is missing or was cut short"
    # optimizer.pt on one process or under DDP; optimizer.bin (whole) or optimizer_0/ (sharded) under FSDP;
    # global_step10/ under DeepSpeed.
    if not any(any(checkpoint.glob(pattern)) for pattern in ("optimizer.*", "optimizer_*", "global_step*")):
        return "it has no optimizer state (it was saved with --save_only_model, which keeps the weights alone)"
    # transformers would leave the optimizer's state aside, silently, where the schedule's is missing
    if any(checkpoint.glob("optimizer.*")) and not (checkpoint / "scheduler.pt").exists():
        return "it has no scheduler.pt"
    for path in sorted(checkpoint.rglob("*")):
        if not _is_complete(path):
            return f"its {path.relative_to(checkpoint)} was cut short"
    return None


def _is_complete(path: Path) -> bool:
    """Whether a file that is read on resuming can be: JSON parses, an archive of torch.save has its directory."""
    if path.suffix == ".safetensors":
        return is_whole_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # the directory stands at the end
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # also of bytes that are not UTF-8
            return False
    return True


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is complete, which opening it checks: it holds all bytes that its header names."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
