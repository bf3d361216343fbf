"""The critic: what it is fitted to, and how well it fits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlseq.losses.masking import check_tokens


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
    check_tokens(mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
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


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """How much of the returns' variance a critic explains: 1 − Var(R − V) / Var(R), over the counted tokens.

    1 is a perfect critic, 0 one that is no better than a constant, below 0 worse than that. The variance is
    over the entries given (n below); NaN where the returns do not vary.

    Args:
        values_BT, returns_BT: (B, T), units of reward.
        mask_BT: (B, T) bool.

    Returns:
        () without gradient.

    Raises:
        ValueError: shapes differ.
    """
    check_tokens(mask_BT, values_BT=values_BT, returns_BT=returns_BT)
    returns = returns_BT.detach()[mask_BT]
    errors = returns - values_BT.detach()[mask_BT]
    if len(returns) < 2 or returns.max() == returns.min():
        return returns.new_tensor(torch.nan)
    return 1 - errors.var(correction=0) / returns.var(correction=0)


def error_by_position(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, parts: int = 4) -> Tensor:
    """Root mean squared error of a critic in each part of the sequences: where it is blind.

    The n counted tokens of a sequence are cut into parts of equal length, token i of n belonging to part
    ⌊i·parts / n⌋.

    Args:
        values_BT, returns_BT: (B, T), units of reward.
        mask_BT: (B, T) bool.
        parts: how many.

    Returns:
        (parts,) without gradient; NaN for a part that no token falls into.

    Raises:
        ValueError: shapes differ, or parts below 1.
    """
    check_tokens(mask_BT, values_BT=values_BT, returns_BT=returns_BT)
    if parts < 1:
        raise ValueError(f"parts is {parts}; expected at least 1")
    place = mask_BT.cumsum(1) - 1  # of each counted token in its sequence
    part = (place * parts).div(mask_BT.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor")
    squares = torch.where(mask_BT, (values_BT - returns_BT).detach(), 0.0).square()
    found = []
    for number in range(parts):
        here = mask_BT & (part == number)
        found.append(squares[here].mean().sqrt())  # the mean of nothing is NaN
    return torch.stack(found)
