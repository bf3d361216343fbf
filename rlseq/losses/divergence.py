"""Divergences between a student's and a teacher's next-token distributions, exact over the vocabulary.

On-policy distillation takes them at the prefixes of the student's own samples (Agarwal et al. 2024, arXiv:2306.13649,
GKD; Gu et al. 2024, arXiv:2306.08543, MiniLLM). p is the student's distribution, q the teacher's:

    reverse_kl   KL(p ‖ q) = Σ p (log p − log q)
    forward_kl   KL(q ‖ p) = Σ q (log q − log p)
    jsd          β KL(q ‖ m) + (1 − β) KL(p ‖ m),   m = β q + (1 − β) p      (GKD, equation 1)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlseq.losses.masking import check_tokens

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
TILE_TOKENS = 128  # positions whose two distributions exist together


def divergence(student_logp: Tensor, teacher_logp: Tensor, *, kind: str, jsd_beta: float = 0.5) -> Tensor:
    """The divergence of each position, in nats.

    Args:
        student_logp, teacher_logp: (N, V) log-probs, each row normalised.
        kind: one of DIVERGENCES.
        jsd_beta: β of jsd, between 0 and 1.

    Returns:
        (N,).

    Raises:
        ValueError: shapes differ, or the kind or β is unknown.
    """
    if student_logp.shape != teacher_logp.shape or student_logp.ndim != 2:
        shapes = f"{tuple(student_logp.shape)} and {tuple(teacher_logp.shape)}"
        raise ValueError(f"log-probs are of shapes {shapes}; expected the same (N, V)")
    _check_kind(kind, jsd_beta)
    if kind == "reverse_kl":
        return _kl(student_logp, teacher_logp)
    if kind == "forward_kl":
        return _kl(teacher_logp, student_logp)
    mixture = _mixture(student_logp, teacher_logp, jsd_beta)
    return jsd_beta * _kl(teacher_logp, mixture) + (1 - jsd_beta) * _kl(student_logp, mixture)


def divergence_of_states(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None = None,
    *,
    kind: str,
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """`divergence` of the distributions that two models' last hidden states give; the gradient is the student's.

        p = softmax((hidden · weightᵀ + bias) / temperature),   q likewise, of the teacher

    No more than TILE_TOKENS rows of logits exist at once: the backward computes them again. Heads of unequal lengths
    are those of one tokenizer with rows added to fill a multiple: both are cut to the shorter.

    Args:
        hidden, teacher_hidden: (N, H) and (N, H') states.
        weight, bias, teacher_weight, teacher_bias: (V, H), (V,), (V', H') and (V',) of the heads.
        kind, jsd_beta: as for `divergence`.
        temperature, teacher_temperature: of the student's and the teacher's distribution.

    Returns:
        (N,) nats, float32 or wider.
    """
    _check_kind(kind, jsd_beta)
    if len(hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(hidden)} states of the student and {len(teacher_hidden)} of the teacher; expected pairs"
        )
    how = kind, jsd_beta, temperature, teacher_temperature
    return _StateDivergence.apply(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, how)


def divergence_to_go(divergences_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Of each token, the sum of the divergences at the counted positions after it, (B, T), without gradient.

        c_t = Σ_{s>t} D_s

    The sequence-level objective is J = E_{y∼p} Σ_t D_t(y_<t); for the reverse KL that is KL(p(y) ‖ q(y)) of whole
    sequences. Its gradient has two terms, of which distillation as a loss on sampled prefixes keeps the first:

        ∇J = E Σ_t [ ∇D_t(y_<t) + c_t ∇log p(y_t | y_<t) ]
    """
    check_tokens(mask_BT, divergences_BT=divergences_BT)
    counted = torch.where(mask_BT, divergences_BT.detach(), 0.0)
    after = counted.flip(1).cumsum(1).flip(1) - counted
    return torch.where(mask_BT, after, 0.0)


class _StateDivergence(torch.autograd.Function):
    """The arguments and result of `divergence_of_states`."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, how):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how = kind, jsd_beta, *_ = how
        found = hidden.new_empty(len(hidden), dtype=torch.promote_types(ctx.dtype, torch.float32))
        given = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
        ctx.save_for_backward(*given)
        for rows, logp, logq in _tiles(ctx, *given):  # (n, V)
            found[rows] = divergence(logp, logq, kind=kind, jsd_beta=jsd_beta)
        return found

    @staticmethod
    def backward(ctx: Any, of_divergences: Tensor):  # (N,)
        hidden, weight, bias = ctx.saved_tensors[:3]
        kind, jsd_beta, temperature, _ = ctx.how
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        exact = of_divergences.dtype
        hidden_gradient = torch.zeros_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if to_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=exact) if to_bias else None
        cast = weight.to(ctx.dtype)
        for rows, logp, logq in _tiles(ctx, *ctx.saved_tensors):
            gradient = _logit_gradient(logp, logq, kind, jsd_beta).mul_(of_divergences[rows, None] / temperature)
            size = gradient.shape[1]
            if hidden_gradient is not None:
                hidden_gradient[rows] = (gradient.to(ctx.dtype) @ cast[:size]).to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient[:size].addmm_(gradient.t(), hidden[rows].to(exact))
            if bias_gradient is not None:
                bias_gradient[:size] += gradient.sum(0)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        if bias_gradient is not None:
            bias_gradient = bias_gradient.to(bias.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def _tiles(
    ctx: Any, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the rows of each tile with the student's and the teacher's log-probs (n, V)."""
    _, _, temperature, teacher_temperature = ctx.how
    student = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
    size = min(len(weight), len(teacher_weight))
    exact = torch.promote_types(ctx.dtype, torch.float32)

    def log_probs(states: Tensor, head: tuple[Tensor, Tensor | None], at: float) -> Tensor:
        logits = torch.nn.functional.linear(states.to(head[0].dtype), *head)[:, :size].to(exact)
        return torch.log_softmax(logits / at, dim=-1)

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), TILE_TOKENS):
            rows = slice(start, min(start + TILE_TOKENS, len(hidden)))
            teacher = teacher_weight, teacher_bias
            yield (
                rows,
                log_probs(hidden[rows], student, temperature),
                log_probs(teacher_hidden[rows], teacher, teacher_temperature),
            )


def _logit_gradient(logp: Tensor, logq: Tensor, kind: str, jsd_beta: float) -> Tensor:
    """∂D / ∂z of the student's logits z, (n, V): p (g − Σ p g) with g = ∂D / ∂p up to a constant."""
    p = logp.exp()
    if kind == "forward_kl":
        return p - logq.exp()  # g = −q / p
    if kind == "reverse_kl":
        g = logp - logq
    else:
        g = (1 - jsd_beta) * (logp - _mixture(logp, logq, jsd_beta))
    return p * (g - torch.linalg.vecdot(p, g)[:, None])


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return torch.linalg.vecdot(logp.exp(), logp - logq)


def _mixture(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """log(β q + (1 − β) p)."""
    return torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))


def _check_kind(kind: str, jsd_beta: float) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(DIVERGENCES)}")
    if kind == "jsd" and not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta is {jsd_beta}; expected between 0 and 1 (its limits are the two KLs)")
