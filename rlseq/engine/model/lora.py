"""LoRA on a linear layer in three products, forward and backward, on a CPU.

PEFT's layer computes `result + lora_B(lora_A(x)) * scaling`, each part a pass over all tokens: under autocast the input
is cast to float32 and back, and the sum and the scaled product are new tensors. Here the low-rank product is added to
the layer's result where it lies (`addmm_`), and the backward keeps the input and the product of rank r alone. Values
are PEFT's but for the rounding of the sum, which is one instead of three.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ for a frozen W (O, I) and bias, of x (..., I) with A (r, I) and B (O, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float):
        of_rank = nn.functional.linear(x, A.to(x.dtype)).mul_(scaling).flatten(0, -2)  # (N, r)
        out = nn.functional.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(of_rank, B.to(x.dtype).t())
        ctx.save_for_backward(x, weight, A, B, of_rank)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        x, weight, A, B, of_rank = ctx.saved_tensors
        gradient = gradient.to(x.dtype).flatten(0, -2)  # (N, O)
        to_x = to_A = to_B = None
        to_rank = (gradient @ B.to(x.dtype)).mul_(ctx.scaling)  # (N, r)
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(to_rank, A.to(x.dtype)).view_as(x)
        if ctx.needs_input_grad[3]:
            to_A = (to_rank.t() @ x.flatten(0, -2)).to(A.dtype)
        if ctx.needs_input_grad[4]:
            to_B = (gradient.t() @ of_rank).to(B.dtype)
        return to_x, None, None, to_A, to_B, None


class LoraLinear(PeftLinear):
    """PEFT's layer, computed by `_LoraProduct` where that serves: one plain adapter on a frozen `nn.Linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.device.type != "cpu" or self.disable_adapters or self.merged or x.dim() < 2:
            return super().forward(x, *args, **kwargs)
        base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or type(base) is not nn.Linear or active[0] in self.lora_variant:
            return super().forward(x)
        A, B = self.lora_A[active[0]], self.lora_B[active[0]]
        dropout = self.lora_dropout[active[0]]
        plain = A.bias is None and B.bias is None and not (dropout.training and getattr(dropout, "p", 0))
        weights = [w for w in (base.weight, base.bias, A.weight, B.weight) if w is not None]
        frozen = not base.weight.requires_grad and not (base.bias is not None and base.bias.requires_grad)
        if not plain or not frozen or any(isinstance(w, DTensor) for w in weights):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else base.weight.dtype
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _LoraProduct.apply(x.to(dtype), weight, bias, A.weight, B.weight, self.scaling[active[0]])


def with_fused_layers(config: PeftConfig | None) -> PeftConfig | None:
    """A copy of an adapter's configuration by which PEFT makes its linear layers as `LoraLinear`; any other as it is.

    It is PEFT's own dispatch of custom layers: no layer that exists is changed, and neither is what is saved. An
    adapter that was put on a model without this (a `PeftModel` given to a trainer) computes as PEFT does.
    """
    if type(config) is not LoraConfig:
        return config
    config = copy.copy(config)
    config._register_custom_module({nn.Linear: _fused_layer})  # type: ignore[dict-item]  # a function makes them
    return config


def _fused_layer(target: nn.Module, adapter_name: str, **options: Any) -> LoraLinear | None:
    """What PEFT asks for the layer of a target; None: one of its own."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    # An older PEFT gives no `config`, and this by itself.
    transposed = options.get("fan_in_fan_out", getattr(options.get("config"), "fan_in_fan_out", False))
    quantised = type(base) is not nn.Linear or type(base.weight) is not nn.Parameter
    if transposed or quantised or options.get("parameter_name") is not None:
        return None
    return LoraLinear(target, adapter_name, **options)
