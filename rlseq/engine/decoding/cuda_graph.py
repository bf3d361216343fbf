"""Decoding steps of one shape, captured as a CUDA graph.

A step of a small model ends before the next kernel is launched: the host limits the speed, not the GPU. A graph
launches all kernels of a step at once, but on the tensors that it was captured with. So the cache is a preallocated
buffer, attention runs over all of it, and a mask hides the columns that are not filled. If rows or tokens exceed the
buffer, or much of it is idle, its contents move to another buffer and the step is captured again.

Without CUDA the same steps run one kernel at a time; the tests run them so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rlseq.engine.decoding.kv_cache import HEADROOM, MIN_HEADROOM
from rlseq.errors import ModelError

TOKENS = 64  # a buffer's width is a multiple of it: kernels want aligned masks
ROWS = 4  # sizes between a number of rows and twice it: idle rows are computed too
WARM = 2  # steps in a shape before it is captured: most shapes of a short completion end before that


class FixedSizeLayer(DynamicLayer):
    """A layer whose keys and values, (R, H, W, D), are written a column at a time and always returned whole.

    Args:
        keys, values: the buffers.
        column: (1,) long, the column that is written next; one tensor for all layers.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor):
        super().__init__()
        self.keys, self.values, self.column = keys, values, column
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


class CudaGraphDecoder:
    """U prefixes in buffers of R ≥ U rows and W tokens; otherwise a `rlseq.engine.decoding.decoders.CachedDecoder`.

    Args:
        model: a causal model of attention layers that see everything before them.
        cache: of a forward over the prefixes, padded on the left; its tensors are copied.
        mask: (U, L) of 0 and 1, of the tokens that it holds.
        position: (U,) of the last of them.
        options: further arguments of the forward.
        logits: (U, V) float32, of that forward.
        max_rows: the most rows that there will be.
        max_tokens: the most tokens per row, padding included.

    Attributes:
        logits: (U, V) float32 of the token after each; the next step may write over them.
        refused: why no graph could be captured; None: no capture has failed.

    Raises:
        ModelError: a layer holds something else than every token's keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: Cache,
        mask: Tensor,
        position: Tensor,
        options: dict[str, Any],
        logits: Tensor,
        *,
        max_rows: int,
        max_tokens: int,
    ):
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise ModelError("its cache holds something else than every token's keys and values")
        self.model, self.options = model, options
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.device = mask.device
        self.refused: str | None = None
        self.logits = logits
        dtype = cache.layers[0].keys.dtype
        self._lowest = torch.finfo(dtype).min
        self.held = mask.shape[1]
        self.column = torch.zeros(1, dtype=torch.long, device=self.device)
        bias = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(mask == 0, self._lowest)
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        cache.layers = []  # frees them as soon as they are moved
        self._hold(torch.arange(len(mask), device=self.device), bias[:, None, None], position[:, None])

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        needed, (rows, *_, width) = len(tokens), self._bias.shape
        full = self.held == width or needed > rows
        if full or _sized(needed + needed // 8) < rows:  # the eighth: no moving back and forth at a limit
            index = torch.arange(needed) if sources is None else torch.from_numpy(sources)
            self._hold(index.to(self.device), self._bias, self._position)
        elif sources is not None:
            moved = np.flatnonzero(sources != np.arange(needed))
            targets, found = (torch.from_numpy(x).to(self.device) for x in (moved, sources[moved]))
            for buffer in (x for layer in self._layers for x in layer):
                buffer[targets, :, : self.held] = buffer[found, :, : self.held]
            for buffer in (self._bias, self._position):
                buffer[targets] = buffer[found]
        self._token[:needed, 0] = torch.from_numpy(tokens).to(self.device)
        self._position[:needed] += 1  # not of the others: a position may not exceed a learned table
        self._bias[..., self.held] = 0
        self.column.fill_(self.held)
        self.held += 1
        self.logits = self._run()[:needed]

    def _hold(self, index: Tensor, bias: Tensor, position: Tensor) -> None:
        """Move the rows `index` (U,) of what is held to buffers of another shape."""
        self._graph = None  # it reads the old buffers
        self._steps = 0
        needed, held = len(index), self.held
        rows = max(needed, min(self.max_rows, _sized(needed)))
        width = min(held + max(MIN_HEADROOM, int(held * HEADROOM)), max(held + 1, self.max_tokens))
        width = -(-width // TOKENS) * TOKENS
        layers = []
        while self._layers:  # one at a time: only one layer is held twice
            layers.append(tuple(_moved(x, index, rows, width, held) for x in self._layers.pop(0)))
        self._layers = layers
        self._cache = Cache(layers=[FixedSizeLayer(keys, values, self.column) for keys, values in layers])
        self._bias = bias.new_full((rows, 1, 1, width), self._lowest)
        self._bias[:needed, ..., :held] = bias[index, ..., :held]
        self._position = position.new_zeros(rows, 1)
        self._position[:needed] = position[index]
        self._token = position.new_zeros(rows, 1)

    def _step(self) -> Tensor:
        output = self.model(
            input_ids=self._token,
            attention_mask=self._bias,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            **self.options,
        )
        return output.logits[:, -1].float()

    def _run(self) -> Tensor:
        if self._graph is None:
            self._steps += 1
            if self._steps <= WARM or not can_capture(self.device) or self.refused is not None:
                return self._step()
            try:
                self._graph, self._found = capture(self._step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.refused = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                return self._step()
        self._graph.replay()
        return self._found


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """Capture a step without running it. Returns an object whose `replay()` runs it, and the tensor of its result.

    Raises:
        RuntimeError: it does something that no graph can hold, such as waiting for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: rewards that score, the watchdog of a process group.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), _no_casts_kept("cuda"):
        found = step()
    return graph, found


def may_capture(model: nn.Module) -> bool:
    """Whether a CUDA graph of a model's forward can be right: its weights are whole, on one GPU, and stay there."""
    parameters = list(model.parameters())
    if any(p.device.type != "cuda" or p.device != parameters[0].device or hasattr(p, "ds_id") for p in parameters):
        return False
    return not any(isinstance(module, FSDPModule) or hasattr(module, "_hf_hook") for module in model.modules())


def _sized(rows: int) -> int:
    """The least size that holds N rows: ROWS sizes between a power of two and the next."""
    step = max(1, (1 << (rows - 1).bit_length()) // (2 * ROWS))
    return -(-rows // step) * step


def _moved(states: Tensor, index: Tensor, rows: int, width: int, held: int) -> Tensor:
    buffer = states.new_zeros(rows, states.shape[1], width, states.shape[3])  # zeros: a mask does not hide a NaN
    buffer[: len(index), :, :held] = states[:, :, :held].index_select(0, index)
    return buffer


def _no_casts_kept(device: str) -> contextlib.AbstractContextManager:
    """Autocast without its cache: casts made in a capture must not be used elsewhere."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
