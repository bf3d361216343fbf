"""Beginnings that are decoded together, and the ways in which a model can go on from them.

    captured      all in one batch, padded on the left, from a cache of fixed shape: on a GPU, each step is a CUDA graph
    padded        the same from a cache that grows, its kernels launched one by one; long prompts that several samples
                  follow are held once
    by length     the same without padding: a batch, and a cache, for each prompt length
    uncached      every step computes the whole sequences anew; no cache, no padding

Attention with explicit positions allows the second. Layers that carry a state from token to token may take padding for
text, or keep a cache of another kind. So a model that is not a plain attention model of transformers' own, and any
that is to be captured, is tried once, on a few random tokens, against forwards of one sequence without a cache, and
gets the first way that is right. All give the same logits to rounding; they differ in time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlseq.engine.cuda_graph import WARM, FixedShape, may_capture
from rlseq.engine.kv_cache import rearrange, with_room
from rlseq.engine.packing import (
    LOGIT_TOLERANCE,
    attention_of,
    attention_window,
    base_of,
    forward_parameters,
    uncompiled,
)
from rlseq.engine.prefix_attention import Groups, SharedPrompt, take_over_sdpa
from rlseq.errors import ModelError

Ids = Sequence[int]

TRIED_LENGTHS = (5, 2, 7, 1)  # of the trial's prompts: shorter and longer than the usual convolution of 4 tokens
# Of the trial's slots at each step, the one that each continues: rows move, are copied, leave.
TRIED_SOURCES = (None, (0, 0, 2, 1, 3, 2), (5, 3, 1), *(None,) * (WARM + 1))  # until a step is replayed
WORTH_SHARING = 128  # tokens of a prompt: shorter ones are copied to each row that follows them, as fast (2 CPU cores)
WORTH_ROOM = 128  # tokens a row: on shorter ones a cache with room was slower than one that is copied (2 CPU cores)
FLIPS = 0.1  # share of logits that may be off in 16 bits, where a router that rounds otherwise picks another expert


class Beginnings(Protocol):
    """U beginnings, each at a slot.

    Attributes:
        logits: (U, V) float32 of the token after each.
    """

    logits: Tensor

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        """Let slot u hold what slot `sources[u]` held (None: what it holds), with `tokens[u]` behind it."""


class Cached:
    """Beginnings in one batch, from a cache; those of unlike lengths are padded on the left.

    Args:
        model: takes `past_key_values`, or as state-space models do, `cache_params`.
        beginnings: U token id lists.
        most_rows, most_tokens: rows, and tokens a row, that there will be at most; from WORTH_ROOM tokens on, the cache
            has room for what comes.
    """

    def __init__(self, model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0):
        self.model = model
        accepted = forward_parameters(model)
        self.device = next(model.parameters()).device
        self.cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        width = max(map(len, beginnings))
        input_ids = torch.zeros(len(beginnings), width, dtype=torch.long)  # (U, L); padding is masked: any id will do
        mask = torch.zeros(len(beginnings), width, dtype=torch.long)
        for u, ids in enumerate(beginnings):
            input_ids[u, width - len(ids) :] = torch.tensor(ids)
            mask[u, width - len(ids) :] = 1
        self.mask = mask.to(self.device)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.position = positions[:, -1]  # (U,)
        self.cache = DynamicCache(config=model.config)
        self._forward(input_ids.to(self.device), self.mask, positions)
        # Layers that carry states move by `reorder_cache` alone, and that knows nothing of room.
        self.states = not all(map(_holds_tokens, self.cache.layers))
        if most_tokens >= WORTH_ROOM and not self.states:
            self.cache = with_room(self.cache, most_rows)

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
        # A model of states alone has padding behind it by now, and would take the mask for one of these tokens.
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


class AfterPrompts(Cached):
    """As `Cached`, and the keys and values of a prompt are held once for all that follow it.

    Raises:
        ModelError: the model's cache, or its attention, cannot be shared.
    """

    def __init__(self, model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0):
        super().__init__(model, beginnings)
        if attention_of(model) != "sdpa" or not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            raise ModelError("its prompts cannot be held apart")
        take_over_sdpa()
        rows = len(beginnings)
        keys = self.cache.layers[0].keys
        hidden = torch.zeros(self.mask.shape, dtype=torch.promote_types(keys.dtype, torch.float32), device=self.device)
        hidden = hidden.masked_fill_(self.mask == 0, torch.finfo(hidden.dtype).min)[:, None, None]  # (P, 1, 1, L)
        self.cache.layers = [SharedPrompt(x.keys, x.values, rows, max(most_rows, rows)) for x in self.cache.layers]
        self._group(np.arange(rows), hidden)

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            rearrange(self.cache, sources)
            self.position = self.position[torch.from_numpy(sources).to(self.device)]
            self._group(self.groups.prompt_of[sources], self.groups.hidden)
        self.position = self.position + 1
        unread = self.groups.hidden.new_zeros(1, 1, 1, 1)  # a mask of four dimensions is taken for whole
        self._forward(torch.from_numpy(tokens).to(self.device).unsqueeze(1), unread, self.position.unsqueeze(1))

    def _group(self, prompt_of: np.ndarray, hidden: Tensor) -> None:
        kept = np.unique(prompt_of)
        if 2 * len(kept) <= len(hidden):  # the others are finished
            index = torch.from_numpy(kept).to(self.device)
            for layer in self.cache.layers:
                layer.keep_prompts(index)
            prompt_of, hidden = np.searchsorted(kept, prompt_of), hidden[index]
        self.groups = Groups(prompt_of, hidden)
        for layer in self.cache.layers:
            layer.groups = self.groups


class Uncached:
    """Beginnings of one length, each step computed from the first token on; arguments as of `Cached`."""

    def __init__(self, model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0):
        self.model = model
        self.ids = torch.tensor([list(ids) for ids in beginnings], device=next(model.parameters()).device)  # (U, L)
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        self._forward()

    def advance(self, sources: np.ndarray | None, tokens: np.ndarray) -> None:
        if sources is not None:
            self.ids = self.ids[torch.from_numpy(sources).to(self.ids.device)]
        self.ids = torch.cat([self.ids, torch.from_numpy(tokens).to(self.ids.device).unsqueeze(1)], dim=1)
        self._forward()

    def _forward(self) -> None:
        self.logits = self.model(input_ids=self.ids, use_cache=False, **self.options).logits[:, -1].float()


class ByLength:
    """Beginnings in a batch for each length: none is padded, and none will be, since all grow by a token a step.

    Args:
        kind: of the batches, `Cached` or `Uncached`; the other arguments are theirs.
    """

    def __init__(
        self,
        kind: Callable[..., Beginnings],
        model: nn.Module,
        beginnings: Sequence[Ids],
        most_rows: int = 0,
        most_tokens: int = 0,
    ):
        lengths = np.array([len(ids) for ids in beginnings])
        distinct, self.part = np.unique(lengths, return_inverse=True)  # (U,) which batch a slot is in
        self.place = np.zeros(len(lengths), np.int64)  # (U,) and its row there
        self.parts = []
        for number in range(len(distinct)):
            here = np.flatnonzero(self.part == number)
            self.place[here] = np.arange(len(here))
            self.parts.append(kind(model, [beginnings[u] for u in here], most_rows, most_tokens))
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


def _by_length(model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0) -> ByLength:
    return ByLength(Cached, model, beginnings, most_rows, most_tokens)


def _uncached(model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0) -> ByLength:
    return ByLength(Uncached, model, beginnings, most_rows, most_tokens)


def fixed(model: nn.Module, beginnings: Sequence[Ids], most_rows: int = 0, most_tokens: int = 0) -> FixedShape:
    """As `Cached`, and every step of one shape.

    Raises:
        ModelError: the model's cache cannot be of a fixed shape, or its attention windows are counted from the end of
            the buffer (a trial is shorter than they are).
    """
    if attention_window(base_of(model).config.get_text_config()) == 0:
        raise ModelError("its attention windows are counted from the end of the buffer")
    first = Cached(model, beginnings)
    most_rows, most_tokens = max(most_rows, len(beginnings)), max(most_tokens, first.mask.shape[1] + 1)
    room = {"most_rows": most_rows, "most_tokens": most_tokens}
    return FixedShape(model, first.cache, first.mask, first.position, first.options, first.logits, **room)


WAYS: dict[str, Callable[..., Beginnings]] = {
    "captured": fixed,
    "padded": Cached,
    "by length": _by_length,
    "uncached": _uncached,
}
UNCAPTURED = "without a CUDA graph"
COSTS = {
    "by length": "one prompt length at a time",
    "uncached": "without a cache, each step anew from the first token, which is slow",
}

# The way of each model that was tried, by attention implementation and dtype; and why prompts are not shared, if so.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


def begin(model: nn.Module, beginnings: Sequence[Ids], *, most_rows: int = 0, most_tokens: int = 0) -> Beginnings:
    """Run a model over beginnings, in the first way that is right for it; in eval mode and without gradient.

    Args:
        model: a causal `transformers` model.
        beginnings: U token id lists, of one token at least.
        most_rows, most_tokens: as of `Cached`.
    """
    model = uncompiled(model)
    way = way_of(model)
    make = WAYS[way]
    if way == "padded" and 2 * len(beginnings) <= most_rows and max(map(len, beginnings)) >= WORTH_SHARING:
        make = AfterPrompts if holds_prompts_once(model) else make
    return make(model, beginnings, most_rows, most_tokens)


def way_of(model: nn.Module) -> str:
    """The key of `WAYS` that a model is decoded by. Where it costs time (`COSTS`), a line says so, once a model.

    The answer is kept as long as the model lives. Logits may differ by what `supports_packing` allows.
    """
    model = uncompiled(model)
    plain, captures = is_plain(model), may_capture(model)
    if plain and not captures:
        return "padded"
    known = _tried.setdefault(model, {})
    parameter = next(model.parameters())
    key = (attention_of(model), parameter.dtype)
    if key not in known:
        reason = ""
        for way, make in WAYS.items():
            if way == "captured" and not captures:
                continue
            known_right = way == "uncached" or (way == "padded" and plain)
            defect = None if known_right else _try(model, make)
            if defect is None:
                break
            reason = reason or defect
        known[key] = way
        if reason and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            name = type(base_of(model)).__name__
            print(f"rlseq: {name} is decoded {COSTS.get(way, UNCAPTURED)}: {reason}", flush=True)
    return known[key]


def holds_prompts_once(model: nn.Module) -> bool:
    """Whether `AfterPrompts` is right for a model, by one trial; remembered as `way_of` is."""
    known = _tried.setdefault(model, {})
    key = ("prompts", attention_of(model), next(model.parameters()).dtype)
    if key not in known:
        known[key] = _try(model, AfterPrompts) or ""
    return not known[key]


def is_plain(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own that takes masks and positions and caches keys and values alone."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or type(base).__module__.startswith("transformers_modules"):
        return False
    if not {"attention_mask", "position_ids", "past_key_values"} <= forward_parameters(model).keys():
        return False
    return all(map(_holds_tokens, DynamicCache(config=model.config).layers))


def _holds_tokens(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _try(model: nn.Module, make: Callable[..., Beginnings]) -> str | None:
    """Why a way is wrong for a model, or None if it is right (or if nothing can be told: the logits are not finite)."""
    noise = np.random.default_rng(0)  # its own generator: the global random state is the run's
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    held = [noise.integers(vocabulary, size=n).tolist() for n in TRIED_LENGTHS]

    def alone() -> Tensor:
        rows = [torch.tensor([ids], device=device) for ids in held]
        return torch.stack([model(input_ids=row, use_cache=False).logits[0, -1].float() for row in rows])

    found, expected = [], [alone()]
    if not torch.isfinite(expected[0]).any():
        return None
    try:
        beginnings = make(model, held)
        found.append(beginnings.logits)
        for sources in TRIED_SOURCES:
            index = None if sources is None else np.array(sources)
            held = [held[s] for s in (range(len(held)) if sources is None else sources)]
            tokens = noise.integers(vocabulary, size=len(held))
            held = [[*ids, token] for ids, token in zip(held, tokens.tolist(), strict=True)]
            beginnings.advance(index, tokens)
            found.append(beginnings.logits.clone())  # a graph writes the next step's over them
            expected.append(alone())
        if getattr(beginnings, "refused", None):
            return f"its step cannot be captured ({beginnings.refused})"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse cache, mask or positions in any way; the reason is handed on
        return f"its forward does not decode from such a cache ({type(error).__name__}: {str(error).splitlines()[0]})"
    got, wanted = torch.cat(found), torch.cat(expected)
    magnitude = wanted[torch.isfinite(wanted)].abs().max().item()
    dtype = next(model.parameters()).dtype
    allowed = LOGIT_TOLERANCE.get(dtype, LOGIT_TOLERANCE[torch.float32]) * magnitude
    off = (got - wanted).abs().nan_to_num(nan=0.0 if torch.equal(got.isnan(), wanted.isnan()) else torch.inf)
    off = torch.where(got == wanted, 0.0, off)  # ∞ − ∞
    share = (off > allowed).any(-1).float().mean().item()
    if share <= (FLIPS if dtype in (torch.float16, torch.bfloat16) else 0.0):
        return None
    return f"logits from the cache differ by up to {off.max().item():.3g} from uncached ones (allowed: {allowed:.3g})"
