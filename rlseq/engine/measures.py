"""Measures made of log-probs: of blocks of tokens, per byte, of rows with several references, of k samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rlseq.engine.float64 import to_float64


def sequence_logprob(token_logprobs: Tensor) -> Tensor:
    """log p(y | x) = Σ_t log p(y_t | x, y_<t) of one completion: (T,) nats -> () nats; empty gives 0."""
    return token_logprobs.sum()


def block_nll(token_logprobs: Tensor, n: int) -> Tensor:
    """Loss of each block of n tokens, −log p(block | all before it): an n-token loss.

        loss_j = −Σ_{t = jn}^{jn+n-1} log p(y_t | x, y_<t)

    By the chain rule the blocks sum to −log p(y | x) for every n: n = 1 is the next-token loss, n = T the
    loss of the whole sequence, and no n teaches more than another.

    Args:
        token_logprobs: (T,) nats.
        n: tokens in a block; the last block may be shorter.

    Returns:
        (⌈T / n⌉,) nats.

    Raises:
        ValueError: n below 1, or not one sequence.
    """
    if n < 1 or token_logprobs.ndim != 1:
        raise ValueError(f"block_nll takes (T,) and n >= 1, not {tuple(token_logprobs.shape)} and n = {n}")
    blocks = -(-len(token_logprobs) // n)
    filled = nn.functional.pad(token_logprobs, (0, blocks * n - len(token_logprobs)))
    return -filled.view(blocks, n).sum(1)


def perplexity(total_nll: float, tokens: int) -> float:
    """exp(total_nll / tokens): total_nll in nats over that many tokens. inf where the exponent overflows."""
    if tokens < 1:
        raise ValueError(f"perplexity of {tokens} tokens; expected at least 1")
    mean = float(total_nll) / tokens
    return math.exp(mean) if mean < 709 else math.inf if mean == mean else mean


def bits_per_byte(total_nll: float, num_bytes: int) -> float:
    """total_nll / (ln 2 · num_bytes): bits an ideal coder spends on a byte of the text; total_nll in nats.

    Unlike perplexity it does not depend on the tokenizer. num_bytes counts UTF-8 bytes of what was scored.
    """
    if num_bytes < 1:
        raise ValueError(f"bits_per_byte of {num_bytes} bytes; expected at least 1")
    return float(total_nll) / (math.log(2) * num_bytes)


def reference_probability(sequence_logprobs: Tensor, row_index: Tensor, num_rows: int) -> Tensor:
    """The chance that sampling produces one of a row's references, exactly and without sampling.

        p_i = Σ_{y ∈ references of row i} exp(log q(y | x_i))

    Distinct sequences are disjoint events, so their probabilities add. References that repeat within a row
    would count twice: the caller passes distinct ones (compared by token ids, stop token included). Where
    references enumerate the right answers, p_i is the expected accuracy of one sample.

    Args:
        sequence_logprobs: (N,) nats, of N references in all, under the distribution q that is sampled from.
        row_index: (N,) long, the row of each.
        num_rows: rows; one without references has p = 0.

    Returns:
        (num_rows,) probabilities, in the dtype given.

    Raises:
        ValueError: unequal shapes.
    """
    if sequence_logprobs.ndim != 1 or sequence_logprobs.shape != row_index.shape:
        shapes = f"{tuple(sequence_logprobs.shape)} and {tuple(row_index.shape)}"
        raise ValueError(f"sequence_logprobs and row_index have shapes {shapes}; expected (N,) twice")
    return sequence_logprobs.new_zeros(num_rows).index_add(0, row_index, sequence_logprobs.exp())


def exact_pass_at_k(p: Tensor, k: int) -> Tensor:
    """Mean over rows of 1 − (1 − p_i)^k: the chance that k independent samples hold a right one.

    The exact expectation, not an estimate; p_i is the chance of one sample (`reference_probability`).

    Args:
        p: (rows,) probabilities; above 1 by rounding counts as 1.
        k: samples.

    Returns:
        () in float64.

    Raises:
        ValueError: k below 1, no rows, or a p that is not a probability (references passed twice?).
    """
    if k < 1 or p.ndim != 1 or len(p) == 0:
        raise ValueError(f"exact_pass_at_k takes (rows,) and k >= 1, not {tuple(p.shape)} and k = {k}")
    if not ((p >= 0) & (p <= 1 + 1e-4)).all():
        raise ValueError("p is not within 0 and 1; are the references of a row distinct?")
    miss = torch.log1p(-to_float64(p).clamp(max=1))  # log(1 − p) without losing a small p
    return -torch.expm1(k * miss).mean()
