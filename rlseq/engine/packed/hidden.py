"""The last hidden states of a packed batch."""

from __future__ import annotations

from torch import Tensor, nn

from rlseq.engine.model.info import base_of, forward_parameters
from rlseq.engine.packed.packing import PackedBatch


def last_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """What the head of a model with `rlseq.engine.packed.logits.head_is_separate` reads, (R, S, H)."""
    inputs = batch.model_inputs | {"use_cache": False}
    padded = isinstance(batch.attention_mask, Tensor) and batch.attention_mask.ndim == 2
    if padded and "position_ids" not in forward_parameters(model):
        del inputs["position_ids"]  # padded on the right, where a model's own positions are these
    return base_of(model).get_decoder()(**inputs).last_hidden_state
