"""Two curves of quality over entropy, compared where their entropies are equal; of many resamples at once.

A curve is K points (entropy, quality), one a temperature, joined by straight lines in order of entropy. Arrays have a
leading axis of n resamples, each with curves of its own: entropies, order and range differ from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """n curves of K points each.

    Attributes:
        entropies: (n, K) nats, rising along K.
        qualities: (n, K).
    """

    entropies: np.ndarray
    qualities: np.ndarray

    @classmethod
    def through(cls, entropies: np.ndarray, qualities: np.ndarray) -> Curve:
        """The curves through points (n, K) in any order."""
        order = np.argsort(entropies, axis=1, kind="stable")
        return cls(*(np.take_along_axis(points, order, axis=1) for points in (entropies, qualities)))

    def at(self, x: np.ndarray) -> np.ndarray:
        """Quality (n,) at entropies x (n,); NaN outside the curve's range: nothing is extrapolated."""
        _, _, q0, q1, share = self._segment(x)
        return np.where(self._holds(x), q0 + share * (q1 - q0), np.nan)

    def area(self, x: np.ndarray) -> np.ndarray:
        """Integral (n,) of the quality from the curve's lowest entropy to x (n,); NaN outside its range."""
        left, e0, q0, q1, share = self._segment(x)
        widths = np.diff(self.entropies, axis=1)
        trapezoids = widths * (self.qualities[:, 1:] + self.qualities[:, :-1]) / 2
        before = np.concatenate([np.zeros((len(widths), 1)), trapezoids.cumsum(1)], axis=1)
        here = (x - e0) * (q0 + share * (q1 - q0) / 2)
        return np.where(self._holds(x), np.take_along_axis(before, left, axis=1)[:, 0] + here, np.nan)

    def _holds(self, x: np.ndarray) -> np.ndarray:
        return (self.entropies[:, 0] <= x) & (x <= self.entropies[:, -1])

    def _segment(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """The point at the left of x, its entropy and quality, the quality at the right, and where between x is."""
        left = (self.entropies <= x[:, None]).sum(1, keepdims=True) - 1
        left = left.clip(0, self.entropies.shape[1] - 2)  # (n, 1)
        e0, e1, q0, q1 = (
            np.take_along_axis(points, left + side, axis=1)[:, 0]
            for points in (self.entropies, self.qualities)
            for side in (0, 1)
        )
        width = e1 - e0
        share = np.divide(x - e0, width, out=np.ones_like(x), where=width > 0)
        return left, e0, q0, q1, share


def mean_gap(base: Curve, other: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of (other − base), linear between points, over the entropies that both curves reach; and that range.

        1 / (high − low) ∫_low^high (other(h) − base(h)) dh

    Returns:
        (gap, low, high), each (n,); all NaN where the ranges do not overlap.
    """
    low = np.maximum(base.entropies[:, 0], other.entropies[:, 0])
    high = np.minimum(base.entropies[:, -1], other.entropies[:, -1])
    low, high = (np.where(low < high, side, np.nan) for side in (low, high))
    areas = [curve.area(high) - curve.area(low) for curve in (base, other)]
    return (areas[1] - areas[0]) / (high - low), low, high
