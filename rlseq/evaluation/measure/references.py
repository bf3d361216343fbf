"""References by teacher forcing: how likely they are, whether strategies can generate them, and a check of generation.

Greedy decoding and teacher forcing compute one thing on two roads. Greedy takes the argmax given its own tokens, and
as long as those are the reference's, teacher forcing has asked for the same argmax. So greedy follows a reference
exactly as far as the teacher-forced argmaxes are right, and reproduces it if and only if all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import TeacherForced, teacher_force
from rlseq.engine.strategies import Sample, Strategy
from rlseq.errors import ConsistencyError
from rlseq.evaluation.metrics import PASS_AT
from rlseq.evaluation.statistics import CHANCE, COMPLETION, LIKELIHOOD, RowStatistics, Source
from rlseq.types import Prompt, Rollout

NGRAM = 4  # tokens of the n-grams whose repetition is counted
# A margin (logits) below which rounding may choose another argmax: the sampler's cached steps and one packed pass add
# up in other orders. In float32 that moves logits by some 1e-5; wrong positions or masks move them by tenths and more.
NEAR_TIE = 1e-3
# Of weights in 16 bits: twice the spacing of their logits between 16 and 32.
NEAR_TIES = {torch.bfloat16: 2 * 2**-3, torch.float16: 2 * 2**-6}
# What may disagree beyond near ties, the larger of the two: matrix products in TF32, say, round more coarsely than
# NEAR_TIE allows for. A fault of padding, positions or cache reaches many rows.
TOLERATED_ROWS, TOLERATED_SHARE = 1, 0.001
LONG_REFERENCE = 64  # mean tokens a reference from which it is a text rather than an answer
_ANSWER_MARKS = ("####", "\\boxed")
SAMPLING_ROUNDING = 1e-9  # of an exact chance against a share, beside its standard errors
_AGREEMENT = Source("agreement")  # of a row under greedy decoding


def force_references(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    references: Sequence[Sequence[tuple[int, ...]]],
    strategies: Iterable[Strategy],
) -> list[list[TeacherForced]]:
    """Teacher-force every reference of N rows, once.

    Args:
        references: by row the distinct references as token ids, stop included.
        strategies: those of the evaluation; `warped_by` says which of them get log-probs of their own.

    Returns:
        For each row what was found of its references, in their order.
    """
    pairs = [(row, ids) for row, found in enumerate(references) for ids in found]
    prompt_ids, ids = [prompts[row].prompt_ids for row, _ in pairs], [ids for _, ids in pairs]
    forced: list[list[TeacherForced]] = [[] for _ in prompts]
    for (row, _), found in zip(
        pairs, teacher_force(model, prompt_ids, ids, strategies=warped_by(strategies)), strict=True
    ):
        forced[row].append(found)
    return forced


def warped_by(strategies: Iterable[Strategy]) -> list[Sample]:
    """The sampling strategies whose distribution is not the model's own."""
    return [strategy for strategy in strategies if isinstance(strategy, Sample) and strategy != Sample()]


def likelihood_rows(texts: Sequence[Sequence[str]], forced: Sequence[Sequence[TeacherForced]]) -> list[RowStatistics]:
    """Statistics of how likely each row's references, of these texts, are; empty where it has none."""
    statistics: list[RowStatistics] = [{} for _ in texts]
    for written, found, mine in zip(texts, forced, statistics, strict=True):
        if not found:
            continue
        logprobs = [to_float64(reference.logprobs).sum().item() for reference in found]
        right = [int(reference.right.sum()) for reference in found]
        lengths = [len(reference.logprobs) for reference in found]
        p = sum(math.exp(logprob) for logprob in logprobs)
        mine |= {
            LIKELIHOOD("nll"): -sum(logprobs),
            LIKELIHOOD("tokens"): float(sum(lengths)),
            LIKELIHOOD("sequence_logprob"): sum(logprobs),
            LIKELIHOOD("references"): float(len(found)),
            LIKELIHOOD("expected_accuracy"): p,
            LIKELIHOOD("correct_tokens"): float(sum(right)),
            LIKELIHOOD("matched_rows"): float(any(n == length for n, length in zip(right, lengths, strict=True))),
            LIKELIHOOD("bytes"): float(sum(len(text.encode()) for text in written)),
            LIKELIHOOD("rows"): 1.0,
        }
        for k in PASS_AT:
            mine[LIKELIHOOD("pass_at", k)] = float(-np.expm1(k * np.log1p(-p))) if p < 1 else 1.0
    return statistics


def generation_rows(
    strategy: Sample,
    forced: Sequence[Sequence[TeacherForced]],
    strategies: Iterable[Strategy],
    max_new_tokens: int,
    cut: Sequence[Sequence[bool]],
) -> list[RowStatistics]:
    """Statistics of each row's exact chance that a strategy generates one of its references.

        p_i = Σ_r q(r | x_i)   over the distinct references r

    q is the distribution that the strategy samples from: temperature and truncation, each renormalised, along r. A
    reference that q gives no mass, that is longer than `max_new_tokens` or that a stop string cuts is never generated
    and adds 0.

    Args:
        strategy: one of `strategies`, those that `force_references` was given.
        cut: of each row's references, which a stop string cuts.
    """
    warped = warped_by(strategies)
    place = warped.index(strategy) if strategy in warped else None
    statistics: list[RowStatistics] = [{} for _ in forced]
    for found, unfit, mine in zip(forced, cut, statistics, strict=True):
        if not found:
            continue
        tokens = [reference.logprobs if place is None else reference.warped[place] for reference in found]
        fits = [len(t) <= max_new_tokens and not is_cut for t, is_cut in zip(tokens, unfit, strict=True)]
        logprobs = [to_float64(t).sum().item() if fit else -math.inf for t, fit in zip(tokens, fits, strict=True)]
        never = sum(logprob == -math.inf for logprob in logprobs)
        mine |= {
            CHANCE("expected_accuracy"): sum(math.exp(logprob) for logprob in logprobs),
            CHANCE("unreachable"): float(never == len(found)),
            CHANCE("unreachable_references"): float(never),
            CHANCE("reference_rows"): 1.0,
            CHANCE("references"): float(len(found)),
        }
    return statistics


def sampled_and_exact(rows: Sequence[RowStatistics]) -> dict[str, Any] | None:
    """How far the share of samples that are references is from the exact chance of it.

        d = Σ_i (hits_i − n_i p_i) / Σ_i n_i,   standard error √(Σ_i n_i p_i (1 − p_i)) / Σ_i n_i

    over rows of n_i samples, of which hits_i are references. The error is that of the sampling alone, and comes from
    the exact chances: it is right where nothing was hit, too.

    Returns:
        {"difference", "standard_error", "agrees": within 3 of these, and rounding}; None without such rows.
    """
    keys = COMPLETION("with_references"), COMPLETION("exact_match"), CHANCE("expected_accuracy")
    found = [row for row in rows if keys[2] in row and row.get(keys[0])]
    if not found:
        return None
    n, hits, p = (np.array([row[key] for row in found]) for key in keys)
    p = p.clip(0, 1)
    difference = float((hits - n * p).sum() / n.sum())
    error = float(np.sqrt((n * p * (1 - p)).sum()) / n.sum())
    return {
        "difference": difference,
        "standard_error": error,
        "agrees": abs(difference) <= 3 * error + SAMPLING_ROUNDING,
    }


def completion_statistics(ids: Sequence[int], references: Sequence[Sequence[int]]) -> RowStatistics:
    """Statistics of one completion's tokens, stop included: repeated n-grams, and its length beside a reference's.

    Of references the closest in length counts, of two equally close ones the shorter (BLEU, Papineni et al. 2002).
    """
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    found = {COMPLETION("ngrams"): len(ngrams), COMPLETION("repeated_ngrams"): len(ngrams) - len(set(ngrams))}
    if references:
        closest = min((len(reference) for reference in references), key=lambda n: (abs(n - len(ids)), n))
        found |= {COMPLETION("compared_length"): len(ids), COMPLETION("closest_length"): closest}
    return {statistic: float(value) for statistic, value in found.items()}


def agreement_rows(
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Sequence[tuple[int, ...]]],
    forced: Sequence[Sequence[TeacherForced]],
    near_tie: float = NEAR_TIE,
    cut: Sequence[Sequence[bool]] | None = None,
) -> list[RowStatistics]:
    """Whether each row's greedy completion follows its references exactly as far as teacher-forced argmaxes are right.

    Where they part over a margin of at most `near_tie`, rounding may be the reason, and the row is counted apart. A
    completion that was cut has followed a reference as far as it goes, as has one whose reference a stop string cuts
    (`cut`, by row).
    """
    statistics: list[RowStatistics] = [{} for _ in groups]
    cut = [[False] * len(ids) for ids in references] if cut is None else cut
    for (greedy,), ids, found, ends, mine in zip(groups, references, forced, cut, statistics, strict=True):
        if not ids:
            continue
        limits = [len(greedy.completion_ids) if greedy.finish_reason == "length" or end else None for end in ends]
        margins = [
            _parting_margin(_common(greedy.completion_ids, reference), one, limit)
            for reference, one, limit in zip(ids, found, limits, strict=True)
        ]
        worst = max(margins)
        mine |= {
            _AGREEMENT("rows"): 1.0,
            _AGREEMENT("agree"): float(worst < 0),
            _AGREEMENT("near_ties"): float(0 <= worst <= near_tie),
            _AGREEMENT("disagree"): float(worst > near_tie),
            _AGREEMENT("reproduced"): float(greedy.completion_ids in ids),
        }
    return statistics


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parting_margin(followed: int, reference: TeacherForced, cut: int | None) -> float:
    """|Margin| of the token where generation and teacher forcing part; −1 if they do not."""
    wrong = (~reference.right).nonzero()
    right = int(wrong[0]) if len(wrong) else len(reference.right)
    if cut is not None:
        right = min(right, cut)
    return -1.0 if followed == right else abs(reference.margins[min(followed, right)].item())


def agreement(rows: Sequence[RowStatistics]) -> dict[str, int] | None:
    """Counts of rows: checked, where greedy and teacher forcing agree, part at a near tie, or disagree; None if none.

    `reproduced` are those of them whose greedy completion is one of the references.
    """
    names = ("rows", "agree", "near_ties", "disagree", "reproduced")
    counts = {name: int(sum(row.get(_AGREEMENT(name), 0.0) for row in rows)) for name in names}
    return counts if counts["rows"] else None


def near_tie_of(model: torch.nn.Module) -> float:
    """The margin of an argmax within which rounding may decide, in a model's precision."""
    return NEAR_TIES.get(getattr(model, "dtype", torch.float32), NEAR_TIE)


def check_agreement(name: str, rows: Sequence[RowStatistics], keys: Sequence[str], near_tie: float = NEAR_TIE) -> None:
    """Raise ConsistencyError if greedy decoding and teacher forcing disagree on more rows than rounding explains.

    Args:
        name: of the model.
        rows: the statistics of *all* rows under greedy decoding, so that every process comes to the same end.
        keys: of the rows.
        near_tie: the margin with which the rows were counted.
    """
    counts = agreement(rows)
    if counts is None or counts["disagree"] <= max(TOLERATED_ROWS, TOLERATED_SHARE * counts["rows"]):
        return
    parted = [key for key, row in zip(keys, rows, strict=True) if row.get(_AGREEMENT("disagree"))]
    raise ConsistencyError(
        f"model {name!r}: greedy decoding and teacher forcing disagree on {counts['disagree']:,} of "
        f"{counts['rows']:,} rows (for example {', '.join(parted[:3])}). Greedy decoding must follow a reference "
        f"exactly as far as the teacher-forced argmaxes are right; near ties (margins within {near_tie:g}) aside, "
        f"at most {TOLERATED_ROWS} row or {TOLERATED_SHARE:.1%} of the rows may differ. The model gives other logits "
        "when it generates than when it is scored, so that no number of this evaluation can be trusted: look for a "
        "fault in how it takes padding, position ids or its KV cache."
    )


def solution_note(texts: Iterable[str], mean_tokens: float, rewards: Collection[str]) -> str | None:
    """A warning where references are solutions or long texts and the rewards judge something else than equality.

    That is the case where they have more than `LONG_REFERENCE` tokens in the mean, or most have several lines or mark
    an answer at their end (`####`, `\\boxed`).

    Args:
        texts: all references.
        mean_tokens: their mean length in tokens.
        rewards: names of the rewards.
    """
    shapes = [("\n" in text.strip()) or any(mark in text for mark in _ANSWER_MARKS) for text in texts]
    if not set(rewards) - {"exact_match"} or not shapes:
        return None
    if mean_tokens <= LONG_REFERENCE and sum(shapes) <= len(shapes) / 2:
        return None
    return (
        f"The references are long or worked solutions ({mean_tokens:,.0f} tokens in the mean), and rewards judge what "
        "is generated by more than equality with them. Their NLL then says how likely the wording of these solutions "
        "is (style), not how probable a right answer is: a right answer in other words is in none of the likelihoods, "
        "and expected accuracy and pass@k count the references' own words alone."
    )
