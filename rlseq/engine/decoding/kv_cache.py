"""A preallocated KV cache: a decoding step writes the keys and values of one token and copies no others.

transformers' `DynamicCache` concatenates the new token, which copies the whole cache at each step. Its `StaticCache`
does not, but attention then runs over its whole length from the first step on. Rows are preallocated too: a sequence
that branches is the only one copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MIN_HEADROOM = 32  # tokens preallocated beyond those held, at least
HEADROOM = 0.25  # or this share of the tokens held, which makes copies rare


class PreallocatedLayer(DynamicLayer):
    """A layer whose keys and values, (B, H, L, D), are the first part of buffers (B', H, L', D): B' ≥ B and L' ≥ L.

    Args:
        keys, values: of a layer; they are copied.
        max_rows: the most rows that there will be; no more are preallocated.
    """

    def __init__(self, keys: Tensor, values: Tensor, max_rows: int):
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.max_rows = max_rows
        self._hold(keys, values, None, len(keys))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, held, new = len(self.keys), self.keys.shape[-2], key_states.shape[-2]
        if held + new > self._buffers[0].shape[-2]:
            self._hold(self.keys, self.values, None, rows, least=new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, held : held + new] = states
        self._show(rows, held + new)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold(self.keys, self.values, indices, len(indices))

    def copy_rows(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy rows onto others, and hold N rows afterwards; targets beyond those held are new."""
        if rows > len(self._buffers[0]):
            self._hold(self.keys, self.values, None, rows)
        held = self.keys.shape[-2]
        for buffer in self._buffers:
            buffer[targets, :, :held] = buffer[sources, :, :held]
        self._show(rows, held)

    def _hold(self, keys: Tensor, values: Tensor, indices: Tensor | None, rows: int, *, least: int = 1) -> None:
        held = keys.shape[-2]
        width = held + max(least, MIN_HEADROOM, int(held * HEADROOM))
        tall = rows if indices is not None else max(rows, min(self.max_rows, int(rows * (1 + HEADROOM))))
        buffers = []
        for states in (keys, values):
            buffer = states.new_empty(tall, states.shape[1], width, states.shape[-1])
            if indices is None:
                buffer[: len(states), :, :held] = states
            else:
                buffer[:, :, :held] = states.index_select(0, indices)
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        self._show(rows, held)

    def _show(self, rows: int, tokens: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :tokens] for buffer in self._buffers)


def preallocate(cache: DynamicCache, max_rows: int) -> DynamicCache:
    """Preallocate a cache for tokens and rows to come, `max_rows` at most.

    Layers that hold something else than every token's keys and values (windows, states) stay as they are.
    """
    cache.layers = [
        PreallocatedLayer(layer.keys, layer.values, max_rows)
        if type(layer) is DynamicLayer and layer.get_seq_length()
        else layer
        for layer in cache.layers
    ]
    return cache


def rearrange(cache: DynamicCache, sources: np.ndarray) -> None:
    """Let row i of a cache hold what row `sources[i]` held: (B',) of the rows held."""
    moved = np.flatnonzero(sources != np.arange(len(sources)))
    index, targets, found = (torch.from_numpy(x) for x in (sources, moved, sources[moved]))
    for layer in cache.layers:
        if index.device != layer.device:
            index, targets, found = (x.to(layer.device) for x in (index, targets, found))
        # If most rows move, or the cache shrinks, all are copied: that is no slower and frees memory.
        if isinstance(layer, PreallocatedLayer) and len(sources) >= len(layer.keys) and 2 * len(moved) <= len(sources):
            layer.copy_rows(found, targets, len(sources))
        elif type(layer) is DynamicLayer:
            # Its own method indexes as `keys[index, ...]`, which took four times as long (2 CPU cores).
            layer.keys, layer.values = (x.index_select(0, index) for x in (layer.keys, layer.values))
        else:
            layer.batch_select_indices(index)
