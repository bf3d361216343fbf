"""Models and tokenizers for training: loaded from a path or hub id, or built with random weights from a config."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from rlseq.config.groups.adapters import quantization_of
from rlseq.config.training import ModelArguments
from rlseq.engine.model import load
from rlseq.engine.model.gguf_files import gguf_file, may_be_on_hub
from rlseq.engine.packed.packing import FLEX
from rlseq.errors import ConfigError, ModelError, did_you_mean
from rlseq.training.run.checkpoints import is_whole_safetensors

MERGED = "merged"  # folder of a run that holds its adapter merged into the base
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def check_model_path(name_or_path: str | None) -> None:
    """Fail early on a local path without weights; a hub id is left for the hub to answer.

    Raises:
        ModelError: nothing is named, or the path is missing or holds no safetensors weights.
    """
    if not name_or_path:
        raise ModelError("no model is named; give --model_name_or_path (a path or hub id)")
    path = Path(name_or_path)
    if gguf_file(path) is not None:
        return
    if path.is_dir():
        if not any((path / name).is_file() for name in WEIGHT_FILES):
            checkpoints = sorted(p.name for p in path.glob("checkpoint-*"))
            hint = f" It has {', '.join(checkpoints[-3:])}: name one of them." if checkpoints else ""
            raise ModelError(f"{name_or_path!r} holds no weights ({', '.join(WEIGHT_FILES)}).{hint}")
        for file in sorted(path.glob("*.safetensors")):
            if not is_whole_safetensors(file):
                raise ModelError(f"{str(file)!r} was cut short (an interrupted download or copy?); fetch it again")
    elif path.is_absolute() or name_or_path[0] == "." or not may_be_on_hub(name_or_path) or path.parent.is_dir():
        near = did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise ModelError(f"there is no model at {name_or_path!r}.{near}")


def named_alone(model_args: ModelArguments) -> str:
    """The model that a run starts from by a name that needs no revision: that revision's folder in the hub's cache."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if revision in (None, "main") or Path(name).is_dir():
        return name
    return str(Path(cached_file(name, "config.json", revision=revision)).parent)


def load_tokenizer(name_or_path: str, *, revision: str | None = "main") -> PreTrainedTokenizerBase:
    """Load a tokenizer for generation: left padding, and a pad token (EOS where it has none).

    Raises:
        ModelError: there is none, or it has no EOS token.
    """
    options = {"revision": revision or "main", "padding_side": "left", "truncation_side": "left"}
    tokenizer = load.load_tokenizer(name_or_path, **options)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name_or_path!r} has no EOS token, so no completion could end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_attention(model_args: ModelArguments) -> None:
    """Refuse FlexAttention where it has no gradient.

    Raises:
        ConfigError: there is no GPU.
    """
    if model_args.attn_implementation == FLEX and not torch.cuda.is_available():
        raise ConfigError(f"--attn_implementation {FLEX} has no gradient on a CPU; leave it out, which gives sdpa")


def load_model(model_args: ModelArguments) -> PreTrainedModel:
    """Load the causal language model that `model_args` names, in float32 unless a dtype is given.

    An adapter's folder gives its base with the adapter in place, trainable: TRL takes its reference from a `PeftModel`
    as a copy of the adapter, and from a model with an adapter loaded inside it (frozen, too) as the base without it.

    Raises:
        ModelError: the path is missing or holds no weights.
        ConfigError: the attention cannot be trained here.
    """
    path = model_args.model_name_or_path
    check_model_path(path)
    check_attention(model_args)
    if load.is_adapter(path) and model_args.use_peft:
        raise ModelError(
            f"{path!r} is an adapter, which trains on; leave out --use_peft (or merge it into its base first, and put "
            "a new one on that)"
        )
    model = _load_trainable(path, model_args, quantization_of(model_args))
    if not isinstance(model, PeftModel):
        freeze_vision_and_audio(model)
    return model


def _load_trainable(path: str, model_args: ModelArguments, quantization: Mapping[str, Any] | None) -> Any:
    if load.is_adapter(path):
        check_model_path(load.adapter_base(path))
    return load.load_model(
        path,
        revision=model_args.model_revision,
        dtype=model_args.dtype or torch.float32,
        attn_implementation=model_args.attn_implementation,
        quantization=quantization,
        trainable=True,
        allow_missing=model_args.allow_missing_weights,
    )


def freeze_vision_and_audio(model: PreTrainedModel) -> None:
    """Freeze the vision and audio towers of a multimodal model.

    Text does not pass through them, so they get no gradient. Unfrozen, they would take memory for one, and
    data-parallel training would wait for it.
    """
    if model.config.get_text_config() is model.config:
        return
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(p) for part in parts if part is not None for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in text:
            parameter.requires_grad_(False)


def merge_result(run: str, model_args: ModelArguments) -> None:
    """Where --merge_adapter asks for it, write the run's adapter merged into its base, from the first process."""
    if model_args.merge_adapter and PartialState().is_main_process:
        print(f"rlseq: the adapter merged into its base is in {write_merged(Path(run), model_args)}", flush=True)


def write_merged(run: Path, model_args: ModelArguments) -> Path:
    """Merge the adapter that a run saved into its base, and write the whole model, with its tokenizer, to RUN/merged.

    The base is loaded again, and not quantised: merging into rounded weights would round the adapter too.

    Args:
        run: a folder with an adapter and a tokenizer.
        model_args: the run's; the merged model has its dtype.

    Returns:
        The folder, which `AutoModelForCausalLM.from_pretrained` loads.

    Raises:
        ModelError: the base cannot be loaded.
    """
    merge(run, model_args).save_pretrained(run / MERGED)
    load_tokenizer(str(run)).save_pretrained(run / MERGED)
    return run / MERGED


def merge(run: Path, model_args: ModelArguments) -> PreTrainedModel:
    """The adapter that a run saved, merged into its base; as `write_merged` writes it."""
    adapted = _load_trainable(str(run), model_args, None)
    _untie_adapted(adapted)
    return adapted.merge_and_unload()


def _untie_adapted(model: PeftModel) -> None:
    """Part head and embedding where an adapter changes one of the two: merged into both it would change the other."""
    whole = model.base_model.model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    inner, outer = (getattr(layer, "base_layer", layer) for layer in (embedding, head))
    if (inner is embedding and outer is head) or getattr(outer, "weight", None) is not inner.weight:
        return
    outer.weight = torch.nn.Parameter(inner.weight.detach().clone())
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False


def disable_dropout(model: torch.nn.Module) -> None:
    """Turn dropout off in every module for good; the configuration that is saved keeps its rates.

    TRL's own reaches `torch.nn.Dropout` alone, but Llama, Qwen, Mistral and others hand `attention_dropout`, a number
    of the module, to the attention in train mode.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def new_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a new model from values with `model_type`; its vocabulary is the tokenizer's.

    Raises:
        ConfigError: `model_type` is missing or unknown, or a value is none of its configuration, or not of its kind.
    """
    if not isinstance(config, dict):
        raise ConfigError(
            f"new_model is {config!r}; expected a mapping such as {{model_type: llama, hidden_size: 128}}"
        )
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"new_model.model_type is {model_type!r}; expected a transformers model type such as 'llama'."
            + did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        )
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    for name in values:  # transformers keeps what it does not know, and builds the default in its place
        if not hasattr(default, name):
            near = did_you_mean(name, default.to_dict())
            raise ConfigError(f"new_model.{name} is no value of the configuration of {model_type!r}.{near}")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        return kind(**{"vocab_size": len(tokenizer), **special, **values})
    except Exception as error:  # configurations check their values by errors of many kinds
        raise ConfigError(f"new_model makes no {model_type!r}: {' '.join(str(error).split())}") from error


def build_model(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a randomly initialised model from a config with `model_type`; its vocabulary is the tokenizer's.

    Raises:
        ConfigError: as `new_config`, or the values make no causal language model.
    """
    made = new_config(config, tokenizer)
    try:
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"new_model makes no causal language model: {str(error).splitlines()[0]}") from error


def build_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a path or hub id, or of `path/to/file.py:function` called without arguments."""
    file, _, function = spec.partition(":")
    if not file.endswith(".py"):
        return load_tokenizer(spec)
    if not Path(file).is_file():
        raise ConfigError(f"new_tokenizer: there is no file {file!r}")
    module_spec = importlib.util.spec_from_file_location(f"rlseq_tokenizer_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    build: Callable[[], PreTrainedTokenizerBase] | None = getattr(module, function, None)
    if not callable(build):
        raise ConfigError(f"new_tokenizer: {file!r} defines no function {function!r}")
    return build()
