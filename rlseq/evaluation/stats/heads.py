"""Softmax regression with an L2 penalty: linear heads on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)  # from strong to weak


def fit_head(features: Tensor, targets: Tensor, penalty: float, start: Tensor) -> Tensor:
    """The minimum of a regularised cross-entropy, by full-batch L-BFGS under the strong Wolfe conditions in float64.

        min_W  −1/N Σ_i log softmax(x_i W)_{y_i} + penalty/2 · ‖W‖²

    The objective is strictly convex: the minimum is one point, whatever the start.

    Args:
        features: (N, F) float64; or (N,) long, the places of one-hot vectors.
        targets: (N,) long, classes from 0.
        penalty: above 0, nats.
        start: (F, C) float64.

    Returns:
        W (F, C).
    """
    weights = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(logits(features, weights), targets) + penalty / 2 * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return weights.detach()


def chosen_head(features: Tensor, targets: Tensor, judged: Tensor, shape: tuple[int, int]) -> Tensor:
    """Fit a head on N examples with the penalty that is best on some of them, fitted on the others.

    Penalties are tried from strong to weak until the loss on the judged examples rises.

    Args:
        features, targets: as for `fit_head`.
        judged: (N,) bool, the examples that judge penalties.
        shape: (F, C).

    Returns:
        W (F, C), fitted on all N.
    """
    weights = torch.zeros(shape, dtype=torch.float64, device=features.device)
    best, best_loss = PENALTIES[0], float("inf")
    for penalty in PENALTIES:
        weights = fit_head(features[~judged], targets[~judged], penalty, weights)
        loss = cross_entropy(logits(features[judged], weights), targets[judged]).item()
        if loss >= best_loss:
            break
        best, best_loss = penalty, loss
    return fit_head(features, targets, best, weights)


def logits(features: Tensor, weights: Tensor) -> Tensor:
    """(N, C) of features as for `fit_head` and weights (F, C)."""
    return weights[features] if features.dtype == torch.long else features @ weights


cross_entropy = torch.nn.functional.cross_entropy
