"""Does one number tell of another: rank correlation and AUROC, of many resamples at once.

A bootstrap resample is a count a row; the functions take counts (n, R) and return n values. Sorting is done once: under
any counts the ranks follow from sums in sorted order.
"""

from __future__ import annotations

import numpy as np


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation of R pairs, pair i taken counts[., i] times; ties share their mean rank.

    Args:
        x, y: (R,) finite.
        counts: (n, R), from 0; None: every pair once.

    Returns:
        (n,); NaN where x or y takes one value only.
    """
    counts = np.ones((1, len(x))) if counts is None else counts
    ranks = [_ranks(np.asarray(values, dtype=float), counts) for values in (x, y)]  # 2 × (n, R)
    total = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = [r - (counts * r).sum(1, keepdims=True) / total for r in ranks]
        sizes = [(counts * c**2).sum(1) for c in centred]
        correlation = (counts * centred[0] * centred[1]).sum(1) / np.sqrt(sizes[0] * sizes[1])
    varies = (sizes[0] > 1e-9) & (sizes[1] > 1e-9)
    return np.where(varies, correlation.clip(-1, 1), np.nan)


def auroc(scores: np.ndarray, right: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """The chance that a right one scores above a wrong one, ties counting one half (Hanley & McNeil 1982).

    Args:
        scores: (S,) finite.
        right: (S,) of 0 and 1.
        counts: (n, S), how often each is taken; None: once.

    Returns:
        (n,); NaN where all are right or none is.
    """
    counts = np.ones((1, len(scores))) if counts is None else counts
    order, starts = _groups(np.asarray(scores, dtype=float))
    right = np.asarray(right, dtype=float)[order]
    sorted_counts = counts[:, order]
    positive = np.add.reduceat(sorted_counts * right, starts, axis=1)  # (n, distinct scores)
    negative = np.add.reduceat(sorted_counts * (1 - right), starts, axis=1)
    below = negative.cumsum(1) - negative / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n, R) mean ranks of the values where value i stands counts[., i] times."""
    order, starts = _groups(values)
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)  # (n, distinct values)
    ranks = sizes.cumsum(1) - (sizes - 1) / 2
    group = np.empty(len(values), dtype=int)
    group[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))
    return ranks[:, group]


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that sorts values, and where in it each run of equal ones starts."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
