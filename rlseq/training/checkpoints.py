"""Which checkpoints were written to their end, and can be gone on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rlseq.errors import RunDirectoryError, did_you_mean

_NAME = re.compile(r"checkpoint-(\d+)")


class FinishedRunMixin:
    """For a Trainer: going on from the last step ends at once; transformers would train one step more."""

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)


def newest_whole_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, or None, and why each newer one is not whole."""
    found = []
    if run.is_dir():
        found = [path for path in run.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    torn = []
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        defect = find_defect(checkpoint)
        if defect is None:
            return checkpoint, torn
        torn.append(f"{checkpoint.name}: {defect}")
    return None, torn


def require_whole(checkpoint: Path) -> Path:
    """Return the checkpoint if training can go on from it.

    Raises:
        RunDirectoryError: it does not exist (the nearest that does is named), or is not whole.
    """
    if not checkpoint.is_dir():
        beside = checkpoint.parent.iterdir() if checkpoint.parent.is_dir() else []
        near = did_you_mean(checkpoint.name, (path.name for path in beside))
        raise RunDirectoryError(f"There is no checkpoint {checkpoint}.{near} 'latest' takes the newest of the run.")
    defect = find_defect(checkpoint)
    if defect is not None:
        raise RunDirectoryError(f"Training cannot go on from {checkpoint}: {defect}.")
    return checkpoint


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step at which a whole checkpoint was written."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def find_defect(checkpoint: Path) -> str | None:
    """Return why training cannot go on from a checkpoint, or None if it can.

    It needs whole safetensors weights (of the model or of an adapter), the optimizer's state, and the
    trainer's state, which is written last.
    """
    try:
        if type(checkpoint_step(checkpoint)) is not int:
            return "its trainer_state.json has no step"
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
    # One file on one process or under DDP; folders under FSDP (optimizer_0) and DeepSpeed (global_step10).
    if not any(any(checkpoint.glob(pattern)) for pattern in ("optimizer.pt", "optimizer_*", "global_step*")):
        return "it has no optimizer state (it was saved with --save_only_model, which keeps the weights alone)"
    return None


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of header length, header, tensors."""
    if not path.is_file():
        return False
    size = os.path.getsize(path)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return False
        try:
            header = json.loads(file.read(header_size))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)
