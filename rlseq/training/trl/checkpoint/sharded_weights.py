"""The weights of a checkpoint that FSDP or DeepSpeed reads by itself: are they all there, under the model's names?"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from peft import PeftModel
from torch.distributed.checkpoint import FileSystemReader

from rlseq.engine.model.load import ANOTHER, reason, some, unwrapped, validate_no_missing_weights
from rlseq.errors import ModelError


def check_sharded(model: Any, path: str | Path) -> None:
    """Refuse a checkpoint from which FSDP or DeepSpeed, whose own loading reads it, would not give a model all weights.

    They leave an adapter's weights that are not there as they are, and know no other names than the model's. Read are
    the names alone: of FSDP's whole file (FULL_STATE_DICT) or sharded folder (SHARDED_STATE_DICT), or of the first
    rank's file of DeepSpeed.

    Args:
        model: what is loaded into; of a `PeftModel`, what it trains.

    Raises:
        ModelError: weights are missing, or no such file can be read.
    """
    try:
        held = _sharded_names(Path(path))
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot read the weights of {str(path)!r}: {reason(error)}. {ANOTHER}") from error
    adapter = isinstance(model, PeftModel)
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad or not adapter]
    own = [name for name in own if "_flat_param" not in name]  # FSDP1's parameters, which have no names of their own
    missing = {unwrapped(name) for name in own if not held & {name, unwrapped(name), _peft_name(unwrapped(name))}}
    other = held - {unwrapped(name) for name in held}
    instead = f"It has names of a wrapped model instead ({some(other)}). " if missing and other else ""
    validate_no_missing_weights(path, missing, instead + ANOTHER)


def _sharded_names(checkpoint: Path) -> set[str]:
    whole, shards = checkpoint / f"{FSDP_MODEL_NAME}.bin", checkpoint / f"{FSDP_MODEL_NAME}_0"
    if whole.is_file():
        return set(_saved_by_torch(whole))
    if shards.is_dir():
        names = FileSystemReader(shards).read_metadata().state_dict_metadata
        return {name.removeprefix("model.") for name in names}
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()  # as DeepSpeed finds it
    files = sorted((checkpoint / tag).glob("*model_states.pt"))
    if not files:
        raise FileNotFoundError(f"there is no {tag}/*model_states.pt")
    return set(_saved_by_torch(files[0])["module"])


def _saved_by_torch(file: Path) -> Any:
    """What torch.save wrote, without its tensors: nothing but dictionaries is built, and no code that it names runs."""
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Outline(io.BytesIO(archive.read(name))).load()


class _Outline(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Anything

    def persistent_load(self, pid: Any) -> None:
        """The storage of a tensor."""


class _Anything(dict):
    """Stands for an object of any class."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _state: Any) -> None:
        """Left out."""

    def append(self, _item: Any) -> None:
        """Left out."""


def _peft_name(name: str) -> str:
    """A trained parameter of an adapter as peft saves it, and so FSDP in shards: without the adapter's name."""
    return re.sub(r"\.(?:modules_to_save\.)?default(?=\.|$)", "", name)
