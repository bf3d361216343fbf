"""Log-probs and entropies of given tokens from hidden states, on a CPU.

TRL's fused head scores every position of a batch where it has no Triton kernel, prompts and padding too, in tiles of
32,768 tokens of the vocabulary whose sums it accumulates in float32 by products in float32. On a CPU that took 40% of
an update of SmolLM2-135M. Here only the completions' positions are scored, a few at a time over the whole vocabulary,
and products are in the precision that the model computes in, with one rounding each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlseq.engine.model.info import base_of, uncompiled
from rlseq.engine.packed.logits import head_is_separate
from rlseq.training.update.teacher_targets import TeacherTargets

TILE_TOKENS = 128  # tokens whose logits are computed together


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
        asks_entropies = of_entropies is not None and bool(of_entropies.any())  # of a loss without them it is 0
        hidden_gradient = torch.zeros_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if to_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=exact) if to_bias else None
        for rows, cast, logp in _tiles(ctx, hidden, weight, bias):
            probs = logp.exp()
            # ∂ log p(target) / ∂z = onehot − p and ∂H / ∂z = −p · (log p + H)
            factor = torch.zeros_like(probs[:, :1])
            if asks_entropies:
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


def cpu_head(model: nn.Module) -> nn.Module | None:
    """The head that `scored_head` serves in place of TRL's fused head; None: not on a CPU, or it cannot serve it."""
    head = plain_head(model)
    return head if head is not None and head.weight.device.type == "cpu" else None


def plain_head(model: nn.Module) -> nn.Module | None:
    """The head of a model that `scored_head` can serve, wrapped for training or not; None where it cannot.

    That is where it is sharded or quantised, or the model is compiled, which would trace the hooks of one
    call into the next, and where logits are more than the head's product (scaled, capped).
    """
    inner = extract_model_from_parallel(model)
    base = base_of(inner)
    if uncompiled(inner) is not inner or not isinstance(base, PreTrainedModel):
        return None
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear | ModulesToSaveWrapper):
        return None
    weight = head.weight
    plain = weight.is_floating_point() and not isinstance(weight, DTensor)
    return head if plain and head_is_separate(base) else None


@contextlib.contextmanager
def scored_head(
    head: nn.Module, labels: Tensor, temperature: float, teacher: TeacherTargets | None = None
) -> Iterator[None]:
    """While it lasts, a model's `logits` are log-probs and entropies of its labels, by `token_scores`.

    Hooks of the head do it: before, the states are narrowed to none, so that its own product costs nothing; after, what
    is returned takes the product's place. So the numbers pass through whatever the model is wrapped in.

    Args:
        head: of the model, as `plain_head` gives it.
        labels: (R, S) of what the model is called with; -100 where nothing is scored.
        temperature: that tokens were sampled at.
        teacher: what it says at the same positions; None without one.

    The logits of the call are (R, S-1, 2): log-prob and entropy of each label but the first, 0 where nothing is scored.
    With a teacher they are (R, S-1, 3), and the last is the divergence from it.
    """
    passing: list[Tensor] = []

    def keep_states(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *more = inputs
        passing.append(states)
        return (states[:, :0], *more)

    def score(head: nn.Module, _: Any, __: Any) -> Tensor:
        states, targets = passing.pop()[:, :-1], labels[:, 1:]  # (R, S-1, H), (R, S-1)
        mask = targets != -100
        found = token_scores(states[mask], head.weight, head.bias, targets[mask], temperature=temperature)
        # masked_scatter keeps the result on the model's graph where no label counts
        scores = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found]
        if teacher is not None:
            judged = teacher.places >= 0
            x = teacher.divergences(states[judged], head, temperature)
            scores.append(x.new_zeros(mask.shape).masked_scatter(judged, x))
        return torch.stack(scores, dim=-1)

    hooks = [head.register_forward_pre_hook(keep_states), head.register_forward_hook(score)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
