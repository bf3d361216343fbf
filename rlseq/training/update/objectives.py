"""rlseq's own objectives of a micro-batch: data in from the forward, one loss a prompt or row out.

Each returns the sum over the micro-batch of per-row losses; the trainer divides by the rows, so that no split of
a batch changes what is optimised. The equations are in `rlseq.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlseq.losses import (
    clipped_surrogate,
    expected_accuracy,
    max_rl,
    minimum_risk,
    reference_exact_references,
    reference_exact_weight,
)
from rlseq.training.rollouts import MicroBatch
from rlseq.training.update.forward import Ids, References, Scores


def reference_loss(references: References) -> Tensor | None:
    """Mean next-token loss of each prompt's references, summed over the rows they stand for; None without any."""
    counts = [references.prompt_of.count(prompt) for prompt in range(len(references.rows))]
    terms = [
        references.rows[prompt] / counts[prompt] * -logprobs.mean()
        for prompt, logprobs in zip(references.prompt_of, references.logprobs, strict=True)
    ]
    return torch.stack(terms).sum() if terms else None


def expected_accuracy_loss(references: References, max_rl_order: int | None = None) -> tuple[Tensor, Tensor]:
    """−P of each row, summed, and P of each distinct prompt (U,): exact, by teacher forcing alone.

    Args:
        references: of the micro-batch's prompts.
        max_rl_order: K; in place of −P the loss is then `max_rl`'s, −log P cut after K terms of its series.
    """
    logprobs = references.sequence_logprobs  # (N,)
    prompt_of = torch.tensor(references.prompt_of, device=logprobs.device)
    loss = expected_accuracy(logprobs, prompt_of, len(references.rows))  # (U,)
    P = -loss.detach()
    if max_rl_order is not None:
        loss = max_rl(logprobs, prompt_of, len(references.rows), order=max_rl_order)
    rows = torch.tensor(references.rows, device=logprobs.device, dtype=loss.dtype)
    return (rows * loss).sum(), P


def minimum_risk_loss(
    scores: Scores,
    totals: Tensor,
    completions: Sequence[Ids],
    mask: Tensor,
    *,
    num_generations: int,
    sharpness: float,
    reference_ids: Sequence[Sequence[Ids]],
    reference_rewards: Sequence[Sequence[float]],
) -> Tensor:
    """Expected risk over each group's distinct samples, its references among them where given; summed over rows.

    Args:
        scores: of B rows that are whole groups, one after the other.
        totals: (B,) rewards, NaN where abstained.
        completions: the B rows' ids; duplicates are told by them.
        mask: (B, T) bool.
        num_generations: G.
        sharpness: α.
        reference_ids, reference_rewards: of each row; empty: no references.
    """
    G = num_generations
    sequence = torch.where(mask, scores.logprobs, 0.0).sum(1)  # (B,)
    references = scores.references
    losses = []
    for start in range(0, len(completions), G):
        group = slice(start, start + G)
        logprobs, rewards = [sequence[group]], [totals[group]]
        ids = list(completions[group])
        if reference_ids and reference_ids[start]:
            number = references.of_row[start]
            mine = [x.sum() for x, of in zip(references.logprobs, references.prompt_of, strict=True) if of == number]
            logprobs.append(torch.stack(mine))
            rewards.append(totals.new_tensor(reference_rewards[start]))
            ids += reference_ids[start]
        reward = torch.cat(rewards)
        abstained = reward.isnan().tolist()
        known = [None if gone else x for x, gone in zip(ids, abstained, strict=True)]
        first = torch.tensor([x not in known[:i] for i, x in enumerate(ids)], device=totals.device)
        losses.append(minimum_risk(torch.cat(logprobs)[None], reward[None], sharpness=sharpness, mask_PG=first[None]))
    return G * torch.cat(losses).sum()


def reference_exact_loss(
    scores: Scores,
    batch: MicroBatch,
    *,
    num_generations: int,
    clip_low: float,
    clip_high: float,
    reference_rewards: Sequence[Sequence[float]],
) -> tuple[Tensor, Tensor]:
    """The references' share of the expected reward exactly, the rest by the rollouts that are no reference.

    Args:
        scores: of B rows and their prompts' references.
        batch: the rows, with what belongs to this objective.
        num_generations: G.
        clip_low, clip_high: of the ratio, where rollouts are used more than once.
        reference_rewards: of each row, its references' rewards, NaN where abstained.

    Returns:
        The sum over rows, and P of each row (B,).
    """
    references = scores.references
    device, dtype = scores.logprobs.device, scores.logprobs.dtype
    number, row = [], []  # of each reference of each row: which of the N it is, and of which row
    for b, prompt in enumerate(references.of_row):
        mine = [n for n, of in enumerate(references.prompt_of) if of == prompt]
        number += mine
        row += [b] * len(mine)
    logprobs = references.sequence_logprobs if references.logprobs else scores.logprobs.new_zeros(0)  # (N,)
    exact, P, baseline = reference_exact_references(
        logprobs[torch.tensor(number, dtype=torch.long, device=device)],
        torch.tensor([r for rewards in reference_rewards for r in rewards], device=device, dtype=dtype),
        torch.tensor(row, dtype=torch.long, device=device),
        batch.rest_reward.to(dtype),
    )  # (B,)
    weight = num_generations * reference_exact_weight(P, batch.num_rest, num_generations)
    totals = batch.totals.to(dtype)
    rest = ~batch.is_reference & ~totals.isnan()
    advantages = torch.where(rest, weight * (totals - baseline), 0.0)  # (B,)
    old = batch.old_logprobs
    surrogate = clipped_surrogate(
        scores.logprobs,
        scores.logprobs.detach() if old is None else old,
        advantages,
        batch.mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return exact.sum() + surrogate.sum(), P
