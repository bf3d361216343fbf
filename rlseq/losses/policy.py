"""Losses of the policy on sampled tokens: ratios, the clipped surrogate and the estimators of KL."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlseq.losses.masking import advantages_by_token, check_tokens, describe, masked_mean


def probability_ratio(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """How much likelier the policy makes what was sampled than the one that sampled it did.

        token:     ρ_t = exp(log π(y_t) − log π_old(y_t))             PPO, GRPO
        sequence:  ρ   = exp(mean_t (log π(y_t) − log π_old(y_t)))    GSPO (Zheng et al. 2025, eq. 7)

    with the mean over counted tokens.

    Args:
        logprobs_BT, old_logprobs_BT: (B, T) nats; the gradient flows through the first alone.
        mask_BT: (B, T) bool.
        level: of the ratio.

    Returns:
        (B, T), 1 where the mask is False; at sequence level (B, 1).

    Raises:
        ValueError: wrong shapes, an unknown level.
    """
    check_tokens(mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected 'token' or 'sequence'")
    log_ratio = torch.where(mask_BT, logprobs_BT - old_logprobs_BT.detach(), 0.0)  # (B, T)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask_BT, dim=1)[:, None]  # (B, 1)
    return log_ratio.exp()


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    largest: float | None = None,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """PPO's clipped objective, negated (Schulman et al. 2017, eq. 7).

        L = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    with the ratio ρ of `probability_ratio`. Separate bounds are DAPO's clip-higher (Yu et al. 2025, section 3.1);
    an infinite `clip_high` leaves that side open. `largest` bounds the first ρ, too, which limits the loss where A is
    below 0 (INTELLECT-2's two-sided clip; TRL's `delta`). At sequence level every counted token carries its
    sequence's loss, so that the mean over a sequence's tokens is that loss.

    Args:
        logprobs_BT, old_logprobs_BT: (B, T) nats; the gradient flows through the first alone.
        advantages: (B,) or (B, T).
        mask_BT: (B, T) bool.
        clip_low, clip_high: ε_low and ε_high, at least 0.
        largest: a ratio; None: no further bound.
        level: of the ratio.

    Returns:
        (B, T) losses, 0 where the mask is False.

    Raises:
        ValueError: wrong shapes, a negative clip, an unknown level.
    """
    ratio = probability_ratio(logprobs_BT, old_logprobs_BT, mask_BT, level)
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clips are {clip_low} and {clip_high}; expected at least 0 (ε, not 1 ± ε)")
    advantages = advantages_by_token(advantages, mask_BT)
    unclipped = (ratio if largest is None else ratio.clamp(max=largest)) * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.where(mask_BT, -torch.minimum(unclipped, clipped), 0.0)


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimators of KL(π‖ref) from tokens sampled from π (Schulman 2020, "Approximating KL divergence").

        d = log π(y_t) − log ref(y_t)        k1 = d        k2 = ½·d²        k3 = exp(−d) − 1 + d

    As *values*, k1 and k3 are unbiased and k3 is never negative; k2 is biased with low variance. As
    *losses* they differ, since the sampling depends on π too and is not differentiated: the expected gradient
    of k1 is zero (it regularises nothing: put k1 into the reward instead), that of k2 is the gradient of
    KL(π‖ref), that of k3 the gradient of KL(ref‖π), each of the next token with the prefixes held fixed.

    Args:
        logprobs_BT, ref_logprobs_BT: (B, T) nats, finite; the gradient flows through the first alone.
        kind: "k1", "k2" or "k3".

    Returns:
        (B, T) nats, unmasked.

    Raises:
        ValueError: shapes differ, or an unknown kind.
    """
    if logprobs_BT.shape != ref_logprobs_BT.shape:
        shapes = f"{describe(logprobs_BT)} and {describe(ref_logprobs_BT)}"
        raise ValueError(f"logprobs_BT and ref_logprobs_BT are {shapes}; expected equal shapes")
    difference = logprobs_BT - ref_logprobs_BT.detach()
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind is {kind!r}; expected 'k1', 'k2' or 'k3'")


def adapt_kl_coefficient(coefficient: float, kl: float, *, target: float, rate: float = 0.1) -> float:
    """The next coefficient β of a KL penalty that is steered to a target (Ziegler et al. 2019, section 2.2).

        e = clip(KL / KL_target − 1, −0.2, 0.2)        β ← β·(1 + K·e)

    Args:
        coefficient: β > 0.
        kl: KL(π‖ref) of the last rollouts, nats a sequence.
        target: KL_target > 0, nats a sequence.
        rate: K; the paper takes 0.1.

    Returns:
        The next β.

    Raises:
        ValueError: a target or coefficient that is not above 0.
    """
    if not (target > 0 and coefficient > 0):
        raise ValueError(f"coefficient is {coefficient} and target {target}; expected both above 0")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + rate * error)


def importance_ratio(
    old_logprobs_BT: Tensor,
    sampled_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: Literal["token", "sequence"],
    how: Literal["truncate", "mask"],
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Weights that correct for a generator whose probabilities are not the policy's, as TRL corrects for vLLM's.

        token:     w_t = π(y_t) / q(y_t)        sequence:  w = Π_t π(y_t) / q(y_t)

    Args:
        old_logprobs_BT: (B, T) nats, of the policy.
        sampled_logprobs_BT: (B, T) nats, of the generator; NaN where it gave none, which counts as equal.
        mask_BT: (B, T) bool.
        level: of the ratio.
        how: a ratio outside [low, high] becomes the nearer bound, "truncate", or 0, "mask".
        low, high: None leaves that side open.

    Returns:
        (B, T), 1 where the mask is False; at sequence level (B, 1). Without gradient.
    """
    check_tokens(mask_BT, old_logprobs_BT=old_logprobs_BT, sampled_logprobs_BT=sampled_logprobs_BT)
    if level not in ("token", "sequence") or how not in ("truncate", "mask"):
        raise ValueError(f"{level!r}, {how!r}; expected 'token' or 'sequence', and 'truncate' or 'mask'")
    difference = torch.where(mask_BT, old_logprobs_BT - sampled_logprobs_BT, 0.0).detach().nan_to_num(nan=0.0)
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = -torch.inf if low is None else low, torch.inf if high is None else high
    if how == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)
