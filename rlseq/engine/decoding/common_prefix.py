"""What many prompts begin with (a system prompt, an instruction, an example) is computed once for all of them.

Prompts that begin alike are found among those that are computed together, and their *common prefix* goes through the
model once. Each prompt then continues from its keys and values. Positions are those that its tokens have alone, and
what it does not begin with is masked, so that logits are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlseq.engine.model.info import attention_of, base_of, forward_parameters

Ids = Sequence[int]

LEAST_SAVED = 512  # tokens: below, a second forward pass costs as much
LEAST_SHARE = 0.2  # of the tokens of all prompts
MASKED = ("sdpa", "eager")  # attention that takes a mask with gaps


@dataclass(frozen=True)
class CommonPrefixes:
    """What U prompts begin with.

    Attributes:
        ids: C lists of token ids.
        of: (U,) the common prefix of each prompt; −1: none.
    """

    ids: list[Ids]
    of: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(U,) tokens of each prompt's common prefix."""
        return np.array([*map(len, self.ids), 0])[self.of]


def find_common_prefixes(prompts: Sequence[Ids]) -> CommonPrefixes | None:
    """The prefixes that save the most tokens, each shorter than every prompt that begins with it; None: too little.

    In sorted order, prompts stay together where neighbours share at least so many tokens; the number is the one, of all
    that occur, that saves the most.
    """
    total = sum(map(len, prompts))
    if total < LEAST_SAVED:
        return None
    order = sorted(range(len(prompts)), key=lambda u: tuple(prompts[u]))
    common = np.array([_shared(prompts[a], prompts[b]) for a, b in pairwise(order)], np.int64)
    best, saved = 0, 0
    for least in np.unique(common[common > 0]).tolist():
        now = sum((end - start - 1) * common[start : end - 1].min() for start, end in _runs(common, least))
        if now > saved:
            best, saved = least, now
    if saved < max(LEAST_SAVED, LEAST_SHARE * total):
        return None
    ids: list[Ids] = []
    of = np.full(len(prompts), -1)
    for start, end in _runs(common, best):
        of[[order[place] for place in range(start, end)]] = len(ids)
        ids.append(prompts[order[start]][: int(common[start : end - 1].min())])
    return CommonPrefixes(ids, of)


def _shared(a: Ids, b: Ids) -> int:
    """Tokens that both begin with, fewer than either has."""
    most = min(len(a), len(b)) - 1
    return next((n for n in range(most) if a[n] != b[n]), most)


def _runs(common: np.ndarray, least: int) -> list[tuple[int, int]]:
    """(start, end) of runs of two prompts or more in which neighbours share `least` tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], common >= least, [False]]).astype(np.int8)))
    return [(start, end + 1) for start, end in edges.reshape(-1, 2).tolist()]


def serves(model: nn.Module) -> bool:
    """Whether prompts can continue from a prefix: plain attention, a cache of tokens, masks and positions."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or type(base).__module__.startswith("transformers_modules"):
        return False
    if attention_of(model) not in MASKED:
        return False
    if not {"attention_mask", "position_ids", "past_key_values"} <= forward_parameters(model).keys():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def compute_common_prefixes(model: nn.Module, prefixes: CommonPrefixes) -> tuple[DynamicCache, Tensor]:
    """Run a model over the prefixes.

    Returns:
        Their cache, of C rows padded on the left, and the mask of the prompts' prefixes there, (U, L) long.
    """
    device = next(model.parameters()).device
    input_ids, mask = padded_left(prefixes.ids)
    input_ids, mask = input_ids.to(device), mask.to(device)
    accepted = forward_parameters(model)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {}),
    )
    of = torch.from_numpy(prefixes.of).to(device)
    return output.past_key_values, mask[of] * (of >= 0)[:, None]


def padded_left(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (U, L) of rows that end in the last column; padding is masked: any id will do."""
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for u, ids in enumerate(rows):
        input_ids[u, width - len(ids) :] = torch.tensor(ids)
        mask[u, width - len(ids) :] = 1
    return input_ids, mask


class ReadOnlyLayer(DynamicLayer):
    """The keys and values of prefixes for one forward pass of prompts, whose own are not kept: that would take memory.

    Args:
        layer: of the prefixes' cache, C rows.
        of: (U,) long, the common prefix of each prompt; one without has a mask that hides it.
    """

    def __init__(self, layer: Any, of: Tensor):
        super().__init__()
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self.keys, self.values, self.of = layer.keys, layer.values, of

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = (states.index_select(0, self.of) for states in (self.keys, self.values))
        keys, values = (torch.cat(pair, -2) for pair in zip(held, (key_states, value_states), strict=True))
        return keys, values


def read_only(cache: DynamicCache, prefixes: CommonPrefixes) -> DynamicCache:
    """The cache of prefixes as one forward pass of their prompts reads it."""
    first = cache.layers[0]
    of = torch.from_numpy(prefixes.of.clip(min=0)).to(first.keys.device)
    cache.layers = [ReadOnlyLayer(layer, of) for layer in cache.layers]
    return cache


def copy_rows(cache: DynamicCache, prefixes: CommonPrefixes) -> DynamicCache:
    """The cache of prefixes with a row for each prompt, to which its further tokens are added."""
    of = torch.from_numpy(prefixes.of.clip(min=0))
    for layer in cache.layers:
        layer.keys, layer.values = (x.index_select(0, of.to(x.device)) for x in (layer.keys, layer.values))
    return cache
