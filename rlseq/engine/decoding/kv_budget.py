"""How many rows fit a memory budget for the KV cache."""

from __future__ import annotations

import math
from typing import Any

from rlseq.errors import ConfigError


def rows_within(model: Any, max_kv_gb: float, tokens: int, *, together: int = 1) -> int:
    """How many rows of N tokens fit a budget for the KV cache, at the model's width and precision.

        bytes per token = layers · 2 · key-value heads · head dimension · bytes per number

    An upper bound where layers attend within a window or hold no cache.

    Args:
        model: a causal transformers model.
        max_kv_gb: gigabytes (10⁹ bytes).
        tokens: of the longest row, prompt and completion.
        together: rows that must be held at once, as a beam's.

    Raises:
        ConfigError: the budget does not hold that many; the message names the smallest that does.
    """
    row_bytes = tokens * cached_numbers(model.config) * next(model.parameters()).element_size()
    rows = int(max_kv_gb * 1e9) // max(1, row_bytes)
    if rows < together:
        least = math.ceil(together * row_bytes / 1e3) / 1e6
        held = "one row" if together == 1 else f"{together} rows, which are decoded together,"
        raise ConfigError(
            f"--max_kv_gb is {max_kv_gb:g}, which does not hold {held} of {tokens} tokens; give at least {least:g}"
        )
    return rows


def cached_numbers(config: Any) -> int:
    """Numbers per token in the KV cache: layers · 2 · key-value heads · head dimension."""
    config = config.get_text_config()
    differ = getattr(config, "per_layer_attributes", None)  # as the head dimension of Gemma 4
    return sum(map(_layer_numbers, config.per_layer_config if differ else [config] * config.num_hidden_layers))


def _layer_numbers(config: Any) -> int:
    if not getattr(config, "num_attention_heads", None):
        return 0  # states only, of the same size at any length
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width
