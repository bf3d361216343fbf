"""Thoughts of completions: how long they are, and how likely references are behind them, by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.thoughts import ThinkEnd
from rlseq.evaluation.statistics import THOUGHT, RowStatistics
from rlseq.types import Prompt, Rollout

Ids = tuple[int, ...]


def thought_rows(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Sequence[Ids]],
    think_end: ThinkEnd,
) -> list[RowStatistics]:
    """Statistics of the thoughts in each row's completions.

        log p(r | x_i, z) = Σ_t log p(r_t | x_i, z, r_<t)

    for each thought z that was closed and each reference r: one forward pass of prompt, the thought's own tokens and
    the reference, stop included, under the model's own distribution. Nothing is tokenised again. The thought is the
    tokens up to and including the one that completes `think_end`, and the whitespace tokens behind it. Of a reference
    with a `think_end` of its own (a chat template may put one there), what stands behind it counts.

    A thought that was never closed is left out, as is one with text of the answer in the token that closes it: the
    model took that text with the token. So is a reference of the latter kind.

    Args:
        groups: by row its completions.
        references: by row the distinct references as token ids; empty where there are none.
    """
    statistics: list[RowStatistics] = [
        {THOUGHT(name): 0.0 for name in ("samples", "length", "unclosed")} for _ in prompts
    ]
    pairs: dict[tuple[int, Ids, Ids], int] = {}  # (row, thought, reference) -> how often
    for row, (group, found) in enumerate(zip(groups, references, strict=True)):
        mine, answers = statistics[row], [answer for ids in found if (answer := _answer(ids, think_end))]
        if answers:
            forced = (
                "forced",
                "with_references",
                "reference_logprob",
                "reference_nll",
                "reference_tokens",
                "references",
            )
            mine |= {THOUGHT(name): 0.0 for name in forced}
        for rollout in group:
            ids = rollout.completion_ids
            length, closed = think_end.length(ids)
            mine[THOUGHT("samples")] += 1
            mine[THOUGHT("length")] += length
            mine[THOUGHT("unclosed")] += not closed
            if not answers:
                continue
            start = think_end.answer_start(ids)
            mine[THOUGHT("with_references")] += 1
            mine[THOUGHT("forced")] += start is not None
            for answer in answers if start is not None else ():
                pair = row, ids[:start], answer
                pairs[pair] = pairs.get(pair, 0) + 1
    prompt_ids = [prompts[row].prompt_ids for row, _, _ in pairs]
    logprobs = score(model, prompt_ids, [(*thought, *answer) for _, thought, answer in pairs])
    for ((row, _, answer), times), tokens in zip(pairs.items(), logprobs, strict=True):
        mine = statistics[row]
        logprob = times * to_float64(tokens[-len(answer) :]).sum().item()
        mine[THOUGHT("reference_logprob")] += logprob
        mine[THOUGHT("reference_nll")] -= logprob
        mine[THOUGHT("reference_tokens")] += times * len(answer)
        mine[THOUGHT("references")] += times
    return statistics


def _answer(reference: Ids, think_end: ThinkEnd) -> Ids:
    """The tokens of a reference behind its own thought; all of them if it has none, and none if they cannot be told."""
    if not think_end.length(reference)[1]:
        return reference
    start = think_end.answer_start(reference)
    return () if start is None else reference[start:]
