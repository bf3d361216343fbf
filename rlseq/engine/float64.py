"""Sums in float64. Apple's GPU (MPS) has no float64; its sums run on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """The device of float64 tensors of a model on `device`: the same, or the CPU for MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: Tensor) -> Tensor:
    """x in float64, on `float64_device` of its device; a copy unless it is that already."""
    return x.to(float64_device(x.device)).double()
