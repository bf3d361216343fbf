"""Sums in float64, on devices that have none too: Apple's GPU (MPS)."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where what is in float64 of a model on `device` is: there, or on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: Tensor) -> Tensor:
    """In float64, on `float64_device` of where it was; a copy unless it is that already."""
    return x.to(float64_device(x.device)).double()
