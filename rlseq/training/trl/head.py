"""Log-probs and entropies of given tokens from hidden states, on a CPU.

TRL's fused head scores every position of a batch where it has no Triton kernel, prompts and padding too, in tiles of
32,768 tokens of the vocabulary whose sums it accumulates in float32 by products in float32. On a CPU that took 40% of
an update of SmolLM2-135M. Here only the completions' positions are scored, a few at a time over the whole vocabulary,
and products are in the precision that the model computes in, with one rounding each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

TILE_TOKENS = 128  # tokens whose logits are computed together

# What a configuration says of logits that are not the head's product alone; TRL's head knows what each means.
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class _TokenScores(torch.autograd.Function):
    """The arguments and results of `token_scores`; the backward computes each tile's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float):
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.temperature = temperature
        exact = torch.promote_types(ctx.dtype, torch.float32)
        logprobs, entropies = hidden.new_empty(len(hidden), dtype=exact), hidden.new_empty(len(hidden), dtype=exact)
        for rows, _, logp in _tiles(ctx, hidden, weight, bias):  # (n, V)
            logprobs[rows] = logp.gather(1, targets[rows, None]).squeeze(1)
            entropies[rows] = -torch.linalg.vecdot(logp.exp(), logp)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None):  # (N,) each
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        exact = entropies.dtype
        hidden_gradient = torch.zeros_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if to_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=exact) if to_bias else None
        for rows, cast, logp in _tiles(ctx, hidden, weight, bias):
            probs = logp.exp()
            # ∂ log p(target) / ∂z = onehot − p and ∂H / ∂z = −p · (log p + H)
            factor = torch.zeros_like(probs[:, :1])
            if of_entropies is not None:
                factor = (logp + entropies[rows, None]).mul_(of_entropies[rows, None])
            if of_logprobs is not None:
                factor = factor + of_logprobs[rows, None]
            gradient = probs.mul_(factor).neg_()
            if of_logprobs is not None:
                gradient.scatter_add_(1, targets[rows, None], of_logprobs[rows, None].to(exact))
            if ctx.temperature != 1.0:
                gradient.div_(ctx.temperature)
            if to_hidden:
                hidden_gradient[rows] = (gradient.to(ctx.dtype) @ cast).to(hidden.dtype)
            if to_weight:
                weight_gradient.addmm_(gradient.t(), hidden[rows].to(exact))
            if to_bias:
                bias_gradient += gradient.sum(0)
        weight_gradient = weight_gradient.to(weight.dtype) if to_weight else None
        bias_gradient = bias_gradient.to(bias.dtype) if to_bias else None
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _tiles(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """Yield the rows of each tile, the weight (V, H) in the precision of products, and log-probs (n, V)."""
    cast = weight.to(ctx.dtype)
    bias = None if bias is None else bias.to(ctx.dtype)
    exact = torch.promote_types(ctx.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), TILE_TOKENS):
            rows = slice(start, min(start + TILE_TOKENS, len(hidden)))
            logits = torch.nn.functional.linear(hidden[rows].to(ctx.dtype), cast, bias)
            if ctx.temperature != 1.0:
                logits = logits.to(exact).div_(ctx.temperature)
            yield rows, cast, torch.log_softmax(logits, dim=-1, dtype=exact)


def token_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy of its distribution, at a temperature.

        z = (hidden · weightᵀ + bias) / temperature,   log p(target) = z[target] − log Σ exp z,   H = −Σ p log p

    No more than TILE_TOKENS rows of logits exist at once, in the backward too.

    Args:
        hidden: (N, H) states, each before its target.
        weight, bias: (V, H) and (V,) of the head.
        targets: (N,) token ids.
        temperature: that tokens were sampled at.

    Returns:
        (N,) and (N,) in nats, float32 or wider.
    """
    return _TokenScores.apply(hidden, weight, bias, targets, temperature)


def add_cpu_head(model: PreTrainedModel, temperature: float) -> None:
    """Let a model that TRL gave a fused head answer `fused_lm_head=True` by `token_scores`, where it is on a CPU.

    TRL's own head stays where logits are more than the head's product (`SCALES`), where a router's loss is asked for,
    and where FSDP has sharded the head.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALES):
        return
    of_trl = model.forward

    @functools.wraps(of_trl)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any):
        head = model.get_output_embeddings()
        plain = head.weight.device.type == "cpu" and not isinstance(head.weight, DTensor)
        routed = kwargs.get("output_router_logits", getattr(config, "output_router_logits", False))
        if not fused_lm_head or labels is None or not plain or routed:
            return of_trl(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        states = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]  # (R, S-1, H)
        targets = labels[:, 1:]
        mask = targets != -100
        found = token_scores(states[mask], head.weight, head.bias, targets[mask], temperature=temperature)
        # masked_scatter keeps the result on the model's graph where no label counts
        logprobs, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
        return FusedCausalLMOutput(loss=None, log_probs=logprobs, entropy=entropy)

    model.forward = forward
