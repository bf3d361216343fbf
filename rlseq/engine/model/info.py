"""What the engine asks of a `transformers` model: its attention, its arguments, what is wrapped inside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def attention_of(model: Any) -> str | None:
    """The name of a model's attention implementation, as transformers has it; None where it has none."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def attention_window(config: Any) -> int | None:
    """The shortest attention window that a text config declares; 0 where windows follow the row's columns."""
    layers = getattr(config, "layer_types", None)
    windows = []
    for name, layer in (
        ("sliding_window", "sliding_attention"),
        ("attention_chunk_size", "chunked_attention"),
    ):
        length = getattr(config, name, None)
        if length is not None and (layers is None or layer in layers):
            windows.append(length)
    # GPT-Neo's window is longer than the sequences of the self-tests: only its config shows it.
    if "local" in (getattr(config, "attention_layers", None) or ()):
        windows.append(0)
    return min(windows, default=None)


def vocabulary_of(model: Any) -> int:
    """V, the number of logits of a position."""
    return model.config.get_text_config().vocab_size


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, which would compile each new batch shape and hides the forward's arguments."""
    return getattr(model, "_orig_mod", model)


def base_of(model: Any) -> Any:
    """The `transformers` model inside a PEFT one, adapters in place; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments that the `transformers` model takes, by name."""
    return inspect.signature(base_of(model).forward).parameters


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in eval mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
