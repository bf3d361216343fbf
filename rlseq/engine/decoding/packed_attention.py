"""Attention over packed rows that computes what tokens can see and little else, on a CPU.

A packed row holds a prompt and its completions, and most pairs of its tokens do not see each other (`rlseq.engine.
packing`). SDPA with a mask computes the whole square, and its backward on a CPU takes about six times its forward. Here
each block of queries attends to the keys that one of them sees: the prompt and what its own completions hold. The
backward computes the probabilities again from the log of their sums, as FlashAttention does (Dao et al. 2022,
arXiv:2205.14135), in products that the processor's matrix units serve. Numbers are SDPA's to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NEGLIGIBLE = 80.0  # nats; torch's exp of what underflows takes 60 times as long, so no number below e⁻⁸⁰ is made
FAR = 1e30  # below every score
BLOCK = 64  # queries; 128 took as long, 32 longer (2 CPU cores)


class Blocks:
    """Which keys each block of queries of R rows of S tokens attends to.

    Args:
        seen_RS: (R, S), the column before which each token is seen; no token sees one after it.
    """

    def __init__(self, seen_RS: Tensor):
        self.tokens = seen_RS.shape[1]
        self.of_row: list[list[tuple[slice, slice | Tensor, Tensor]]] = []  # queries; keys (K,); 1 where seen, (n, K)
        for seen in seen_RS:
            blocks = []
            for start in range(0, self.tokens, BLOCK):
                queries = torch.arange(start, min(start + BLOCK, self.tokens))
                keys = torch.nonzero(seen[: queries[-1] + 1] > start).flatten()
                sees = ((keys <= queries[:, None]) & (queries[:, None] < seen[keys])).float()
                first, last = int(keys[0]), int(keys[-1]) + 1
                together = last - first == len(keys)  # a slice is read where it lies
                blocks.append((slice(start, int(queries[-1]) + 1), slice(first, last) if together else keys, sees))
            self.of_row.append(blocks)


class _Attention(torch.autograd.Function):
    """query (R, Hq, S, D), key and value (R, H, S, D), N = Hq / H queries to a head of keys → (R, S, Hq, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float):
        (R, Hq, S, D), H = query.shape, key.shape[1]
        exact = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(R, S, H, Hq // H, D)
        sums = query.new_empty(R, Hq, S, dtype=exact)  # log Σ exp of each query's scores
        for row, queries, keys, sees in _each(blocks):
            scores, keep = _scores(query, key, row, queries, keys, scale)  # (Hq, n, K)
            highest = scores.add_((sees - 1).mul_(FAR)).amax(-1, keepdim=True)
            probs = _exp(scores.sub_(highest), sees)
            total = probs.sum(-1, keepdim=True)
            found = torch.bmm(probs.to(value.dtype).view(H, -1, keep), value[row][:, keys])  # (H, N·n, D)
            found = found.view(Hq, -1, D).to(exact).div_(total).view(H, Hq // H, -1, D)
            out[row, queries] = found.permute(2, 0, 1, 3).to(out.dtype)
            sums[row, :, queries] = highest.add_(total.log_()).squeeze(-1)
        out = out.view(R, S, Hq, D)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # (R, S, Hq, D)
        query, key, value, out, sums = ctx.saved_tensors
        (_, Hq, _, D), H = query.shape, key.shape[1]
        exact = sums.dtype
        along = torch.einsum("rshd,rshd->rhs", gradient.to(exact), out.to(exact))  # Σ_k P ∂P of each query
        gradient = gradient.to(query.dtype).transpose(1, 2)  # (R, Hq, S, D)
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros_like(key, dtype=exact), torch.zeros_like(value, dtype=exact)
        for row, queries, keys, sees in _each(ctx.blocks):
            scores, keep = _scores(query, key, row, queries, keys, ctx.scale)  # (Hq, n, K)
            probs = _exp(scores.sub_(sums[row, :, queries, None]), sees)
            of_out = gradient[row, :, queries].reshape(H, -1, D)
            rounded = probs.to(query.dtype).view(H, -1, keep)
            _add(to_value[row], keys, torch.bmm(rounded.transpose(1, 2), of_out))
            of_probs = torch.bmm(of_out, value[row][:, keys].transpose(1, 2)).to(exact).view(Hq, -1, keep)
            of_scores = of_probs.sub_(along[row, :, queries, None]).mul_(probs).mul_(ctx.scale)
            of_scores = of_scores.to(query.dtype).view(H, -1, keep)
            to_query[row, :, queries] = torch.bmm(of_scores, key[row][:, keys]).view(Hq, -1, D)
            _add(to_key[row], keys, torch.bmm(of_scores.transpose(1, 2), query[row, :, queries].reshape(H, -1, D)))
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None


def _each(blocks: Blocks) -> Iterator[tuple[int, slice, slice | Tensor, Tensor]]:
    for row, of_row in enumerate(blocks.of_row):
        for queries, keys, sees in of_row:
            yield row, queries, keys, sees


def _scores(
    query: Tensor, key: Tensor, row: int, queries: slice, keys: slice | Tensor, scale: float
) -> tuple[Tensor, int]:
    """Scaled scores (Hq, n, K) of a block in float32 or wider, those not seen too, and K."""
    (_, Hq, _, D), H = query.shape, key.shape[1]
    of_block = query[row, :, queries].reshape(H, -1, D)
    scores = torch.bmm(of_block, key[row][:, keys].transpose(1, 2))  # (H, N·n, K)
    keep = scores.shape[-1]
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).view(Hq, -1, keep).mul_(scale), keep


def _exp(scores: Tensor, sees: Tensor) -> Tensor:
    """exp of scores that are at most 0 where seen, and 0 elsewhere, in place."""
    return scores.clamp_(-NEGLIGIBLE, 1.0).exp_().mul_(sees)


def _add(to: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    """Add (H, K, D) to the rows `keys` of (H, S, D)."""
    if isinstance(keys, slice):
        to[:, keys] += part
    else:
        to.index_add_(1, keys, part.to(to.dtype))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float | None) -> Tensor:
    """Attention of packed rows, differentiable.

    Args:
        query: (R, Hq, S, D).
        key, value: (R, H, S, D); H divides Hq.
        blocks: of these rows.
        scale: of the scores; None: 1/√D.

    Returns:
        (R, S, Hq, D).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lower = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64  # as autocast does with SDPA
    dtype = torch.get_autocast_dtype("cpu") if lower else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query, key, value, blocks, scale)
