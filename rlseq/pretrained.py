"""Loading what others saved: no code of a model's repository is run, and no weight is left random.

transformers asks on the terminal whether to run a repository's code, and takes `yes` from a pipe; and it fills what a
checkpoint lacks with random numbers, other ones in each process. Here both are refused.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rlseq.errors import ModelError
from rlseq.model_class import causal_class

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What torch.compile, FSDP and activation checkpointing put into a parameter's name; data parallelism begins it so.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DATA_PARALLEL = re.compile(r"^(?:module\.)+")
_ANOTHER = "Resume from another checkpoint"
_SAVE_AGAIN = (
    "Save it again by the class that trained it, or give --allow_missing_weights true where random numbers are wanted "
    "there"
)


def load_tokenizer(name_or_path: str | Path, what: str | None = None, **options: Any) -> Any:
    """A tokenizer as it was saved.

    Args:
        what: how a message calls it; by default "a tokenizer".

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {what or 'a tokenizer'} from {str(name_or_path)!r}: {reason(error)}") from error


def load_config(name_or_path: str | Path, **options: Any) -> Any:
    """A model's configuration; the errors are transformers' own (OSError, ValueError, KeyError)."""
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **options)


def is_adapter(path: str | Path | None) -> bool:
    """Whether a local folder holds an adapter and not a whole model."""
    return path is not None and (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(path: str | Path) -> str:
    """The path or hub id of the base that an adapter's folder names."""
    return json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_weights(path: str | Path, *, allow_missing: bool = False, todo: str = _SAVE_AGAIN, **options: Any) -> Any:
    """A model that is no adapter, as `load_told` loads it.

    Args:
        allow_missing: leave weights that the checkpoint lacks as transformers made them: random.
        todo: what a message about missing weights advises.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has layers that the configuration leaves out.
    """
    model, missing, unexpected = load_told(path, **options)
    if not allow_missing:
        _refuse_missing(path, missing, todo)
        _refuse_left_out(path, unexpected, (name for name, _ in model.named_parameters()))
    for module in model.modules():
        # On a CPU bitsandbytes repacks 4-bit weights at the first forward without gradient. They compute in bfloat16
        # and give no gradient after it: a run would draw, and then train nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_told(
    path: str | Path, *, what: str = "a model", kind: Any = None, **options: Any
) -> tuple[Any, set[str], set[str]]:
    """A model that is no adapter, from safetensors alone, whatever its checkpoint lacks.

    The names that torch.compile, DistributedDataParallel and FSDP give to parameters are read as the model's own.

    Args:
        path: a folder or hub id.
        what: how a message calls it.
        kind: the auto class; None: that of causal language models.
        options: of `from_pretrained`.

    Returns:
        (model, names of the weights that the checkpoint lacks, names of those that the model has no place for).

    Raises:
        ModelError: it cannot be loaded.
    """
    revision = {name: options[name] for name in ("revision",) if name in options}
    try:
        kind = kind or causal_class(load_config(path, **revision))
        options["output_loading_info"] = True
        if mapping := _unwrapping(_saved_names(path, **revision)):
            options["key_mapping"] = mapping
        model, told = kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True, **options)
        if mapping:  # by the others it is saved: under the model's own names
            kept = [c for c in model._weight_conversions if mapping.keys().isdisjoint(c.source_patterns)]
            model._weight_conversions = kept
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load {what} from {str(path)!r}: {reason(error)}") from error
    return model, told["missing_keys"], told["unexpected_keys"]


def load_adapter(base: Any, path: str | Path, *, trainable: bool = False, allow_missing: bool = False) -> PeftModel:
    """A base with the adapter of a local folder in place.

    Raises:
        ModelError: it cannot be loaded, or the folder lacks weights of it.
    """
    with safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        trained_in = file.get_tensor(names[0]).dtype if names else None
    mapping = {}  # peft takes the prefix `base_model.model.` off before it maps names
    for name, own in _unwrapped(names).items():
        inner = re.compile(r"^base_model\.model\.")
        mapping[f"^{re.escape(inner.sub('', name))}$"] = inner.sub("", own)
    try:
        model = PeftModel.from_pretrained(
            base, path, is_trainable=trainable, key_mapping=mapping or None, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load an adapter from {str(path)!r}: {reason(error)}") from error
    if not allow_missing:
        held = {unwrapped(name) for name in names}
        _refuse_missing(path, set(get_peft_model_state_dict(model, save_embedding_layers=False)) - held)
    if getattr(base, "is_quantized", False):  # TRL trains, and computes, its adapter in bfloat16; peft makes it float32
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.data = parameter.data.to(trained_in)
    return model


def load_into(model: Any, path: str | Path) -> None:
    """Give a model, or the adapters of a `PeftModel`, the weights that a checkpoint of it holds.

    A whole model is loaded by its own class: what is saved has other names than the parameters where transformers fuses
    experts. Modules that the class does not have (a critic) stay as they are.

    Raises:
        ModelError: the checkpoint cannot be loaded, or lacks weights.
    """
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            _load_into_adapter(model, name, Path(path) if name == "default" else Path(path) / name)
        return
    wide = max({p.dtype for p in model.parameters()}, key=lambda dtype: torch.finfo(dtype).bits)
    saved, missing, unexpected = load_told(path, what="a checkpoint", kind=type(model), dtype=wide)
    _refuse_missing(path, missing, _ANOTHER)
    _refuse_left_out(path, unexpected, (name for name, _ in saved.named_parameters()))
    try:
        model.load_state_dict(saved.state_dict(), strict=False)
    except RuntimeError as error:  # of other sizes
        raise ModelError(f"{str(path)!r} holds another model: {' '.join(str(error).split())}") from error


def _load_into_adapter(model: PeftModel, name: str, folder: Path) -> None:
    if name != "default" and not folder.is_dir():  # a reference that does not move need not be saved
        return
    try:
        weights = {unwrapped(key): weight for key, weight in load_file(folder / ADAPTER_WEIGHTS).items()}
        own = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
        _refuse_missing(folder, own - set(weights), _ANOTHER)
        set_peft_model_state_dict(model, weights, adapter_name=name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load an adapter from {str(folder)!r}: {reason(error)}") from error


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
        raise ModelError(f"cannot read the weights of {str(path)!r}: {reason(error)}. {_ANOTHER}") from error
    adapter = isinstance(model, PeftModel)
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad or not adapter]
    own = [name for name in own if "_flat_param" not in name]  # FSDP1's parameters, which have no names of their own
    missing = {unwrapped(name) for name in own if not held & {name, unwrapped(name), _peft_name(unwrapped(name))}}
    other = held - {unwrapped(name) for name in held}
    instead = f"It has names of a wrapped model instead ({_some(other)}). " if missing and other else ""
    _refuse_missing(path, missing, instead + _ANOTHER)


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


def load_causal(path: str | Path, *, what: str = "a model", allow_missing: bool = False, **options: Any) -> Any:
    """The causal language model of a path or hub id; an adapter's folder gives its base with the adapter inside.

    Raises:
        ModelError: as `load_weights` and `load_adapter`.
    """
    if not is_adapter(path):
        return load_weights(path, what=what, allow_missing=allow_missing, **options)
    base = load_weights(adapter_base(path), what=f"the base of {what}", allow_missing=allow_missing, **options)
    return load_adapter(base, path, allow_missing=allow_missing).base_model.model


def unwrapped(name: str) -> str:
    """A parameter's name without what torch.compile, DistributedDataParallel and FSDP put into it."""
    return _WRAPPERS.sub("", _DATA_PARALLEL.sub("", _WRAPPERS.sub("", name)))


def reason(error: Exception) -> str:
    """The first line of an error of transformers', or what rlseq has to say to it."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its repository, which rlseq does not run; take a model that transformers knows"
    return next(iter(text.splitlines()), type(error).__name__)


def _saved_names(path: str | Path, **revision: Any) -> list[str]:
    """The names of a checkpoint's weights; none where it has no safetensors."""
    options = {"_raise_exceptions_for_missing_entries": False, **revision}
    if (whole := cached_file(str(path), SAFE_WEIGHTS_NAME, **options)) is not None:
        with safe_open(whole, framework="pt") as weights:
            return list(weights.keys())
    if (index := cached_file(str(path), SAFE_WEIGHTS_INDEX_NAME, **options)) is not None:
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    return []


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    return {name: own for name in names if (own := unwrapped(name)) != name}


def _unwrapping(names: Iterable[str]) -> dict[str, str]:
    """Patterns of what names begin with, up to their last wrapper, and that without wrappers; the longest first.

    What follows is left alone: transformers may have renamed it (fused experts).
    """
    begin = set()
    for name, own in _unwrapped(names).items():
        end = next(i for i in range(len(name)) if own.endswith(name[i:]))
        begin.add((name[:end], own[: len(own) - len(name) + end]))
    return {f"^{re.escape(name)}": own for name, own in sorted(begin, key=lambda pair: -len(pair[0]))}


def _refuse_missing(path: str | Path, missing: Collection[str], todo: str = _SAVE_AGAIN) -> None:
    if missing:
        raise ModelError(
            f"{str(path)!r} lacks {len(missing):,} of the model's weights ({_some(missing)}), which would be random. "
            f"{todo}"
        )


def _refuse_left_out(path: str | Path, unexpected: Collection[str], own: Iterable[str]) -> None:
    """Refuse layers that the configuration leaves out: numbered names that are the model's own but for the number."""
    known = {re.sub(r"\.\d+\.", ".#.", name) for name in own}
    left = [name for name in unexpected if re.search(r"\.\d+\.", name) and re.sub(r"\.\d+\.", ".#.", name) in known]
    if left:
        raise ModelError(
            f"{str(path)!r} holds {len(left):,} weights of layers that its configuration leaves out ({_some(left)}): "
            "it would be another model. Set num_hidden_layers in config.json to what was trained"
        )


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
