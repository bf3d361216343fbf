"""Decoders: prefixes that are continued together, one token per step, and the cache of their keys and values.

A decoder holds U prefixes, each at a slot, and gives the logits of the token after each. `advance` appends one token to
every slot; a slot may also continue the prefix of another slot, as samples that branch and beams do. All decoders give
the same logits to rounding; they differ in time and memory. `rlseq.engine.decoding.backends` chooses one for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlseq.engine.decoding.common_prefix import (
    compute_common_prefixes,
    copy_rows,
    find_common_prefixes,
    padded_left,
    serves,
)
from rlseq.engine.decoding.kv_cache import preallocate, rearrange
from rlseq.engine.decoding.prefix_attention import Groups, SharedPrefixLayer, take_over_sdpa
from rlseq.engine.model.info import attention_of, base_of, forward_parameters
from rlseq.errors import ModelError

Ids = Sequence[int]

MIN_PREALLOCATED = 128  # tokens per row: on shorter rows a preallocated cache was slower (2 CPU cores)


class Decoder(Protocol):
    """U prefixes, each at a slot.

    Attributes:
        logits: (U, V) float32 of the token after each.
    """

    logits: Tensor

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        """Let slot u hold the prefix of slot `sources[u]` (None: its own), followed by `tokens[u]`."""


class CachedDecoder:
    """All prefixes in one batch with a KV cache; prefixes of different lengths are padded on the left.

    What many of them begin with is computed once (`rlseq.engine.decoding.common_prefix`).

    Args:
        model: takes `past_key_values`, or `cache_params` as state-space models do.
        prefixes: U lists of token ids.
        max_rows, max_tokens: the most rows, and tokens per row, that there will be. From MIN_PREALLOCATED tokens on
            the cache is preallocated.
    """

    def __init__(self, model: nn.Module, prefixes: Sequence[Ids], max_rows: int = 0, max_tokens: int = 0):
        self.model = model
        accepted = forward_parameters(model)
        self.device = next(model.parameters()).device
        self.cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        common = find_common_prefixes(prefixes) if serves(model) else None
        if common is None:
            self.cache, before = DynamicCache(config=model.config), None
        else:
            cache, before = compute_common_prefixes(model, common)
            self.cache = copy_rows(cache, common)
            prefixes = [ids[length:] for ids, length in zip(prefixes, common.lengths.tolist(), strict=True)]
        input_ids, mask = padded_left(prefixes)
        self.mask = mask.to(self.device)
        if before is not None:
            self.mask = torch.cat([before, self.mask], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.position = positions[:, -1]  # (U,)
        with contiguous_head(model):
            self._forward(input_ids.to(self.device), self.mask, positions[:, -input_ids.shape[1] :])
        # Layers that carry states are moved by `reorder_cache` alone, which cannot use a preallocated layer.
        self.states = not all(map(holds_tokens, self.cache.layers))
        if max_tokens >= MIN_PREALLOCATED and not self.states:
            self.cache = preallocate(self.cache, max_rows)

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            index = torch.from_numpy(sources).to(self.device)
            if self.states:
                self.cache.reorder_cache(index)
            else:
                rearrange(self.cache, sources)
            self.mask, self.position = self.mask[index], self.position[index]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position + 1
        # A state-space model has consumed the padding by now, and would apply the mask to the new token.
        mask = self.mask if self.cache_name == "past_key_values" else None
        self._forward(torch.from_numpy(tokens).to(self.device).unsqueeze(1), mask, self.position.unsqueeze(1))

    def _forward(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: self.cache},
            **self.options,
        )
        self.cache = getattr(output, self.cache_name)
        self.logits = output.logits[:, -1].float()


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Give the head contiguous states: of a slice of longer rows, torch's linear copies the whole head for each row."""
    base = base_of(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(), *states[1:]))
    try:
        yield
    finally:
        hook.remove()


class SharedPrefixDecoder(CachedDecoder):
    """As `CachedDecoder`, with the keys and values of a prompt held once for all rows that follow it (cascade).

    Raises:
        ModelError: the model's cache or attention cannot share them.
    """

    def __init__(self, model: nn.Module, prefixes: Sequence[Ids], max_rows: int = 0, max_tokens: int = 0):
        super().__init__(model, prefixes)
        if attention_of(model) != "sdpa" or not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            raise ModelError("its rows cannot share the keys and values of a prompt")
        take_over_sdpa()
        rows = len(prefixes)
        keys = self.cache.layers[0].keys
        bias = torch.zeros(self.mask.shape, dtype=torch.promote_types(keys.dtype, torch.float32), device=self.device)
        bias = bias.masked_fill_(self.mask == 0, torch.finfo(bias.dtype).min)[:, None, None]  # (P, 1, 1, L)
        self.cache.layers = [SharedPrefixLayer(x.keys, x.values, rows, max(max_rows, rows)) for x in self.cache.layers]
        self._group(np.arange(rows), bias)

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            rearrange(self.cache, sources)
            self.position = self.position[torch.from_numpy(sources).to(self.device)]
            self._group(self.groups.prompt_of[sources], self.groups.bias)
        self.position = self.position + 1
        unread = self.groups.bias.new_zeros(1, 1, 1, 1)  # transformers takes a mask of four dimensions as it is
        self._forward(torch.from_numpy(tokens).to(self.device).unsqueeze(1), unread, self.position.unsqueeze(1))

    def _group(self, prompt_of: np.ndarray, bias: Tensor) -> None:
        kept = np.unique(prompt_of)
        if 2 * len(kept) <= len(bias):  # no row follows the other prompts any more
            index = torch.from_numpy(kept).to(self.device)
            for layer in self.cache.layers:
                layer.keep_prompts(index)
            prompt_of, bias = np.searchsorted(kept, prompt_of), bias[index]
        self.groups = Groups(prompt_of, bias)
        for layer in self.cache.layers:
            layer.groups = self.groups


class UncachedDecoder:
    """Prefixes of one length; each step computes them again from the first token. Arguments as of `CachedDecoder`."""

    def __init__(self, model: nn.Module, prefixes: Sequence[Ids], max_rows: int = 0, max_tokens: int = 0):
        self.model = model
        self.ids = torch.tensor([list(ids) for ids in prefixes], device=next(model.parameters()).device)  # (U, L)
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        self._forward()

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            self.ids = self.ids[torch.from_numpy(sources).to(self.ids.device)]
        self.ids = torch.cat([self.ids, torch.from_numpy(tokens).to(self.ids.device).unsqueeze(1)], dim=1)
        self._forward()

    def _forward(self) -> None:
        self.logits = self.model(input_ids=self.ids, use_cache=False, **self.options).logits[:, -1].float()


class ByLengthDecoder:
    """One batch per prefix length. No batch is padded, then or later: all prefixes grow by one token per step.

    Args:
        kind: of the batches, `CachedDecoder` or `UncachedDecoder`; the other arguments are theirs.
    """

    def __init__(
        self,
        kind: Callable[..., Decoder],
        model: nn.Module,
        prefixes: Sequence[Ids],
        max_rows: int = 0,
        max_tokens: int = 0,
    ):
        lengths = np.array([len(ids) for ids in prefixes])
        distinct, self.part = np.unique(lengths, return_inverse=True)  # (U,) the batch of each slot
        self.place = np.zeros(len(lengths), np.int64)  # (U,) and its row there
        self.parts = []
        for number in range(len(distinct)):
            here = np.flatnonzero(self.part == number)
            self.place[here] = np.arange(len(here))
            self.parts.append(kind(model, [prefixes[u] for u in here.tolist()], max_rows, max_tokens))
        self._gather()

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            self.part, self.place = self.part[sources], self.place[sources]
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(self.part == number)
            if len(here):  # else no slot will ever come back to it
                moves = not np.array_equal(self.place[here], np.arange(len(part.logits)))
                part.advance(self.place[here] if moves else None, tokens[here])
                self.place[here] = np.arange(len(here))
        self._gather()

    def _gather(self) -> None:
        found = {number: self.parts[number].logits for number in np.unique(self.part).tolist()}
        self.logits = torch.stack([found[n][i] for n, i in zip(self.part.tolist(), self.place.tolist(), strict=True)])


def holds_tokens(layer: Any) -> bool:
    """Whether a cache layer holds keys and values of tokens and nothing else."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
