"""How much better a sample, or a token, was than expected: advantages."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlseq.losses.masking import check_tokens, describe

STD_EPSILON = 1e-4  # added to a standard deviation that divides, as in TRL


def group_advantages(
    rewards_PG: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out"] | Tensor = "mean",
    scale: Literal["std", "batch", "mean", "none"] = "std",
) -> Tensor:
    """How much better each sample is than a baseline of its prompt.

        A_ig = (r_ig − b_ig) / (σ_i + ε)

    With baseline "mean" and scale "std" the advantage of GRPO (Shao et al. 2024, section 4.1.2; ε = 1e-4
    is TRL's); with "mean" and "none" that of Dr. GRPO (Liu et al. 2025, section 3.2); with
    "leave_one_out" and "none" RLOO (Ahmadian et al. 2024, section 2.2), where b_ig is the mean of the
    group's *other* samples; with a tensor of each prompt's greedy reward and "none" self-critical
    sequence training (Rennie et al. 2017, section 3).

    With "mean" and "mean" that of MaxRL (Tajwar et al. 2026), (r_ig − mean_i) / mean_i without ε, for rewards from 0
    up. Where rewards are 0 or 1, its policy gradient has the mean ∇J_{G−1} of `max_rl`: the mean of ∇log π over the
    successes is unbiased for ∇J_G, and groups that failed throughout get 0 rather than −1.

    A NaN reward abstained: it leaves the baseline and the deviation and gets advantage 0. A group without
    any reward, and one whose tensor baseline is NaN, gets 0. Where the rewards present are all equal,
    advantages against the group itself are exactly 0 (1/ε would blow up the rounding of a mean), and so
    is anything divided by their deviation; unscaled, or scaled by a batch that does vary, reward − tensor
    baseline stays.

    Args:
        rewards_PG: (P, G), NaN where abstained.
        baseline: "mean", "leave_one_out", or one number per prompt, (P,).
        scale: divides by the sample standard deviation (n − 1 below) of the group's rewards, "std", of all
            rewards given, "batch", by the mean of the group's rewards, "mean", or by nothing, "none".

    Returns:
        (P, G), without gradient.

    Raises:
        ValueError: wrong shapes, no rewards, integer or infinite ones, an unknown name, or with scale "mean" a reward
            below 0.
    """
    if rewards_PG.ndim != 2 or rewards_PG.numel() == 0 or not rewards_PG.is_floating_point():
        raise ValueError(f"rewards_PG is {describe(rewards_PG)}; expected floats of shape (P, G)")
    if rewards_PG.isinf().any():
        raise ValueError("rewards_PG holds an infinite reward; rewards are finite, or NaN where abstained")
    if scale not in ("std", "batch", "mean", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std', 'batch', 'mean' or 'none'")
    if scale == "mean" and (rewards_PG < 0).any():
        raise ValueError("rewards_PG holds a reward below 0; scale 'mean' divides by the mean of rewards from 0 up")
    rewards = rewards_PG.detach()
    present = ~rewards.isnan()  # (P, G)
    count = present.sum(1, keepdim=True)  # (P, 1)
    total = torch.where(present, rewards, 0.0).sum(1, keepdim=True)
    mean = total / count.clamp(min=1)
    equal = _all_equal(rewards, present, 1)  # (P, 1)

    if isinstance(baseline, Tensor):
        if baseline.shape != rewards.shape[:1]:
            raise ValueError(f"baseline is {describe(baseline)}; expected shape ({len(rewards)},), one per prompt")
        centred = rewards - baseline.detach().to(rewards)[:, None]
    elif baseline == "mean":
        centred = torch.where(equal, 0.0, rewards - mean)
    elif baseline == "leave_one_out":
        others = (total - rewards) / (count - 1).clamp(min=1)
        centred = torch.where(equal, 0.0, rewards - others)
    else:
        raise ValueError(f"baseline is {baseline!r}; expected 'mean', 'leave_one_out' or a tensor of shape (P,)")

    if scale == "std":
        squares = torch.where(present, rewards - mean, 0.0).square().sum(1, keepdim=True)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        centred = torch.where(equal, 0.0, centred / (std + STD_EPSILON))
    elif scale == "batch":
        values = rewards[present]
        std = values.std() if len(values) > 1 else values.new_zeros(())
        all_equal = _all_equal(rewards.flatten(), present.flatten(), 0)
        centred = torch.where(all_equal, 0.0, centred / (std + STD_EPSILON))
    elif scale == "mean":
        centred = torch.where(equal, 0.0, centred / mean)  # a mean of 0 is of equal rewards
    return torch.where(centred.isnan(), 0.0, centred)  # NaN: no reward, or no baseline


def max_rl_advantages(rewards_PG: Tensor, *, order: int) -> Tensor:
    """Advantages whose policy gradient is an unbiased estimate of that of MaxRL's J_K, for rewards 0 and 1.

        A_ig = w(n + 1)·(r_ig − n / (G − 1))        w(m) = G/m·(1 − C(G − m, K) / C(G, K))

    with n the successes among the prompt's *other* G − 1 samples. The mean of ∇log π over the successes of K samples, 0
    without any, is unbiased for ∇J_K = pass@K·∇log p (Tajwar et al. 2026); its average over all subsets of K of the G
    samples gives a success the weight w/G (as Chen et al. 2021 average pass@k). The baseline depends on the other
    samples alone, so it leaves the mean as it is. K = 1 gives RLOO.

    A NaN reward abstained and gets advantage 0: G is then the number of samples that remain, and K at most that.

    Args:
        rewards_PG: (P, G) of 0, 1 and NaN.
        order: K, 1 to G.

    Returns:
        (P, G), without gradient.

    Raises:
        ValueError: wrong shapes, another reward, an order outside its range.
    """
    if rewards_PG.ndim != 2 or not rewards_PG.is_floating_point() or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards_PG is {describe(rewards_PG)}; expected floats of shape (P, G), G at least 2")
    if not 1 <= order <= rewards_PG.shape[1]:
        raise ValueError(f"order is {order}; expected 1 to the number of samples, {rewards_PG.shape[1]}")
    rewards = rewards_PG.detach()
    present = ~rewards.isnan()
    if not ((rewards == 0) | (rewards == 1) | ~present).all():
        raise ValueError("rewards_PG holds a reward that is neither 0 nor 1")
    count = present.sum(1, keepdim=True)  # (P, 1)
    others = torch.where(present, rewards, 0.0).sum(1, keepdim=True) - rewards  # (P, G): n
    failures = count - others - 1  # of the group, if this sample is a success
    size = count.clamp(max=order)  # K
    no_success = torch.ones_like(others)  # C(failures, K) / C(count, K)
    for k in range(order):
        ratio = (failures - k).clamp(min=0) / (count - k).clamp(min=1)
        no_success = torch.where(k < size, no_success * ratio, no_success)
    weight = count / (others + 1) * (1 - no_success)
    advantages = weight * (rewards - others / (count - 1).clamp(min=1))
    return torch.where(present & (count > 1), advantages, 0.0)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the returns a critic is fitted to.

        δ_t = r_t + γ·V_{t+1} − V_t        A_t = Σ_{l ≥ 0} (γλ)^l · δ_{t+l}        R_t = A_t + V_t

    Time counts trained tokens only: where the mask is False no reward is read and no time passes, so the
    successor of a token is the next counted one.

    Args:
        rewards_BT: (B, T), the reward on each token; a sequence's own belongs on its last counted token.
        values_BT: (B, T), V_t of the state *before* token t.
        mask_BT: (B, T) bool.
        gamma: discount γ.
        lam: λ; 1 gives Monte-Carlo returns, 0 one-step differences.
        bootstrap_B: (B,), the value of the state after the last counted token; None: 0, the sequence ended.

    Returns:
        Advantages and returns, (B, T) each, without gradient, 0 where the mask is False.

    Raises:
        ValueError: shapes differ.
    """
    check_tokens(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    if bootstrap_B is not None and bootstrap_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"bootstrap_B is {describe(bootstrap_B)}; expected shape ({len(mask_BT)},)")
    rewards, values = (torch.where(mask_BT, x.detach(), 0.0) for x in (rewards_BT, values_BT))
    next_advantage = values.new_zeros(len(values))  # (B,)
    next_value = next_advantage if bootstrap_B is None else bootstrap_B.detach().to(values)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        counted = mask_BT[:, t]
        next_value = torch.where(counted, values[:, t], next_value)
        next_advantage = torch.where(counted, advantage, next_advantage)
        advantages[:, t] = torch.where(counted, advantage, 0.0)
    return advantages, advantages + values


def _all_equal(x: Tensor, present: Tensor, dim: int) -> Tensor:
    """Whether the entries present along an axis are one number (or none), the axis kept."""
    low = torch.where(present, x, torch.inf).amin(dim, keepdim=True)
    high = torch.where(present, x, -torch.inf).amax(dim, keepdim=True)
    return low >= high


def last_token_rewards(rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The reward of each sequence on its last counted token, (B,) -> (B, T); 0 elsewhere.

    A sequence without a counted token has no place for its reward and gets none. NaN abstained: 0.

    Raises:
        ValueError: wrong shapes.
    """
    _check_sequences(mask_BT, rewards_B=rewards_B)
    T = mask_BT.shape[1]
    position = torch.arange(T, device=mask_BT.device)
    last = torch.where(mask_BT, position, -1).amax(1, keepdim=True) if T else position.new_zeros(len(mask_BT), 1)
    rewards = torch.where(rewards_B.isnan(), 0.0, rewards_B.detach())
    return torch.where((position == last) & mask_BT, rewards[:, None], 0.0)


def whiten(advantages_BT: Tensor, mask_BT: Tensor, *, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Advantages with mean 0 and deviation 1 over the counted tokens of the *whole* batch.

        A' = (A − mean) / (std + ε)

    Args:
        advantages_BT: (B, T), this process's rows.
        mask_BT: (B, T) bool.
        mean, std: over the counted tokens of all processes; the caller gathers them.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        ValueError: shapes differ.
    """
    check_tokens(mask_BT, advantages_BT=advantages_BT)
    return torch.where(mask_BT, (advantages_BT - mean) / (std + STD_EPSILON), 0.0)


def _check_sequences(mask_BT: Tensor, **tensors: Tensor) -> None:
    """One number per row of the mask."""
    check_tokens(mask_BT)
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape[:1]:
            raise ValueError(f"{name} is {describe(tensor)}; expected shape ({len(mask_BT)},), one per sequence")


def normalize_then_sum(values_PGF: Tensor, weights: Tensor) -> Tensor:
    """Advantages of several rewards, each normalised in its group before they are summed (GDPO, arXiv 2601.05242).

        a_igf = (v_igf − mean_g v_igf) / (std_g v_igf + ε),   s_ig = Σ_f w_f a_igf,   A = (s − mean s) / (std s + ε)

    with the last mean and deviation over all samples. A reward that abstained (NaN) leaves its group's mean and
    deviation and adds nothing; a sample on which all did has advantage 0. ε = 1e-4 is TRL's.

    Args:
        values_PGF: (P, G, F) values of F rewards, NaN where abstained.
        weights: (F,).

    Returns:
        (P, G), without gradient.
    """
    values = values_PGF.detach()
    each = (values - values.nanmean(1, keepdim=True)) / (_nanstd(values, 1) + STD_EPSILON)
    total = (each * weights.to(each)).nansum(-1)  # (P, G)
    total = torch.where(values.isnan().all(-1), torch.nan, total)
    present = total[~total.isnan()]
    deviation = present.std() if len(present) > 1 else total.new_tensor(torch.nan)
    advantages = (total - total.nanmean()) / (deviation + STD_EPSILON)
    return advantages.nan_to_num(nan=0.0)


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """The sample deviation (n − 1 below) along a dimension, kept; NaN values are left out."""
    mean = x.nanmean(dim, keepdim=True)
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = ((x - mean) ** 2).nansum(dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
