"""The losses that TRL names by `loss_type`, beside the clipped surrogate, and how each becomes one number.

loss_type  of a token           of a micro-batch
grpo       clipped_surrogate    mean over a sequence's tokens, then over sequences
bnpo       clipped_surrogate    mean over the tokens
dr_grpo    clipped_surrogate    sum / (B · max_completion_length)
dapo       clipped_surrogate    sum / tokens of the optimizer step
luspo      clipped_surrogate    sum over a sequence's tokens, mean over sequences
cispo      cispo                as dapo
sapo       sapo                 as grpo
vespo      vespo                as dapo
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlseq.losses.masking import advantages_by_token, check_tokens, masked_mean
from rlseq.losses.policy import probability_ratio

MEANS_OVER_STEP = ("cispo", "dapo", "vespo")  # the others are means over a micro-batch
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # by `clipped_surrogate`

SMALLEST_LOG, LARGEST_LOG = math.log(1e-8), 20.0  # where VESPO holds the log of a sequence's ratio


def cispo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    largest: float,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """CISPO (MiniMax 2025, "MiniMax-M1", eq. 4): the ratio is clipped as a weight, which keeps every token's gradient.

        L = −sg(min(ρ, ρ_max))·A·log π(y_t)

    Args:
        logprobs_BT, old_logprobs_BT: (B, T) nats; the gradient flows through the first alone.
        advantages: (B,) or (B, T).
        mask_BT: (B, T) bool.
        largest: ρ_max, a ratio (not 1 + ε).
        level: of the ratio, as `probability_ratio` takes it.

    Returns:
        (B, T) losses, 0 where the mask is False.
    """
    weight = probability_ratio(logprobs_BT, old_logprobs_BT, mask_BT, level).clamp(max=largest).detach()
    losses = -weight * advantages_by_token(advantages, mask_BT) * torch.where(mask_BT, logprobs_BT, 0.0)
    return torch.where(mask_BT, losses, 0.0)


def sapo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    temperature_pos: float,
    temperature_neg: float,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """SAPO (Gao et al. 2025): a soft gate in place of the clip.

        L = −(4/τ)·σ(τ·(ρ − 1))·A        τ by the sign of A

    Args:
        logprobs_BT, old_logprobs_BT, advantages, mask_BT, level: as for `cispo`.
        temperature_pos, temperature_neg: τ where A is above 0, and elsewhere.

    Returns:
        (B, T) losses, 0 where the mask is False.
    """
    ratio = probability_ratio(logprobs_BT, old_logprobs_BT, mask_BT, level)
    advantages = advantages_by_token(advantages, mask_BT)
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return torch.where(mask_BT, -gate * advantages, 0.0)


def vespo(logprobs_BT: Tensor, advantages: Tensor, mask_BT: Tensor, *, weight: Tensor) -> Tensor:
    """VESPO: L = −φ·A·log π(y_t), with φ of `vespo_weight`, (B, 1) or (B, T); (B, T) losses, 0 where masked."""
    check_tokens(mask_BT, logprobs_BT=logprobs_BT)
    losses = -weight * advantages_by_token(advantages, mask_BT) * torch.where(mask_BT, logprobs_BT, 0.0)
    return torch.where(mask_BT, losses, 0.0)


@torch.no_grad()
def vespo_weight(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    importance_BT: Tensor | None = None,
) -> Tensor:
    """VESPO's weight of a sequence, which falls on both sides of a ratio near 1.

        φ(w) = e^λ·w^k·e^(−λ·w)        w = Π_t π(y_t) / π_old(y_t) · (importance of y_t)        k, λ by the sign of A

    Args:
        logprobs_BT, old_logprobs_BT, advantages, mask_BT: as for `cispo`.
        k_pos, lambda_pos: where A is at least 0.
        k_neg, lambda_neg: where A is below 0.
        importance_BT: the policy that is old over the generator, of `importance_ratio`; None: they are the same.

    Returns:
        (B, 1); with advantages (B, T), (B, T). Without gradient.
    """
    check_tokens(mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    difference = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    log_ratio = difference.clamp(-LARGEST_LOG, LARGEST_LOG).sum(1, keepdim=True)  # (B, 1)
    if importance_BT is not None:
        check_tokens(mask_BT, importance_BT=importance_BT)
        of_generator = importance_BT.log().clamp(SMALLEST_LOG, LARGEST_LOG)
        log_ratio = log_ratio + torch.where(mask_BT, of_generator, 0.0).sum(1, keepdim=True)
    log_ratio = log_ratio.clamp(SMALLEST_LOG, LARGEST_LOG)
    helps = advantages_by_token(advantages, mask_BT) >= 0
    k = torch.where(helps, k_pos, k_neg)
    lam = torch.where(helps, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (lam + k * log_ratio - lam * log_ratio.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def on_policy_mask(
    logprobs_BT: Tensor, sampled_logprobs_BT: Tensor, advantages: Tensor, mask_BT: Tensor, *, threshold: float
) -> Tensor:
    """Whether a sequence still teaches (DeepSeek-V3.2, off-policy sequence mask): not where A < 0 and it has drifted.

        keep = A ≥ 0  or  mean_t (log q(y_t) − log π(y_t)) ≤ threshold

    Args:
        logprobs_BT: (B, T) nats, of the policy.
        sampled_logprobs_BT: (B, T) nats, of what sampled; NaN where it is unknown, which counts as no drift.
        advantages, mask_BT: as for `cispo`.
        threshold: nats.

    Returns:
        (B, 1) bool; with advantages (B, T), (B, T).
    """
    check_tokens(mask_BT, logprobs_BT=logprobs_BT, sampled_logprobs_BT=sampled_logprobs_BT)
    drift = (sampled_logprobs_BT - logprobs_BT).nan_to_num(nan=0.0)
    return (advantages_by_token(advantages, mask_BT) >= 0) | (masked_mean(drift, mask_BT, dim=1)[:, None] <= threshold)


def reduce_losses(
    losses_BT: Tensor, mask_BT: Tensor, loss_type: str, *, max_completion_length: int, step_tokens: Tensor
) -> Tensor:
    """The loss of a micro-batch from those of its tokens, by `loss_type` (table above).

    Args:
        losses_BT: (B, T).
        mask_BT: (B, T) bool.
        loss_type: of TRL.
        max_completion_length: the divisor of dr_grpo.
        step_tokens: a number; the counted tokens of an optimizer step, shared among the ranks.

    Raises:
        ValueError: an unknown loss type.
    """
    check_tokens(mask_BT, losses_BT=losses_BT)
    if loss_type in ("grpo", "sapo"):
        return masked_mean(losses_BT, mask_BT, dim=1).mean()
    if loss_type == "bnpo":
        return masked_mean(losses_BT, mask_BT)
    counted = torch.where(mask_BT, losses_BT, 0.0)
    if loss_type == "dr_grpo":
        return counted.sum() / (len(losses_BT) * max_completion_length)
    if loss_type == "luspo":
        return counted.sum(1).mean()
    if loss_type in MEANS_OVER_STEP:
        return counted.sum() / step_tokens
    raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join((*CLIPPED, 'cispo', 'sapo', 'vespo'))}")
