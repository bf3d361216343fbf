"""What a teacher holds in memory beside the policy, reckoned from its configuration."""

from __future__ import annotations

from typing import Any

from rlseq.config.training import ModelArguments
from rlseq.engine.model.load import adapter_base, is_adapter
from rlseq.training.plan.memory import ModelSize, size_of, weightless_model

NONE_OF_ITS_OWN = "the policy's base, without the adapter"


def teacher_size(config: Any, model_args: ModelArguments) -> tuple[ModelSize, int, str] | None:
    """The teacher's size, the bytes of its own weights, and the latter in words; None without a teacher.

    Raises:
        ModelError: its configuration makes no causal language model.
    """
    name = getattr(config, "teacher_name_or_path", None)
    if name is None:
        return None
    dtype = config.teacher_dtype or model_args.dtype
    size = size_of(weightless_model(ModelArguments(model_name_or_path=name, dtype=dtype)))
    if _is_shared(config, model_args):
        return size, 0, NONE_OF_ITS_OWN
    weights = size.weight_bytes
    if config.teacher_quantization is not None:
        weights += size.linear * int(config.teacher_quantization[0]) // 8 - size.linear_bytes
    return size, weights, f"{size.parameters:,} parameters"


def _is_shared(config: Any, model_args: ModelArguments) -> bool:
    """As `rlseq.training.teacher.shares_base` finds of the loaded policy."""
    path = model_args.model_name_or_path
    if config.teacher_dtype or config.teacher_quantization:
        return False
    if is_adapter(path):
        return adapter_base(path) == config.teacher_name_or_path
    return model_args.use_peft and path == config.teacher_name_or_path and not model_args.lora_modules_to_save


def teacher_memory(
    size: ModelSize, weights: int, words: str, *, tokens: int, compute_bytes: int
) -> dict[str, tuple[int, str]]:
    """Bytes by what they hold, with the formula in words.

    Args:
        size, weights, words: of `teacher_size`.
        tokens: of the completions that a process samples together.
        compute_bytes: of a number in the forward.
    """
    numbers = f"{tokens:,} tokens × {size.hidden:,} numbers × {compute_bytes} bytes"
    return {
        "teacher": (weights, words),
        "teacher's hidden states": (tokens * size.hidden * compute_bytes, numbers),
    }
