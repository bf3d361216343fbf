"""The logits at chosen places of a batch; where a model allows it, no other place is projected on the vocabulary."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlseq.engine.model.info import base_of, eval_mode, forward_parameters
from rlseq.engine.packed.packing import PackedBatch

_separate: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def logits_at(
    model: nn.Module, batch: PackedBatch, places: Tensor, whole: bool, step: int, past: DynamicCache | None = None
) -> Iterator[Tensor]:
    """The logits (n, V) at places of the flattened batch, `step` of them at a time.

    Args:
        whole: compute those of all places and choose from them; for a model without `head_is_separate`.
        past: keys and values of what the rows continue.
    """
    if whole:
        yield from model(**inputs_of(model, batch, past)).logits.flatten(0, 1)[places].split(step)
        return
    hidden = last_hidden_states(model, batch, past).flatten(0, 1)[places]  # (n, H)
    head = base_of(model).get_output_embeddings()
    yield from (head(part) for part in hidden.split(step))


def last_hidden_states(model: nn.Module, batch: PackedBatch, past: DynamicCache | None = None) -> Tensor:
    """What the head of a model with `head_is_separate` reads, (R, S, H)."""
    return base_of(model).get_decoder()(**inputs_of(model, batch, past)).last_hidden_state


def inputs_of(model: nn.Module, batch: PackedBatch, past: DynamicCache | None = None) -> dict[str, Any]:
    """The arguments of a forward that decodes nothing further; `past` has keys and values of what the rows continue."""
    inputs = batch.model_inputs | {"use_cache": False}
    if past is not None:
        inputs["past_key_values"] = past
    padded = isinstance(batch.attention_mask, Tensor) and batch.attention_mask.ndim == 2
    if padded and "position_ids" not in forward_parameters(model):
        del inputs["position_ids"]  # padded on the right, where a model's own positions are these
    return inputs


def head_is_separate(model: nn.Module) -> bool:
    """Whether logits are bit for bit the head of the decoder's last hidden state; remembered by model."""
    if model not in _separate:
        _separate[model] = _try_head(model)
    return _separate[model]


def _try_head(model: nn.Module) -> bool:
    base = base_of(model)
    if not hasattr(base, "get_decoder") or not hasattr(base, "get_output_embeddings"):
        return False
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if "input_ids" not in inspect.signature(decoder.forward).parameters:
        return False  # ModernBERT's is the head itself
    # Under FSDP2 only the outermost forward gathers current weights: call no part alone, even while they are whole.
    if decoder is base or head is None or any(hasattr(m, "set_reshard_after_forward") for m in model.modules()):
        return False
    ids = torch.arange(5, device=next(model.parameters()).device)[None] % head.weight.shape[0]
    with torch.no_grad(), eval_mode(model):
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(head(hidden).float(), model(input_ids=ids, use_cache=False).logits.float())
