"""The series that training logs, kept where TRL keeps them until it logs: `_metrics`, which checkpoints hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TrainingMetrics:
    """Adds to the series of the log: numbers, and means over the ranks or over an optimizer step.

    Args:
        trainer: TRL's, on every process.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.step_sums: dict[str, Tensor] = {}  # Σ and count, of the optimizer step under way

    @property
    def series(self) -> dict[str, list[float]]:
        """Numbers by name, of training or of an evaluation; what has none yet is an empty list."""
        return self.trainer._metrics["train" if self.trainer.model.training else "eval"]

    def mean(self, name: str, value: Tensor) -> None:
        """The mean of a number, (), or of numbers over all ranks."""
        self.series[name].append(self.trainer.accelerator.gather(value.detach()).mean().item())

    def masked_step_mean(self, name: str, x_BT: Tensor, mask: Tensor) -> None:
        """The mean over the counted tokens of an optimizer step: of all its micro-batches, on all ranks."""
        self.step_mean(name, torch.where(mask, x_BT, 0.0).sum(), mask.sum())

    def step_mean(self, name: str, total: Tensor, count: Tensor) -> None:
        """Σ total / Σ count over the micro-batches of an optimizer step and all ranks."""
        accelerator = self.trainer.accelerator
        sums = torch.stack([total.detach(), count.to(total.dtype)])
        self.step_sums[name] = self.step_sums.get(name, 0.0) + sums
        if accelerator.sync_gradients:
            total, count = accelerator.reduce(self.step_sums.pop(name), reduction="sum").tolist()
            self.series[name].append(total / max(count, 1.0))
