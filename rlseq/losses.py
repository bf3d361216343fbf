"""The mathematics of sequence-level training, as pure functions: rewards -> advantages -> losses.

Tensors in, tensors out, in the dtype and on the device given. Terms of a token come back unreduced, of shape
(B, T), and 0 where the mask is False, whatever the inputs hold there (inf and NaN too); the trainer reduces
them by `masked_mean` and says over what. Losses are to be minimised; advantages are better when larger.

    P prompts    G samples per prompt    B = P·G    T completion tokens    masks: True = counted
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # added to a standard deviation that divides, as in TRL


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of the counted entries: Σ x·m / Σ m, one mask above and below; 0 where nothing is counted.

    Args:
        x: any shape.
        mask: bool, of the same shape.
        dim: axes to reduce; None: all.

    Raises:
        ValueError: shapes differ, or the mask is not boolean.
    """
    _check_mask(mask, x.shape)
    counted = torch.where(mask, x, 0.0)
    if dim is None:
        return counted.sum() / mask.sum().clamp(min=1)
    return counted.sum(dim) / mask.sum(dim).clamp(min=1)


def group_advantages(
    rewards_PG: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out"] | Tensor = "mean",
    scale: Literal["std", "batch", "none"] = "std",
) -> Tensor:
    """How much better each sample is than a baseline of its prompt.

        A_ig = (r_ig − b_ig) / (σ_i + ε)

    With baseline "mean" and scale "std" the advantage of GRPO (Shao et al. 2024, section 4.1.2; ε = 1e-4
    is TRL's); with "mean" and "none" that of Dr. GRPO (Liu et al. 2025, section 3.2); with
    "leave_one_out" and "none" RLOO (Ahmadian et al. 2024, section 2.2), where b_ig is the mean of the
    group's *other* samples; with a tensor of each prompt's greedy reward and "none" self-critical
    sequence training (Rennie et al. 2017, section 3).

    A NaN reward abstained: it leaves the baseline and the deviation and gets advantage 0. A group without
    any reward, and one whose tensor baseline is NaN, gets 0. Where the rewards present are all equal,
    advantages against the group itself are exactly 0 (1/ε would blow up the rounding of a mean), and so
    is anything divided by their deviation; unscaled, or scaled by a batch that does vary, reward − tensor
    baseline stays.

    Args:
        rewards_PG: (P, G), NaN where abstained.
        baseline: "mean", "leave_one_out", or one number a prompt, (P,).
        scale: divides by the sample standard deviation (n − 1 below) of the group's rewards, "std", of all
            rewards given, "batch", or by nothing, "none".

    Returns:
        (P, G), without gradient.

    Raises:
        ValueError: wrong shapes, no rewards, integer or infinite ones, an unknown name.
    """
    if rewards_PG.ndim != 2 or rewards_PG.numel() == 0 or not rewards_PG.is_floating_point():
        raise ValueError(f"rewards_PG is {_describe(rewards_PG)}; expected floats of shape (P, G)")
    if rewards_PG.isinf().any():
        raise ValueError("rewards_PG holds an infinite reward; rewards are finite, or NaN where abstained")
    if scale not in ("std", "batch", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std', 'batch' or 'none'")
    rewards = rewards_PG.detach()
    present = ~rewards.isnan()  # (P, G)
    count = present.sum(1, keepdim=True)  # (P, 1)
    total = torch.where(present, rewards, 0.0).sum(1, keepdim=True)
    mean = total / count.clamp(min=1)
    equal = _all_equal(rewards, present, 1)  # (P, 1)

    if isinstance(baseline, Tensor):
        if baseline.shape != rewards.shape[:1]:
            raise ValueError(f"baseline is {_describe(baseline)}; expected shape ({len(rewards)},), one a prompt")
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
    return torch.where(centred.isnan(), 0.0, centred)  # NaN: no reward, or no baseline


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
    _check_tokens(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    if bootstrap_B is not None and bootstrap_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"bootstrap_B is {_describe(bootstrap_B)}; expected shape ({len(mask_BT)},)")
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


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """PPO's clipped objective, negated (Schulman et al. 2017, eq. 7).

        L = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    The ratio ρ is, by level,

        token:     ρ_t = exp(log π(y_t) − log π_old(y_t))             PPO, GRPO
        sequence:  ρ   = exp(mean_t (log π(y_t) − log π_old(y_t)))    GSPO (Zheng et al. 2025, eq. 7)

    with the mean over counted tokens. Separate bounds are DAPO's clip-higher (Yu et al. 2025, section 3.1);
    an infinite `clip_high` leaves that side open. At sequence level every counted token carries its
    sequence's loss, so that the mean over a sequence's tokens is that loss.

    Args:
        logprobs_BT, old_logprobs_BT: (B, T) nats; the gradient flows through the first alone.
        advantages: (B,), or (B, T) at token level.
        mask_BT: (B, T) bool.
        clip_low, clip_high: ε_low and ε_high, at least 0.
        level: of the ratio.

    Returns:
        (B, T) losses, 0 where the mask is False.

    Raises:
        ValueError: wrong shapes, a negative clip, an unknown level.
    """
    _check_tokens(mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected 'token' or 'sequence'")
    allowed = [mask_BT.shape[:1]] + ([mask_BT.shape] if level == "token" else [])
    if advantages.shape not in allowed:
        expected = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"advantages are {_describe(advantages)}; expected shape {expected} at {level} level")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clips are {clip_low} and {clip_high}; expected at least 0 (ε, not 1 ± ε)")
    advantages_BT = (advantages if advantages.ndim == 2 else advantages[:, None]).detach()
    log_ratio = torch.where(mask_BT, logprobs_BT - old_logprobs_BT.detach(), 0.0)  # (B, T)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask_BT, dim=1)[:, None]  # (B, 1)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages_BT
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    objective = torch.minimum(unclipped, clipped)
    return torch.where(mask_BT, -objective, 0.0)


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """Half the squared error of a critic, with PPO's optional clip (as in the code of Schulman et al. 2017).

        L_t = ½·(V_t − R_t)²        with clip c:  L_t = ½·max((V_t − R_t)², (clip(V_t, V_old ± c) − R_t)²)

    Args:
        values_BT, old_values_BT, returns_BT: (B, T), units of reward; the gradient flows through the first.
        mask_BT: (B, T) bool.
        clip: c, at least 0; None: no clipping.

    Returns:
        (B, T) losses, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or a negative clip.
    """
    _check_tokens(mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}; expected at least 0, or None for no clipping")
    values, old, returns = (
        torch.where(mask_BT, x, 0.0) for x in (values_BT, old_values_BT.detach(), returns_BT.detach())
    )
    error = (values - returns).square()
    if clip is not None:
        clipped = old + (values - old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimators of KL(π‖ref) from tokens drawn from π (Schulman 2020, "Approximating KL divergence").

        d = log π(y_t) − log ref(y_t)        k1 = d        k2 = ½·d²        k3 = exp(−d) − 1 + d

    As *values*, k1 and k3 are unbiased and k3 is never negative; k2 is biased with low variance. As
    *losses* they differ, since the draw depends on π too and is not differentiated: the expected gradient
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
        shapes = f"{_describe(logprobs_BT)} and {_describe(ref_logprobs_BT)}"
        raise ValueError(f"logprobs_BT and ref_logprobs_BT are {shapes}; expected equal shapes")
    difference = logprobs_BT - ref_logprobs_BT.detach()
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind is {kind!r}; expected 'k1', 'k2' or 'k3'")


def minimum_risk(
    sequence_logprobs_PG: Tensor, rewards_PG: Tensor, *, sharpness: float, mask_PG: Tensor | None = None
) -> Tensor:
    """Minimum risk training (Shen et al. 2016, section 3): expected risk over samples, renormalised.

        Q(y) = p(y)^α / Σ_{y' ∈ S} p(y')^α        loss = Σ_{y ∈ S} Q(y)·Δ(y),  with risk Δ = −reward

    S is a set: a sample that repeats another is to be masked.

    Args:
        sequence_logprobs_PG: (P, G) nats, log p(y | x); the gradient flows through them.
        rewards_PG: (P, G); a NaN reward abstained and leaves S.
        sharpness: α > 0; the paper takes 5e-3, and 1 renormalises the model's own probabilities.
        mask_PG: (P, G) bool, the members of S; None: all.

    Returns:
        (P,) expected risk, in units of −reward; 0 where S is empty.

    Raises:
        ValueError: shapes differ, or sharpness not above 0.
    """
    if sequence_logprobs_PG.ndim != 2 or sequence_logprobs_PG.shape != rewards_PG.shape:
        shapes = f"{_describe(sequence_logprobs_PG)} and {_describe(rewards_PG)}"
        raise ValueError(f"sequence_logprobs_PG and rewards_PG are {shapes}; expected (P, G) twice")
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}; expected above 0")
    members = ~rewards_PG.isnan()
    if mask_PG is not None:
        _check_mask(mask_PG, rewards_PG.shape)
        members = members & mask_PG
    lowest = torch.finfo(sequence_logprobs_PG.dtype).min  # finite, so that an empty S gives no NaN
    scaled = torch.where(members, sharpness * sequence_logprobs_PG, lowest)
    Q = torch.softmax(scaled, dim=1)  # (P, G)
    risk = -torch.where(members, rewards_PG.detach(), 0.0).to(Q)
    return (Q * risk).sum(1)


def expected_accuracy(reference_logprobs: Tensor, row_index: Tensor, num_rows: int | None = None) -> Tensor:
    """Minus the exact chance that one sample is right, where references enumerate the answers.

        loss_i = −Σ_{y ∈ references of row i} exp(log p(y | x_i))

    Its gradient is the mean of the policy gradient under the reward "equals a reference", without
    sampling noise: ∇E[1{y right}] = Σ_{y right} p(y)·∇log p(y). Likelihood training descends −Σ log p
    instead.

    Args:
        reference_logprobs: (N,) nats, of distinct references; the gradient flows through them.
        row_index: (N,) long, the row of each.
        num_rows: rows of the result; None: up to the last that has a reference.

    Returns:
        (num_rows,) in −1..0; 0 for a row without references.

    Raises:
        ValueError: shapes differ.
    """
    if reference_logprobs.ndim != 1 or reference_logprobs.shape != row_index.shape:
        shapes = f"{_describe(reference_logprobs)} and {_describe(row_index)}"
        raise ValueError(f"reference_logprobs and row_index are {shapes}; expected (N,) twice")
    if num_rows is None:
        num_rows = int(row_index.max()) + 1 if len(row_index) else 0
    return -reference_logprobs.new_zeros(num_rows).index_add(0, row_index, reference_logprobs.exp())


def _all_equal(x: Tensor, present: Tensor, dim: int) -> Tensor:
    """Whether the entries present along an axis are one number (or none), the axis kept."""
    low = torch.where(present, x, torch.inf).amin(dim, keepdim=True)
    high = torch.where(present, x, -torch.inf).amax(dim, keepdim=True)
    return low >= high


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {_describe(mask)}; expected bool of shape {tuple(shape)}")


def _check_tokens(mask_BT: Tensor, **tensors: Tensor) -> None:
    """All (B, T) and alike, the mask boolean."""
    if mask_BT.ndim != 2:
        raise ValueError(f"mask_BT is {_describe(mask_BT)}; expected shape (B, T)")
    _check_mask(mask_BT, mask_BT.shape)
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(f"{name} is {_describe(tensor)}; expected shape {tuple(mask_BT.shape)} as the mask")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
