"""Loading models and tokenizers: no code of a model's repository is run, and no weight is left random.

transformers asks on the terminal whether to run a repository's code, and accepts `yes` from a pipe. It also initialises
the weights that a checkpoint lacks at random, differently in each process. Both are refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rlseq.engine.model.auto_class import causal_class
from rlseq.engine.model.gguf_files import where_and_how
from rlseq.engine.model.lora import with_fused_layers
from rlseq.errors import ModelError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What torch.compile, FSDP and activation checkpointing insert in a parameter's name, and data parallelism's prefix.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DATA_PARALLEL = re.compile(r"^(?:module\.)+")
ANOTHER = "Resume from another checkpoint"
_SAVE_AGAIN = (
    "Save it again by the class that trained it, or give --allow_missing_weights true if random weights are wanted"
)


def load_tokenizer(name_or_path: str | Path, what: str | None = None, **options: Any) -> Any:
    """A tokenizer as it was saved.

    Args:
        name_or_path: a folder, hub id or GGUF file.
        what: how a message calls it; by default "a tokenizer".

    Raises:
        ModelError: it cannot be loaded.
    """
    place, gguf = where_and_how(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **gguf, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {what or 'a tokenizer'} from {str(name_or_path)!r}: {reason(error)}") from error


def load_config(name_or_path: str | Path, **options: Any) -> Any:
    """A model's configuration; the errors are transformers' own (OSError, ValueError, KeyError)."""
    place, gguf = where_and_how(name_or_path)
    return AutoConfig.from_pretrained(place, trust_remote_code=False, **gguf, **options)


def is_adapter(path: str | Path | None) -> bool:
    """Whether a local folder holds an adapter and not a whole model."""
    return path is not None and (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(path: str | Path) -> str:
    """The path or hub id of the base that an adapter's folder names."""
    return json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_model(
    name_or_path: str | Path,
    *,
    what: str = "a model",
    kind: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    allow_missing: bool = False,
    todo: str = _SAVE_AGAIN,
    **more: Any,
) -> Any:
    """The model of a folder, hub id or GGUF file, in eval mode; of an adapter's folder, its base with the adapter.

    Training, evaluation, the doctor, reward models, critics and reference models all load by it.

    Args:
        what: its name in messages.
        kind: the auto class or class; None: that of causal language models (`rlseq.engine.model.auto_class`).
        revision: of a hub id; an adapter names its base without one.
        dtype: of the weights, or its name; "auto": that of the checkpoint.
        attn_implementation: as transformers calls it; None: what it takes by default.
        quantization: fields of a `BitsAndBytesConfig`, for an adapter of its base; None: as it was saved.
        device: where it goes; "auto": over all accelerators, as transformers' `device_map` spreads it; None: the CPU.
        trainable: give a `PeftModel` whose adapter trains, in place of a base with the adapter inside it.
        allow_missing: leave weights that the checkpoint lacks as transformers initialised them: at random.
        todo: what a message about missing weights advises.
        more: further options of `from_pretrained`.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has layers that the configuration leaves out.
    """
    adapter = is_adapter(name_or_path)
    options = more | {"dtype": as_dtype(dtype), "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(dict(quantization))
    if revision is not None:
        options["revision"] = "main" if adapter else revision
    if device == "auto":
        options["device_map"] = "auto"
    path = adapter_base(name_or_path) if adapter else name_or_path
    model, missing, unexpected = load_with_loading_info(
        path, what=f"the base of {what}" if adapter else what, kind=kind, **options
    )
    if not allow_missing:
        validate_no_missing_weights(path, missing, todo)
        _validate_no_left_out_layers(path, unexpected, (name for name, _ in model.named_parameters()))
    for module in model.modules():
        # On a CPU bitsandbytes repacks 4-bit weights at the first forward without gradient. They compute in bfloat16
        # and give no gradient after it: a run would sample, and then train nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if adapter:
        model = _with_adapter(model, name_or_path, trainable=trainable, allow_missing=allow_missing)
        model = model if trainable else model.base_model.model
    return model if device in (None, "auto") else model.to(device)


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype by its name; "auto" stays.

    Raises:
        ModelError: torch has none of that name.
    """
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    return found


def load_with_loading_info(
    path: str | Path, *, what: str = "a model", kind: Any = None, **options: Any
) -> tuple[Any, set[str], set[str]]:
    """A model without adapters, from safetensors or a GGUF file only, even if its checkpoint lacks weights.

    The names that torch.compile, DistributedDataParallel and FSDP give to parameters are read as the model's own.

    Args:
        path, what, kind: as for `load_model`.
        options: of `from_pretrained`.

    Returns:
        (model, names of the weights that the checkpoint lacks, names of those that the model has no place for).

    Raises:
        ModelError: it cannot be loaded.
    """
    place, gguf = where_and_how(path)
    revision = {name: options[name] for name in ("revision",) if name in options}
    try:
        kind = kind or causal_class(load_config(path, **revision))
        options["output_loading_info"] = True
        mapping = {} if gguf else _unwrapping(_saved_names(path, **revision))
        if mapping:
            options["key_mapping"] = mapping
        model, told = kind.from_pretrained(place, trust_remote_code=False, use_safetensors=True, **gguf, **options)
        if mapping:  # by the others it is saved: under the model's own names
            kept = [c for c in model._weight_conversions if mapping.keys().isdisjoint(c.source_patterns)]
            model._weight_conversions = kept
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load {what} from {str(path)!r}: {reason(error)}") from error
    if gguf:
        _forget_blocks(model)
        model.name_or_path = str(path)  # which an adapter's folder will call its base
    return model, told["missing_keys"], told["unexpected_keys"]


def _forget_blocks(model: Any) -> None:
    """Make a model read from GGUF one like any other: its weights are restored, but transformers would save none."""
    model.hf_quantizer.remove_quantization_config(model)


def _with_adapter(base: Any, path: str | Path, *, trainable: bool, allow_missing: bool) -> PeftModel:
    """A base with the adapter of a local folder in place."""
    with safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        trained_in = file.get_tensor(names[0]).dtype if names else None
    mapping = {}  # peft takes the prefix `base_model.model.` off before it maps names
    for name, own in _unwrapped(names).items():
        inner = re.compile(r"^base_model\.model\.")
        mapping[f"^{re.escape(inner.sub('', name))}$"] = inner.sub("", own)
    try:
        config = with_fused_layers(PeftConfig.from_pretrained(path, trust_remote_code=False))
        model = PeftModel.from_pretrained(
            base, path, config=config, is_trainable=trainable, key_mapping=mapping or None, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load an adapter from {str(path)!r}: {reason(error)}") from error
    if not allow_missing:
        held = {unwrapped(name) for name in names}
        validate_no_missing_weights(path, set(get_peft_model_state_dict(model, save_embedding_layers=False)) - held)
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
    saved, missing, unexpected = load_with_loading_info(path, what="a checkpoint", kind=type(model), dtype=wide)
    validate_no_missing_weights(path, missing, ANOTHER)
    _validate_no_left_out_layers(path, unexpected, (name for name, _ in saved.named_parameters()))
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
        validate_no_missing_weights(folder, own - set(weights), ANOTHER)
        set_peft_model_state_dict(model, weights, adapter_name=name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load an adapter from {str(folder)!r}: {reason(error)}") from error


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


def validate_no_missing_weights(path: str | Path, missing: Collection[str], todo: str = _SAVE_AGAIN) -> None:
    if missing:
        raise ModelError(
            f"{str(path)!r} lacks {len(missing):,} of the model's weights ({some(missing)}), which would be random. "
            f"{todo}"
        )


def _validate_no_left_out_layers(path: str | Path, unexpected: Collection[str], own: Iterable[str]) -> None:
    """Refuse layers that the configuration leaves out: numbered names that are the model's own but for the number."""
    known = {re.sub(r"\.\d+\.", ".#.", name) for name in own}
    left = [name for name in unexpected if re.search(r"\.\d+\.", name) and re.sub(r"\.\d+\.", ".#.", name) in known]
    if left:
        raise ModelError(
            f"{str(path)!r} holds {len(left):,} weights of layers that its configuration leaves out ({some(left)}): "
            "it would be another model. Set num_hidden_layers in config.json to what was trained"
        )


def some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
