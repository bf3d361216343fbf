"""Loading the checkpoints that are evaluated, by the loader that training has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState

from rlseq.engine.model import load


def load_tokenizer(name: str, path: str) -> Any:
    """A checkpoint's tokenizer, padding on the left.

    Raises:
        ModelError: it cannot be loaded.
    """
    return load.load_tokenizer(path, f"model {name!r}", padding_side="left")


def load_checkpoint(
    name: str,
    path: str,
    allow_missing: bool = False,
    quantization: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> torch.nn.Module:
    """A causal model in eval mode on this process's device; an adapter is inside its base.

    Args:
        quantization: fields of a `BitsAndBytesConfig` for the model, or an adapter's base; None: not quantised.
        dtype: of the weights, by name; "auto": that of the checkpoint.

    Raises:
        ModelError: it cannot be loaded, or lacks weights and `allow_missing` does not let them be random.
    """
    model = load.load_model(
        path,
        what=f"model {name!r}",
        dtype=dtype,
        quantization=quantization,
        device=PartialState().device,
        allow_missing=allow_missing,
    )
    return model.eval()
