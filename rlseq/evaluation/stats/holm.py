"""Many comparisons at once: p-values that allow for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values of m comparisons (Holm 1979): rejecting those below α errs in any with chance α at most.

    With p_(1) ≤ … ≤ p_(m), whatever their dependence:

        adjusted p_(i) = max_{j ≤ i} min(1, (m − j + 1) · p_(j))

    Args:
        p_values: (m,); NaN where a comparison is not defined, which does not count.

    Returns:
        (m,), in the order given.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")  # NaN last
    order = order[: np.count_nonzero(~np.isnan(p))]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, np.arange(len(order), 0, -1) * p[order]))
    return adjusted
