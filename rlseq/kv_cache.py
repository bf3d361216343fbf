"""A KV cache that has room: a decoding step writes one token's keys and values, and copies none of the others.

transformers' own `DynamicCache` joins what it holds with the new token, a copy of the whole cache a step; its
`StaticCache` does not, but attention then runs over its whole length from the first step on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 32  # tokens that there is room for after a copy, at least
ROOM = 0.25  # of what is held: memory beyond need, and copies become rare


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values, (B, H, L, D), are the beginning of buffers (B, H, L', D) with L' ≥ L."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor):
        """The keys and values of those rows, (B',), of a layer's, which are left as they are."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._hold(keys, values, rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held, new = self.keys.shape[-2], key_states.shape[-2]
        if held + new > self._buffers[0].shape[-2]:
            self._hold(self.keys, self.values, None, least=new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., held : held + new, :] = states
        self.keys, self.values = (buffer[..., : held + new, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold(self.keys, self.values, indices)

    def _hold(self, keys: Tensor, values: Tensor, rows: Tensor | None, *, least: int = 1) -> None:
        held = keys.shape[-2]
        width = held + max(least, LEAST_ROOM, int(held * ROOM))
        buffers = []
        for states in (keys, values):
            count = len(states) if rows is None else len(rows)
            buffer = states.new_empty(count, states.shape[1], width, states.shape[-1])
            buffer[..., :held, :] = states if rows is None else states[rows]
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        self.keys, self.values = (buffer[..., :held, :] for buffer in buffers)


def with_room(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Keep those rows (B',) of a cache, in that order, with room for tokens to come.

    Layers that hold something else than every token's keys and values (windows, states) grow as they ever did.
    """
    layers = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.get_seq_length():
            layer = RoomyLayer(layer.keys, layer.values, rows)
        else:
            layer.batch_select_indices(rows)
        layers.append(layer)
    cache.layers = layers
    return cache
