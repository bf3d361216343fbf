"""Decoding backends, and the choice of the first one that is right for a model.

    cuda_graph    all prefixes in one batch with a cache of fixed shape; on a GPU each step is a CUDA graph
    padded        one batch, padded on the left, with a cache that grows; long prompts that several samples follow are
                  held once (a shared-prefix decoder)
    by_length     one unpadded batch and cache for each prefix length
    uncached      each step computes the whole sequences again; no cache, no padding

A plain attention model with explicit positions is right under `padded`. Layers that carry a state from token to token
may take padding for text or keep another kind of cache. So any other model, and any that may use a CUDA graph, runs
a self-test once (`rlseq.engine.packed.self_tests.decoder_fault`) and gets the first backend that passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from rlseq.engine.decoding.cuda_graph import CudaGraphDecoder, may_capture
from rlseq.engine.decoding.decoders import (
    ByLengthDecoder,
    CachedDecoder,
    Decoder,
    Ids,
    SharedPrefixDecoder,
    UncachedDecoder,
    holds_tokens,
)
from rlseq.engine.model.info import attention_of, attention_window, base_of, forward_parameters, uncompiled
from rlseq.engine.packed.self_tests import decoder_fault
from rlseq.errors import ModelError

MIN_SHARED_PREFIX = 128  # tokens of a prompt: copying a shorter one to each of its rows is as fast (2 CPU cores)


def cuda_graph_decoder(
    model: nn.Module, prefixes: Sequence[Ids], max_rows: int = 0, max_tokens: int = 0
) -> CudaGraphDecoder:
    """A `CudaGraphDecoder` of these prefixes; arguments as of `CachedDecoder`.

    Raises:
        ModelError: the model's cache cannot be of a fixed shape, or its attention windows are counted from the end of
            the buffer (the self-test's prompts are shorter than such a window).
    """
    if attention_window(base_of(model).config.get_text_config()) == 0:
        raise ModelError("its attention windows are counted from the end of the buffer")
    first = CachedDecoder(model, prefixes)
    max_rows, max_tokens = max(max_rows, len(prefixes)), max(max_tokens, first.mask.shape[1] + 1)
    limits = {"max_rows": max_rows, "max_tokens": max_tokens}
    return CudaGraphDecoder(model, first.cache, first.mask, first.position, first.options, first.logits, **limits)


BACKENDS: dict[str, Callable[..., Decoder]] = {
    "cuda_graph": cuda_graph_decoder,
    "padded": CachedDecoder,
    "by_length": partial(ByLengthDecoder, CachedDecoder),
    "uncached": partial(ByLengthDecoder, UncachedDecoder),
}
SLOW = {  # backends that cost time, as a message describes them
    "by_length": "one prompt length at a time",
    "uncached": "without a cache, computing each step again from the first token, which is slow",
}

# Results of the self-tests by model, then by attention implementation and dtype: the backend, and the fault of the
# shared-prefix decoder ("": none).
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


def make_decoder(model: nn.Module, prefixes: Sequence[Ids], *, max_rows: int = 0, max_tokens: int = 0) -> Decoder:
    """Run a model over prefixes with its backend; in eval mode and without gradient.

    Args:
        model: a causal `transformers` model.
        prefixes: U lists of token ids, each of at least one token.
        max_rows, max_tokens: as of `CachedDecoder`.
    """
    model = uncompiled(model)
    backend = select_backend(model)
    make = BACKENDS[backend]
    if backend == "padded" and 2 * len(prefixes) <= max_rows and max(map(len, prefixes)) >= MIN_SHARED_PREFIX:
        make = SharedPrefixDecoder if supports_shared_prefix(model) else make
    return make(model, prefixes, max_rows, max_tokens)


def select_backend(model: nn.Module) -> str:
    """The key of `BACKENDS` for a model. If it is a slow one (`SLOW`), a line says so, once per model.

    The answer is kept as long as the model lives. Logits may differ by what `supports_packing` allows.
    """
    model = uncompiled(model)
    plain, captures = is_plain(model), may_capture(model)
    if plain and not captures:
        return "padded"
    known = _known.setdefault(model, {})
    key = (attention_of(model), next(model.parameters()).dtype)
    if key not in known:
        reason = ""
        for backend, make in BACKENDS.items():
            if backend == "cuda_graph" and not captures:
                continue
            known_right = backend == "uncached" or (backend == "padded" and plain)
            fault = None if known_right else decoder_fault(model, make)
            if fault is None:
                break
            reason = reason or fault
        known[key] = backend
        if reason and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            name = type(base_of(model)).__name__
            print(f"rlseq: {name} is decoded {SLOW.get(backend, 'without a CUDA graph')}: {reason}", flush=True)
    return known[key]


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether `SharedPrefixDecoder` is right for a model, by one self-test; kept as long as the model lives."""
    known = _known.setdefault(model, {})
    key = ("shared prefix", attention_of(model), next(model.parameters()).dtype)
    if key not in known:
        known[key] = decoder_fault(model, SharedPrefixDecoder) or ""
    return not known[key]


def is_plain(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own that takes masks and positions and caches keys and values alone."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or type(base).__module__.startswith("transformers_modules"):
        return False
    if not {"attention_mask", "position_ids", "past_key_values"} <= forward_parameters(model).keys():
        return False
    return all(map(holds_tokens, DynamicCache(config=model.config).layers))
