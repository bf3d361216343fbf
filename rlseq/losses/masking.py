"""What every loss shares: the masked mean and the checks of shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of the counted entries: Σ x·m / Σ m, one mask above and below; 0 where nothing is counted.

    Args:
        x: any shape.
        mask: bool, of the same shape.
        dim: axes to reduce; None: all.

    Raises:
        ValueError: shapes differ, or the mask is not boolean.
    """
    check_mask(mask, x.shape)
    counted = torch.where(mask, x, 0.0)
    if dim is None:
        return counted.sum() / mask.sum().clamp(min=1)
    return counted.sum(dim) / mask.sum(dim).clamp(min=1)


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {describe(mask)}; expected bool of shape {tuple(shape)}")


def check_tokens(mask_BT: Tensor, **tensors: Tensor) -> None:
    """All (B, T), the mask boolean."""
    if mask_BT.ndim != 2:
        raise ValueError(f"mask_BT is {describe(mask_BT)}; expected shape (B, T)")
    check_mask(mask_BT, mask_BT.shape)
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(f"{name} is {describe(tensor)}; expected shape {tuple(mask_BT.shape)} as the mask")


def advantages_by_token(advantages: Tensor, mask_BT: Tensor) -> Tensor:
    """Advantages (B,) or (B, T) as (B, 1) or (B, T), without gradient."""
    if advantages.shape not in (mask_BT.shape, mask_BT.shape[:1]):
        shapes = f"{tuple(mask_BT.shape[:1])} or {tuple(mask_BT.shape)}"
        raise ValueError(f"advantages are {describe(advantages)}; expected shape {shapes}")
    return (advantages if advantages.ndim == 2 else advantages[:, None]).detach()


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
