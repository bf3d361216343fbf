"""Sampling: P prompts × G samples → rollouts.

The batch holds distinct prefixes, not samples. Each unique prompt is prefilled once, and its samples share every later
step as long as they sample the same tokens. With the KV cache a step computes one token per prefix. A prefix that
branches is copied, and one that no row continues is dropped.

The noise of a token is a function of (seed, stream, prompt key, sample, position) alone. One uniform per token picks it
by inverse CDF, so a completion does not depend on its batch. Batch size, order and number of processes change only the
rounding of the logits (a token within rounding of a boundary of the CDF may then flip).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from rlseq.engine.decoding.backends import make_decoder
from rlseq.engine.decoding.kv_budget import rows_within
from rlseq.engine.model.info import eval_mode
from rlseq.engine.noise import pick, stream_keys, uniforms
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Greedy, Sample, Strategy
from rlseq.errors import ConfigError, ModelError
from rlseq.types import Prompt, Rollout

TILE_NUMBERS = 2**18  # logits that are worked on together on a CPU: 2 MB in float64
COMPACT_BELOW = 0.75  # finished rows leave the batch when less than this share of it is unfinished


def stop_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS first, then those the checkpoint declares.

    Raises:
        ModelError: neither declares one.
    """
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    found = [i for i in dict.fromkeys([tokenizer.eos_token_id, *declared]) if i is not None]
    if not found:
        raise ModelError("neither tokenizer nor model declares a token that ends a text; set the tokenizer's eos_token")
    return found


def sample(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_new_tokens: int,
    strategy: Strategy,
    seed: int,
    stream: int | str = 0,
    stop_ids: Collection[int],
    stop_strings: Sequence[str] = (),
    tokenizer: Any | None = None,
    samples: Sequence[Sequence[int]] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    batch_rows: int = 1024,
    max_kv_gb: float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[list[Rollout]]:
    """Continue each of P prompts G times.

    Args:
        model: any causal transformers model (`rlseq.engine.decoding.decoders`); its `generation_config` is not read.
        prompts: P prompts; equal `prompt_ids` share one prefill.
        num_samples: G; must be 1 for a strategy that is not stochastic.
        max_new_tokens: completions are cut after this many sampled tokens (finish_reason "length").
        strategy: `Greedy` or `Sample` (for beam search use `rlseq.engine.beam.beam`).
        seed, stream: name the noise. `stream` is the rollout batch in training; in evaluation the strategy's index, or
            the name of a study.
        stop_ids: ids that end a completion; the one met is part of it.
        stop_strings: texts that end a completion (`rlseq.engine.stop_strings`). The tokens up to the one that completes
            a string are the completion; the string is not part of `text`.
        tokenizer: decodes `text` and `text_with_special_tokens`; without one they are empty.
        samples: the sample indices of each prompt instead of 0..G-1, for groups that are spread over processes.
        prefixes: token ids that each completion of a prompt begins with, one list per prompt. They are part of the
            completion, with log-prob 0 and `loss_mask` False; noise positions count from the first sampled token.
        batch_rows: the most rows decoded together; bounds memory, changes no completion.
        max_kv_gb: a budget for the KV cache in gigabytes (`rows_within`), which may lower `batch_rows`; None: none.
        progress: called after each batch with the number of prompts finished.

    Returns:
        For each prompt its G rollouts, in the order of the sample indices.

    Raises:
        ConfigError: the strategy cannot be sampled, or asks for several equal completions; the numbers of prefixes
            and prompts differ; a prompt has no tokens; a stop string cannot be met; or the budget does not hold one
            row.
    """
    if not isinstance(strategy, (Greedy, Sample)):
        raise ConfigError(f"{strategy.spec!r} is a search, not a sampler; use rlseq.engine.beam.beam")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    wanted = [list(range(num_samples))] * len(prompts) if samples is None else [list(s) for s in samples]
    if not strategy.is_stochastic and any(len(s) > 1 for s in wanted):
        raise ConfigError(f"{strategy.spec} gives the same completion every time; num_samples must be 1")

    if prefixes is not None and len(prefixes) != len(prompts):
        raise ConfigError(f"{len(prefixes)} prefixes were given for {len(prompts)} prompts; expected one each")
    forced = [tuple(prefix) for prefix in prefixes] if prefixes is not None else [()] * len(prompts)
    if not all(p.prompt_ids or f for p, f in zip(prompts, forced, strict=True)):
        raise ConfigError("a prompt has no tokens; a completion needs one to follow")
    if max_kv_gb is not None and prompts:
        longest = max(len(p.prompt_ids) + len(f) for p, f in zip(prompts, forced, strict=True)) + max_new_tokens
        batch_rows = min(batch_rows, rows_within(model, max_kv_gb, longest))
    rollouts: list[list[Rollout]] = [[] for _ in prompts]
    strings, spec = StopStrings(stop_strings, tokenizer), strategy.spec
    with torch.no_grad(), eval_mode(model):
        for batch in _batches(prompts, wanted, batch_rows):
            rows = [(index, s) for index, some in batch for s in some]
            begun = [forced[index] for index, _ in rows]
            ids, logprobs, ended = _decode(
                model,
                [(*prompts[index].prompt_ids, *forced[index]) for index, _ in rows],
                stream_keys(seed, stream, [prompts[index].key for index, _ in rows], [s for _, s in rows]),
                max_new_tokens,
                strategy,
                frozenset(stop_ids),
                strings,
                begun,
            )
            ids = [[*prefix, *sampled] for prefix, sampled in zip(begun, ids, strict=True)]
            logprobs = [[0.0] * len(prefix) + of_row for prefix, of_row in zip(begun, logprobs, strict=True)]
            found = zip(rows, ids, logprobs, _texts(tokenizer, ids), ended, strict=True)
            for (index, s), row_ids, row_logprobs, (text, raw), whole in found:
                prompt = prompts[index]
                rollouts[index].append(
                    Rollout.from_ids(
                        prompt.key,
                        row_ids,
                        strings.text(row_ids, text, forced[index]),
                        sample=s,
                        loss_mask=(t >= len(forced[index]) for t in range(len(row_ids))),
                        logprobs=row_logprobs,
                        text_with_special_tokens=raw,
                        chat=not isinstance(prompt.prompt, str),
                        finish_reason="stop" if whole else "length",
                        strategy=spec,
                    )
                )
            if progress is not None:
                progress(sum(len(rollouts[index]) == len(wanted[index]) for index, _ in batch))
    return rollouts


def _texts(tokenizer: Any | None, ids: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """The text of each completion without and with special tokens; equal completions are decoded once."""
    if tokenizer is None:
        return [("", "")] * len(ids)
    distinct = list(dict.fromkeys(map(tuple, ids)))
    both = (tokenizer.batch_decode(distinct, skip_special_tokens=skipped) for skipped in (True, False))
    decoded = dict(zip(distinct, zip(*both, strict=True), strict=True))
    return [decoded[tuple(row)] for row in ids]


def _batches(
    prompts: Sequence[Prompt], wanted: list[list[int]], batch_rows: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield lists of (prompt index, samples of it): by length, so that little is padding, of at most `batch_rows` rows.

    A prompt with more samples than that continues in the next batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prompt_ids))
    batch: list[tuple[int, list[int]]] = []
    rows = 0
    for index in order:
        for start in range(0, len(wanted[index]), batch_rows):
            some = wanted[index][start : start + batch_rows]
            if batch and rows + len(some) > batch_rows:
                yield batch
                batch, rows = [], 0
            batch.append((index, some))
            rows += len(some)
    if batch:
        yield batch


def _decode(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    keys: np.ndarray,
    max_new_tokens: int,
    strategy: Greedy | Sample,
    stop_ids: frozenset[int],
    strings: StopStrings,
    prefixes: Sequence[Sequence[int]],
) -> tuple[list[list[int]], list[list[float]], list[bool]]:
    """Decode B rows together; return their token ids and log-probs, ragged, and whether each ended by itself.

    The decoder has a slot for each distinct prefix; `slot` says which one a row is at.

    Args:
        prefixes: of each row the last tokens of its prompt, where the completion is to begin with them.
    """
    device = next(model.parameters()).device
    stops = np.array(sorted(stop_ids))
    num_rows = len(prompt_ids)

    # One prefill per unique prompt.
    unique: dict[tuple[int, ...], int] = {}
    slot = np.array([unique.setdefault(tuple(ids), len(unique)) for ids in prompt_ids])  # (B,)
    longest = max(map(len, unique)) + max_new_tokens
    decoder = make_decoder(model, list(unique), max_rows=num_rows, max_tokens=longest)

    all_ids = np.zeros((num_rows, max_new_tokens), np.int64)
    all_logprobs = torch.zeros(num_rows, max_new_tokens, dtype=torch.float32, device=device)
    lengths = np.zeros(num_rows, np.int64)
    ended = np.zeros(num_rows, bool)
    rows = np.arange(num_rows)  # those that are not finished
    for step in range(max_new_tokens):
        token, logprobs = _next_tokens(decoder.logits, slot, strategy, uniforms(keys[rows], step))
        all_logprobs[torch.from_numpy(rows).to(device), step] = logprobs
        sampled = token.cpu().numpy()
        all_ids[rows, step] = sampled
        lengths[rows] = step + 1
        runs = ~np.isin(sampled, stops)
        if strings and runs.any():
            unfinished = rows[runs]
            sampled_so_far = all_ids[unfinished, : step + 1].tolist()
            runs[runs] = ~np.array(strings.reached(sampled_so_far, [prefixes[row] for row in unfinished]))
        ended[rows[~runs]] = True
        rows, slot, sampled = rows[runs], slot[runs], sampled[runs]
        if not len(rows) or step + 1 == max_new_tokens:
            break
        sources, tokens, slot = _branch(slot, sampled, len(decoder.logits))
        decoder.advance(sources, tokens)

    found = zip(all_ids.tolist(), all_logprobs.tolist(), lengths.tolist(), strict=True)
    ids, their_logprobs = zip(*((row[:n], row_logprobs[:n]) for row, row_logprobs, n in found), strict=True)
    return list(ids), list(their_logprobs), ended.tolist()


def _next_tokens(
    logits: torch.Tensor, slot: np.ndarray, strategy: Greedy | Sample, uniform: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each of B rows after the prefix at its slot, and its log-prob, (B,) each.

    On a CPU a few slots at a time, so that what is made of their logits stays in the processor's cache.

    Args:
        logits: (U, V) of the slots.
        slot, uniform: (B,) of the rows.
    """
    device, (num_slots, vocabulary) = logits.device, logits.shape
    size = max(1, TILE_NUMBERS // vocabulary) if device.type == "cpu" else num_slots
    order = np.argsort(slot, kind="stable")
    ends = np.searchsorted(slot[order], np.arange(0, num_slots + size, size))  # of each tile's rows
    token = torch.zeros(len(slot), dtype=torch.long, device=device)
    logprob = torch.zeros(len(slot), dtype=torch.float32, device=device)
    for number, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        rows, first = order[start:end], number * size
        tile, of = logits[first : first + size], slot[rows] - first
        of_tile, at = torch.from_numpy(of).to(device), torch.from_numpy(rows).to(device)
        if isinstance(strategy, Sample):
            logprobs = strategy.warp(tile)
            found = pick(logprobs, torch.from_numpy(uniform[rows]), of)
        else:
            logprobs = torch.log_softmax(tile, dim=-1)
            found = tile.argmax(-1)[of_tile]
        token[at], logprob[at] = found, logprobs[of_tile, found].to(logprob.dtype)
    return token, logprob


def _branch(slot: np.ndarray, sampled: np.ndarray, num_slots: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Give each distinct prefix a slot, after rows at `slot` (B,) sampled a token each.

    The first prefix that continues a slot stays there; the others take slots that no row continues, or new ones, so
    that little is copied. If less than COMPACT_BELOW of the slots are needed, all are assigned again.

    Returns:
        For each slot the slot that it continues (None: every slot continues itself); the token of each slot, 0 where no
        row continues; and the slot of each row, (B,).
    """
    base = int(sampled.max()) + 1
    pairs, pair = np.unique(slot * base + sampled, return_inverse=True)  # sorted by slot
    parent, token = np.divmod(pairs, base)
    if len(pairs) < COMPACT_BELOW * num_slots:
        return parent, token, pair
    stays = np.append(True, parent[1:] != parent[:-1])
    free = np.setdiff1d(np.arange(num_slots), parent)
    moved = np.flatnonzero(~stays)
    new = np.arange(num_slots, num_slots + max(0, len(moved) - len(free)))
    place = parent.copy()
    place[moved] = np.concatenate([free, new])[: len(moved)]
    tokens = np.zeros(num_slots + len(new), np.int64)
    tokens[place] = token
    if not len(moved):
        return None, tokens, place[pair]
    sources = np.arange(len(tokens))
    sources[place] = parent
    return sources, tokens, place[pair]
