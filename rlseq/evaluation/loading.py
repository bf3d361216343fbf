"""Loading the checkpoints that are evaluated: in float32, from safetensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlseq.errors import ModelError
from rlseq.model_class import causal_class


def load_tokenizer(name: str, path: str) -> Any:
    """A checkpoint's tokenizer, padding on the left.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _load(AutoTokenizer, name, path, padding_side="left")


def load_checkpoint(name: str, path: str) -> torch.nn.Module:
    """A causal model in float32 and eval mode on this process's device, from safetensors alone.

    Raises:
        ModelError: it cannot be loaded.
    """
    adapter = (Path(path) / "adapter_config.json").is_file()  # whose base transformers finds
    kind = AutoModelForCausalLM if adapter else causal_class(_load(AutoConfig, name, path))
    model = _load(kind, name, path, dtype=torch.float32, use_safetensors=True)
    return model.to(PartialState().device).eval()


def _load(kind: Any, name: str, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"cannot load model {name!r} from {path!r}: {reason}") from error
