"""Majority votes among some of the votes: who wins, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its stats load on first use, which takes a second

from rlseq.errors import RlseqError


def win_chances(votes: Sequence[int], k: int) -> np.ndarray:
    """The chance of each of m answers to be the most frequent among k of the n votes, chosen without replacement.

    Of answers that tie, each wins with the same chance. No subsets are listed or sampled: with U uniform on (0, 1)
    deciding ties, answer j wins with x votes where every other has fewer, or has x and a smaller U, so that

        P(j wins) = Σ_x P(X_j = x) ∫₀¹ P(all other X_i < x, or X_i = x and U_i < u | X_j = x) du

    Counts of a sample without replacement are independent binomials X_i ~ B(votes_i, k/n) given that they sum to k.
    Given the sum, the product over answers is a coefficient of a product of polynomials, which is read off by a
    discrete Fourier transform; the integral is over a polynomial in u, for which Gauss-Legendre nodes are exact.
    Answers with as many votes have the same chance. All up to rounding, about 1e-13.

    Args:
        votes: how many of the n votes each answer has, from 1.
        k: votes chosen, 1 ≤ k ≤ n.

    Returns:
        (m,) chances, which sum to 1.

    Raises:
        RlseqError: an answer without a vote, or k out of range.
    """
    counts = np.asarray(votes, dtype=int)
    n = int(counts.sum())
    if counts.ndim != 1 or np.any(counts < 1) or not 1 <= k <= n:
        raise RlseqError(
            f"win_chances got k={k} and votes {list(votes)}; it needs answers with votes and 1 <= k <= n, their sum."
        )
    if k == n:
        first = counts == counts.max()
        return first / first.sum()
    sizes, kind, answers = np.unique(counts, return_inverse=True, return_counts=True)  # (D,) each
    most = min(k, int(sizes[-1]))
    z = np.exp(-2j * np.pi * np.arange((n + 1) // 2 + 1) / (n + 1))  # (Z,) half of the roots: coefficients are real
    terms = (
        scipy.stats.binom.pmf(np.arange(most + 1), sizes[:, None], k / n)[..., None] * z ** np.arange(most + 1)[:, None]
    )
    below = np.cumsum(terms, axis=1)  # (D, X, Z): at most x votes
    wins = np.zeros((len(sizes), len(z)), dtype=complex)
    for x in range(1, most + 1):
        ties = min(k // x, int(answers[sizes >= x].sum())) - 1  # the degree in u
        nodes, weights = np.polynomial.legendre.leggauss(ties // 2 + 1)
        u = (nodes[:, None] + 1) / 2
        loses = below[:, None, x - 1] + u * terms[:, None, x]  # (D, U, Z): one answer of each size
        every = loses ** answers[:, None, None]
        before = np.cumprod(np.concatenate([np.ones_like(every[:1]), every[:-1]]), axis=0)
        after = np.cumprod(np.concatenate([np.ones_like(every[:1]), every[:0:-1]]), axis=0)[::-1]
        others = before * after * loses ** (answers - 1)[:, None, None]
        wins += terms[:, x] * np.einsum("u,duz->dz", weights / 2, others)
    found = np.fft.irfft(wins, n + 1, axis=1)[:, k] / scipy.stats.binom.pmf(k, n, k / n)
    return found[kind]
