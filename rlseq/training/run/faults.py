"""Memory, disk and processes that fail a run, as errors that say where it happened and what to change."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlseq.common.disk import WRITE_ERRNOS, write_error_message
from rlseq.errors import ConfigError, RlseqError, TrainingError
from rlseq.training.run.checkpoints import earlier_of

_CPU_MEMORY = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
# torch.save and safetensors report a failed write without an errno.
_TORCH_WRITE = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")
_SAFETENSORS_WRITE = ("os error", "I/O error", "IoError")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")

ELSEWHERE = (
    "In evaluation: lower --eval_batch_size, or give --max_kv_gb. While a model loads: give --dtype bfloat16, or use a "
    "smaller one."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: an accelerator's, or one of the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MEMORY)


def is_failed_write(error: BaseException) -> bool:
    """Whether an error, come from where it may, says that a file could not be written: full, too long, read-only."""
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRNOS
    if isinstance(error, SafetensorError):
        return any(text in str(error) for text in _SAFETENSORS_WRITE)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_WRITE)


@contextlib.contextmanager
def memory_for(phase: str, advice: Callable[[Any], str], args: Any) -> Iterator[None]:
    """Turn a failed allocation into a `TrainingError` that names the phase and says what to lower.

    Args:
        phase: what was being done; of nested phases the innermost is named.
        advice: the run's settings -> what to lower, one of the functions below.
        args: the run's settings.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_memory_message(phase, error, advice(args))) from error


def _memory_message(phase: str, error: BaseException, advice: str) -> str:
    return f"out of memory in {phase}. {advice}\n  ({_first_line(error)})"


def update_advice(args: Any) -> str:
    """What to lower where an update finds no memory."""
    longest = "max_completion_length" if hasattr(args, "max_completion_length") else "max_length"
    advice = (
        f"Lower --per_device_train_batch_size ({args.per_device_train_batch_size}) and raise "
        f"--gradient_accumulation_steps ({args.gradient_accumulation_steps}) by as much, which leaves the batch as "
        f"it is; or lower --{longest} ({getattr(args, longest)})"
    )
    return advice + ("." if args.gradient_checkpointing else "; or give --gradient_checkpointing true.")


def sampling_advice(args: Any) -> str:
    """What to lower where the sampling of rollouts finds no memory."""
    return (
        "A process samples per_device_train_batch_size × steps_per_generation "
        f"({args.per_device_train_batch_size} × {args.steps_per_generation}) completions of up to "
        f"max_completion_length ({args.max_completion_length}) "
        "tokens at a time: lower one of them, e.g. --steps_per_generation 1 with the --gradient_accumulation_steps "
        f"of now ({args.gradient_accumulation_steps}), which leaves the batch as it is. --num_generations "
        f"({args.num_generations}) must divide the completions that all processes sample at a time: lower it, too."
    )


def evaluation_advice(args: Any) -> str:
    """What to lower where an evaluation during training finds no memory."""
    if hasattr(args, "max_completion_length"):
        return "Lower --eval_rows_during_training or --max_completion_length."
    return f"Lower --per_device_eval_batch_size ({args.per_device_eval_batch_size})."


@contextlib.contextmanager
def writing(path: str | os.PathLike, then: str = "") -> Iterator[None]:
    """Turn a failed write into a `TrainingError` that names the path, the reason and how much is free there."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or is_failed_write(error)):
            raise
        raise TrainingError(write_error_message(Path(path), error, then)) from error


@contextlib.contextmanager
def saving(checkpoint: Path, *, main_process: bool, wait: Callable[[], None]) -> Iterator[None]:
    """Leave a checkpoint whole, or as it was before: absent, or the earlier one of the same step.

    The body writes the trainer's state last, which marks a checkpoint as whole, and deletes older checkpoints only
    then. A process that is killed meanwhile leaves a folder without the mark, which resuming skips, and the earlier one
    of the same step where resuming finds it.

    Args:
        checkpoint: the folder that the body writes.
        main_process: whether this process moves and removes folders.
        wait: returns once every process has called it.

    Raises:
        TrainingError: the disk is full, or cannot be written.
    """
    earlier = earlier_of(checkpoint)
    if main_process and checkpoint.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        checkpoint.rename(earlier)
    wait()
    try:
        with writing(checkpoint, "Make room or change --output_dir, and resume with --resume_from_checkpoint."):
            yield
    except BaseException:
        if main_process:
            shutil.rmtree(checkpoint, ignore_errors=True)
            if earlier.exists():
                earlier.rename(checkpoint)
        raise
    if main_process:
        shutil.rmtree(earlier, ignore_errors=True)


def friendly_error(error: Exception) -> RlseqError | None:
    """Return the message that replaces an error's traceback, or None for a bug, which keeps its traceback."""
    if isinstance(error, RlseqError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a setting that names a path, whichever
        return ConfigError(f"the name of a file or folder is too long: {error.filename!r}")
    if is_out_of_memory(error):
        return TrainingError(_memory_message("evaluation, or while a model loaded", error, ELSEWHERE))
    if is_failed_write(error):
        return TrainingError(write_error_message(Path(getattr(error, "filename", None) or "."), error))
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST):
        return TrainingError(
            "another process of this run has ended, so this one cannot continue. The launcher names its rank and its "
            f"exit code (a negative one is a signal; -9 is often the system, out of memory).\n  ({_first_line(error)})"
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
