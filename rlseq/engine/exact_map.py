"""Exact search (branch and bound) for the most likely completion of a prompt."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlseq.engine.beam import as_rollouts, beam
from rlseq.engine.decoding.kv_budget import rows_within
from rlseq.engine.float64 import float64_device, to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.model.info import eval_mode, forward_parameters
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Beam
from rlseq.errors import ConfigError, ModelError
from rlseq.types import Prompt, Rollout

ROUNDING = 1e-6  # nats: completions whose log-probs are this close count as equally likely
TOGETHER = 32  # prefixes expanded in one pass; the result of an unproven search depends on it


def validate_cache(config: Any, accepts: Collection[str] = ("past_key_values",)) -> None:
    """Raise if a model's cache holds more than keys and values: exact search could not return to a prefix.

    Args:
        config: the model's; the model need not be loaded.
        accepts: parameters of the model's forward, where they are known.

    Raises:
        ModelError: says what the cache holds, and what to use instead.
    """
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    held = sorted(kind.__name__ for kind in layers - {DynamicLayer, DynamicSlidingWindowLayer})
    if held or "past_key_values" not in accepts:
        found = f"keeps states of its own ({', '.join(held)})" if held else "takes no cache of keys and values"
        raise ModelError(
            f"exact_map needs a cache of keys and values alone, and this model ({config.model_type}) {found}. Use beam "
            "search, which runs for every model: the strategy beam, or rlseq.engine.beam.beam (and leave map out of "
            "--studies)."
        )


class Exact(NamedTuple):
    """What an exact search found; unpacks as (completion_ids, log_prob, proven)."""

    completion_ids: tuple[int, ...]
    log_prob: float
    proven: bool


def exact_map(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    max_nodes: int = 20_000,
    width: int = 5,
    start: Sequence[int] | None = None,
    batch_rows: int = TOGETHER,
) -> Exact:
    """Find the most likely completion of a prompt, over all that end with a stop id within max_new_tokens.

        y* = argmax_y Σ_t log p(y_t | x, y_<t)

    Depth-first branch and bound on the model's own log-probs (Stahlberg & Byrne 2019, algorithm 1). A log-prob is
    at most 0, so no completion is likelier than any of its prefixes: a prefix that is not likelier than the best
    completion known so far is dropped with all that begins with it, and when none is left that one is the best.
    Children are explored in order of probability, up to `batch_rows` prefixes of one length in a forward pass,
    which gets their keys and values from a cache; in that it departs from the paper, which expands one at a time.

    Args:
        model: any causal transformers model with a standard KV cache.
        prompt_ids: token ids of the prompt, one at least.
        max_new_tokens: length of the longest completion, the stop id counted.
        stop_ids: ids that end a completion; the one met is part of it.
        max_nodes: prefixes that are expanded (run through the model), the empty one counted, at most.
        width: of the beam search whose hypothesis, if it ends with a stop id, is the first bound.
        start: token ids of a completion to start from instead, without a beam search; one that does not end is
            ignored.
        batch_rows: prefixes expanded together; bounds memory. 1 expands the fewest.

    Returns:
        The most likely completion found, its log-prob (nats), and whether it is proven to be the most likely one
        (up to rounding: of the logits, and `ROUNDING`): False where the budget of nodes ended the search. Of equally
        likely ones it is the first met, and the start is met first.

    Raises:
        ConfigError: max_new_tokens, max_nodes, width or batch_rows below 1; no prompt or stop ids.
        ModelError: the model's cache holds states (`validate_cache`); or no completion has a log-prob above −inf (are
            the logits NaN?).
    """
    for name, value in {"max_new_tokens": max_new_tokens, "max_nodes": max_nodes, "batch_rows": batch_rows}.items():
        if value < 1:
            raise ConfigError(f"exact_map: {name} is {value}; expected at least 1")
    prompt = tuple(torch.as_tensor(prompt_ids).flatten().tolist())
    stops = frozenset(stop_ids)
    if not prompt or not stops:
        raise ConfigError(f"exact_map: {'prompt_ids' if not prompt else 'stop_ids'} is empty; expected at least one id")
    validate_cache(model.config, forward_parameters(model))
    if start is None:
        alone, of_width = [Prompt("", "", prompt)], Beam(width=width)
        [[found]] = beam(model, alone, max_new_tokens=max_new_tokens, strategy=of_width, stop_ids=stops)
        start = found.completion_ids
    ends = bool(start) and start[-1] in stops and len(start) <= max_new_tokens
    best = tuple(start) if ends else ()
    bound = to_float64(score(model, [prompt], [best])[0]).sum().item() if ends else -math.inf
    return _search(model, prompt, stops, max_new_tokens, best, bound, max_nodes=max_nodes, batch_rows=batch_rows)


def _search(
    model: Any,
    prompt: tuple[int, ...],
    stops: frozenset[int],
    max_new_tokens: int,
    best: tuple[int, ...],
    bound: float,
    *,
    max_nodes: int,
    batch_rows: int = TOGETHER,
) -> Exact:
    """`exact_map` from a completion that ends and its log-prob, or from none and −inf."""
    with torch.no_grad(), eval_mode(model):
        search = _BranchAndBound(model, prompt, stops, max_new_tokens, best, bound)
        proven = search.run(max_nodes, batch_rows)
    if not math.isfinite(search.bound):
        raise ModelError(
            "exact_map: no completion that ends with a stop id has a log-prob above −inf; are the logits NaN, or is "
            f"every stop id of {sorted(stops)} masked?"
        )
    return Exact(search.best, search.bound, proven)


def exact_map_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    max_nodes: int = 20_000,
    width: int = 5,
    tokenizer: Any | None = None,
    batch_rows: int = 256,
    max_kv_gb: float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[list[Rollout], list[bool]]:
    """`exact_map` of each prompt, from the hypotheses of one beam search: a rollout each, and whether it is proven.

    Log-probs are the model's own, by teacher forcing of what was found. Arguments as `rlseq.engine.sampling.sample`;
    `batch_rows` is of the beam search.

    Raises:
        ConfigError: the budget for the KV cache does not hold the prefixes that are expanded together.
        ModelError: as `exact_map`.
    """
    validate_cache(model.config, forward_parameters(model))
    if max_kv_gb is not None and prompts:
        tokens = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
        rows = rows_within(model, max_kv_gb, tokens, together=max(width, TOGETHER))
        batch_rows = min(batch_rows, rows // width)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    starts = beam(model, prompts, strategy=Beam(width=width), batch_rows=batch_rows, **common)
    stops, found, proofs = frozenset(stop_ids), [], []
    for prompt, (start,) in zip(prompts, starts, strict=True):
        ends = start.finish_reason == "stop"
        best, bound = (start.completion_ids, start.logprob) if ends else ((), -math.inf)
        ids, _, proven = _search(model, prompt.prompt_ids, stops, max_new_tokens, best, bound, max_nodes=max_nodes)
        found.append(ids)
        proofs.append(proven)
        if progress is not None:
            progress(1)
    logprobs = score(model, [prompt.prompt_ids for prompt in prompts], found)
    rollouts = as_rollouts(prompts, found, logprobs, stop_ids, tokenizer, "exact_map", StopStrings((), tokenizer))
    return [rollout for (rollout,) in rollouts], proofs


@dataclass
class _Level:
    """Prefixes of one length that wait to be expanded, likeliest first, and the cache of their parents."""

    cache: DynamicCache
    prefixes: list[tuple[int, ...]]  # of the parents, by row of the cache
    parents: torch.Tensor  # (N,) row of the cache
    tokens: torch.Tensor  # (N,)
    logprobs: torch.Tensor  # (N,) of the prefix with its token, descending


class _BranchAndBound:
    """The state of one exact search: the best completion so far, its log-prob, and what is yet to be explored."""

    def __init__(
        self,
        model: Any,
        prompt: tuple[int, ...],
        stops: frozenset[int],
        longest: int,
        best: tuple[int, ...],
        bound: float,
    ):
        self.model, self.prompt, self.longest = model, prompt, longest
        self.best, self.bound = best, bound
        self.device = next(model.parameters()).device
        self.exact = float64_device(self.device)  # where log-probs and the children chosen by them are
        self.stops = torch.tensor(sorted(stops), device=self.exact)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}

    def run(self, max_nodes: int, batch_rows: int) -> bool:
        """Explore until nothing can be better, which is proof (True), or until the budget is spent."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([self.prompt], device=self.device)
        levels = [self._expand(cache, ids, [()], torch.zeros(1, dtype=torch.float64, device=self.exact))]
        nodes = 1
        while levels:
            level = levels[-1]
            alive = int((level.logprobs > self.bound + ROUNDING).sum())  # they come first
            if alive == 0:
                levels.pop()
                continue
            if nodes == max_nodes:
                return False
            count = min(alive, batch_rows, max_nodes - nodes)
            nodes += count
            rows, tokens, logprobs = level.parents[:count], level.tokens[:count], level.logprobs[:count]
            prefixes = [
                (*level.prefixes[row], token) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
            ]
            if count == alive:
                levels.pop()
            else:
                level.parents, level.tokens = level.parents[count:alive], level.tokens[count:alive]
                level.logprobs = level.logprobs[count:alive]
            cache, ids = _rows_of(level.cache, rows.to(self.device)), tokens.unsqueeze(1).to(self.device)
            levels.append(self._expand(cache, ids, prefixes, logprobs))
        return True

    def _expand(
        self, cache: DynamicCache, ids: torch.Tensor, prefixes: list[tuple[int, ...]], logprobs: torch.Tensor
    ) -> _Level:
        """Run ids (B, L) after what the cache holds, take the completions that end here, and return the rest."""
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.size(1), device=self.device).expand(ids.shape)
        output = self.model(
            input_ids=ids,
            attention_mask=torch.ones(len(ids), past + ids.size(1), dtype=torch.long, device=self.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self.last_only,
        )
        children = to_float64(output.logits[:, -1]).log_softmax(-1) + logprobs.unsqueeze(1)  # (B, V)
        ends = children[:, self.stops]  # (B, S)
        if (likeliest := ends.max().item()) > self.bound + ROUNDING:
            row, stop = divmod(int(ends.argmax()), len(self.stops))
            self.best, self.bound = (*prefixes[row], int(self.stops[stop])), likeliest
        children[:, self.stops] = -math.inf
        if len(prefixes[0]) + 2 > self.longest:  # a child needs room for a stop id after it
            children.fill_(-math.inf)
        rows, tokens = (children > self.bound + ROUNDING).nonzero(as_tuple=True)
        values, order = children[rows, tokens].sort(descending=True, stable=True)
        return _Level(output.past_key_values, prefixes, rows[order], tokens[order], values)


def _rows_of(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of some rows of another, which stays as it is: layers are shared until they are written to."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_select_indices(rows)
    return copied
