"""What a run will hold in memory and on disk, reckoned from configurations: no weights are loaded.

An estimate. Parameters, and so weights, gradients, optimizer state and checkpoints, are exact for the optimizers named
below; the KV cache is exact at its longest; activations are rough. Left out: what an accelerator takes (a GPU's
context, fragmentation, buffers of communication) and sharding (FSDP, DeepSpeed), which divides the first five.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from rlseq.config.groups.adapters import peft_config_of
from rlseq.config.training import ModelArguments
from rlseq.doctor.static import load_configs
from rlseq.engine.decoding.kv_budget import cached_numbers
from rlseq.engine.model.auto_class import causal_class
from rlseq.engine.model.info import base_of
from rlseq.engine.model.load import is_adapter
from rlseq.errors import ConfigError, ModelError
from rlseq.training.critic import critic_folder, first_line
from rlseq.training.models import freeze_vision_and_audio
from rlseq.training.update.head import TILE_TOKENS

# What a layer keeps of a token for its backward, in units of its widths, counted for a Llama layer with SDPA: two norms
# (input, normalised, output), attention (queries, keys and values repeated for every head, its result before and after
# the heads are joined), a gated MLP (gate, its activation, the other half, their product).
OF_HIDDEN, OF_HEADS, OF_MLP = 6, 5, 4
HEAD_TILE = (4096, 32_768)  # tokens and entries of the vocabulary that TRL's head projects at once, on a GPU
HEAD_COPIES = 4  # tensors of a tile that the head's backward on a CPU holds
# What the C library keeps of freed memory, as a share of what an update holds. Measured: 64 rollouts of 128 tokens of
# SmolLM2-135M took 8.4 GB where freed blocks were returned (glibc's mmap_threshold of 1 MiB), else 9.8 to 10.5 GB.
KEPT_BY_ALLOCATOR = 0.2
PEAK = "peak of a process"
ADAM_STATE = 2  # numbers a trained parameter: its two moments


@dataclass(frozen=True)
class ModelSize:
    """A model of a run: parameters by number, and what they weigh in bytes in the precision they have there.

    Attributes:
        parameters, trained: of the policy, tied ones once; with an adapter only that is trained.
        weight_bytes, trained_bytes: their bytes.
        critic, critic_bytes: of PPO's critic, which is trained whole; 0 without one.
        adapter: whether the trained parameters are an adapter's.
        linear, linear_bytes: weights of the policy's linear layers but its output layer, and no adapter's: what is
            quantised, where anything is.
        layers, hidden, vocabulary: of the policy.
        kept: numbers that a layer keeps of a token for the backward, roughly.
        cached: numbers that its KV cache holds of a token.
    """

    parameters: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    critic: int
    critic_bytes: int
    adapter: bool
    linear: int
    linear_bytes: int
    layers: int
    hidden: int
    vocabulary: int
    kept: int
    cached: int


def weightless_model(model_args: ModelArguments) -> nn.Module:
    """The model that `load_model` loads, with the adapter that training puts on it, on the meta device.

    Raises:
        ModelError: its configuration makes no causal language model.
        ConfigError: the adapter that the settings ask for does not fit it.
    """
    path = model_args.model_name_or_path
    config, _ = load_configs(path, model_args.model_revision)
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    with torch.device("meta"):
        try:
            model = causal_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise ModelError(f"{path!r} makes no causal language model: {first_line(error)}") from error
        freeze_vision_and_audio(model)
        if is_adapter(path):
            settings = PeftConfig.from_pretrained(path, trust_remote_code=False)
            settings.inference_mode = False
        else:
            settings = peft_config_of(model_args)
        if settings is None:
            return model
        layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            there = f" Its linear layers: {', '.join(sorted(layers))}." if "arget module" in str(error) else ""
            raise ConfigError(f"the adapter does not fit {path!r}: {first_line(error)}{there}") from error
        if model_args.load_in_4bit or model_args.load_in_8bit:  # TRL then trains the adapter in 16 bits
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return adapted


def size_of(model: nn.Module, critic: int = 0) -> ModelSize:
    """Count a model's parameters; those of its critic are counted by `critic_parameters`."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    ]
    width = max(p.element_size() for p in parameters if p.is_floating_point())
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        critic=critic,
        critic_bytes=critic * width,
        adapter=isinstance(model, PeftModel),
        linear=sum(weight.numel() for weight in linear),
        linear_bytes=sum(weight.numel() * weight.element_size() for weight in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kept=_kept_numbers(text),
        cached=cached_numbers(model.config),
    )


def _kept_numbers(text: Any) -> int:
    heads = getattr(text, "num_attention_heads", 0) or 0
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return OF_HIDDEN * text.hidden_size + OF_HEADS * width + OF_MLP * inner


def critic_parameters(model: nn.Module, kind: str, name_or_path: str | None) -> int:
    """Parameters of the critic that `rlseq.training.critic.build_critic` builds for a policy: backbone and head."""
    base = base_of(model)
    if kind == "shared":
        return base.config.get_text_config().hidden_size + 1
    if name_or_path is None:
        backbone: nn.Module = base.get_decoder()
        # A copy of an adapted policy is merged: no parameter of an adapter is in it.
        count = sum(p.numel() for name, p in backbone.named_parameters() if "lora_" not in name)
    else:
        config, _ = load_configs(str(critic_folder(name_or_path) or name_or_path))
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, trust_remote_code=False)
        count = sum(p.numel() for p in backbone.parameters())
    return count + backbone.config.get_text_config().hidden_size + 1


def optimizer_bytes(optim: str, size: ModelSize) -> int:
    """Bytes of the optimizer's state: AdamW's two moments in the precision of the parameters, unless it is another."""
    trained = size.trained_bytes + size.critic_bytes
    if optim in ("sgd", "adafactor"):  # no momentum; rows and columns of the second moment alone
        return 0
    if "8bit" in optim:
        return ADAM_STATE * (size.trained + size.critic)
    return ADAM_STATE * trained


def memory(
    size: ModelSize,
    *,
    optim: str,
    reference: bool,
    averages: int,
    quantized_bits: int | None,
    compute_bytes: int,
    update_tokens: int,
    cached_tokens: int,
    checkpointing: bool,
    logits: bool,
    cpu: bool,
    more: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, tuple[int, str]]:
    """Bytes of a process by what they hold, with the formula in words; the last entry is their peak together.

    Args:
        size: of the model.
        optim: the optimizer's name.
        reference: whether a reference model is held beside the policy.
        averages: copies of the trained weights that are held (a running average, the start).
        quantized_bits: of the weights of linear layers, where they are quantised.
        compute_bytes: of a number in the forward: 2 under mixed or half precision, else 4.
        update_tokens: of a micro-batch, as it is laid out.
        cached_tokens: rows sampled together times the longest row; 0 without rollouts.
        checkpointing: whether activations are recomputed.
        logits: whether the loss holds those of all its tokens (rollouts' losses go through them in tiles).
        cpu: whether it trains on a CPU, where the process itself is counted, and the head holds more copies of a tile.
        more: what else is held, likewise.
    """
    trained = size.trained_bytes + size.critic_bytes
    weights = size.weight_bytes + size.critic_bytes
    if quantized_bits:
        weights += size.linear * quantized_bits // 8 - size.linear_bytes
    layer = size.kept * compute_bytes
    kept = size.layers * size.hidden * compute_bytes + layer if checkpointing else size.layers * layer
    if size.critic > size.hidden + 1:  # a backbone of its own passes the same tokens
        kept *= 2
    activations = update_tokens * kept
    if logits:
        head, tile = update_tokens * 8 * size.vocabulary, f"{update_tokens:,} tokens × {size.vocabulary:,} × 8 bytes"
    else:
        most_rows, most_columns = (TILE_TOKENS, size.vocabulary) if cpu else HEAD_TILE
        rows, columns = min(update_tokens, most_rows), min(size.vocabulary, most_columns)
        each = 4 * HEAD_COPIES if cpu else compute_bytes
        head, tile = rows * columns * each, f"a tile of {rows:,} tokens × {columns:,} × {each} bytes"
    itself = psutil.Process().memory_info().rss if cpu else 0
    held = {
        "weights": (weights, f"{size.parameters + size.critic:,} parameters"),
        "gradients": (trained, f"{size.trained + size.critic:,} trained parameters"),
        "optimizer state": (optimizer_bytes(optim, size), f"{optim}"),
        "reference model": (size.weight_bytes if reference else 0, "as the policy's weights"),
        **(more or {}),
        "averaged weights": (averages * trained, f"{averages} × the trained parameters"),
        "KV cache": (
            cached_tokens * size.cached * compute_bytes,
            f"{cached_tokens:,} tokens × {size.cached:,} numbers × {compute_bytes} bytes",
        ),
        "logits": (head, tile),
        "activations, roughly": (
            activations,
            f"{update_tokens:,} tokens × {size.layers} layers × "
            f"{f'{size.hidden:,} (+ {size.kept:,} in one layer)' if checkpointing else f'{size.kept:,}'} numbers × "
            f"{compute_bytes} bytes",
        ),
        "kept by the allocator": (
            int(KEPT_BY_ALLOCATOR * (head + activations)) if cpu else 0,
            f"{KEPT_BY_ALLOCATOR:.0%} of logits and activations: freed, and not returned to the system",
        ),
        "the process itself": (itself, "libraries and data, as this process holds them"),
    }
    together = sum(number for number, _ in held.values()) - min(held["KV cache"][0], head + activations)
    shown = {name: entry for name, entry in held.items() if entry[0]}
    return {**shown, PEAK: (together, "the sum, of cache and update the larger")}


def checkpoint_bytes(size: ModelSize, *, optim: str, average: bool, save_only_model: bool) -> int:
    """Bytes of a checkpoint: weights (an adapter's alone), the critic's, the optimizer's state, the average."""
    trained = size.trained_bytes + size.critic_bytes
    weights = (size.trained_bytes if size.adapter else size.weight_bytes) + size.critic_bytes
    return weights + (0 if save_only_model else optimizer_bytes(optim, size)) + (trained if average else 0)
