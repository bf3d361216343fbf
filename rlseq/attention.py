"""SDPA over packed rows, a block of queries at a time.

With a mask that is written out, SDPA on a CPU computes the whole square of a row, though no token sees a later one. In
blocks each meets the tokens up to its last alone, which leaves little more than half of the square: on rows of 2,060
tokens, forward and backward took two thirds of the time. The numbers are the same to rounding.

transformers looks attention up by name at each forward, so what is registered under "sdpa" here takes marked masks in
blocks and hands anything else on. A mark that is lost on the way, as in a cast, costs time and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 256  # queries; 128 and 512 were slower (2 CPU cores)
_MARK = "rlseq_causal"


def mark_causal(mask: Tensor) -> Tensor:
    """Say of an added mask (R, 1, S, S) that no token sees a later one; return it."""
    if mask.device.type == "cpu":
        setattr(mask, _MARK, True)
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not _attend:
            global _whole
            _whole = ALL_ATTENTION_FUNCTIONS["sdpa"]
            ALL_ATTENTION_FUNCTIONS.register("sdpa", _attend)
    return mask


_whole: Any = None  # transformers' own


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers' `sdpa_attention_forward`: query (R, H, S, D) and a result of (R, S, H, D)."""
    tokens = query.shape[2]
    blocks = getattr(attention_mask, _MARK, False) and key.shape[2] == tokens >= 2 * BLOCK
    if not blocks or more.get("position_bias") is not None:
        return _whole(module, query, key, value, attention_mask, **more)
    parts = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        mask = attention_mask[:, :, start:end, :end]
        parts.append(_whole(module, query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, **more)[0])
    return torch.cat(parts, dim=1), None
