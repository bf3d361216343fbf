"""Averaging the weights of a run: what is kept is the mean of where the updates wander, with less of their noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from rlseq.errors import ConfigError

FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights; the final model is the average.

        θ̄_0 = θ_0,   θ̄_n = d θ̄_{n−1} + (1 − d) θ_n

    Policy gradients are noisy, and a constant learning rate keeps the weights wandering around where they are
    headed; their average is nearer to it (Polyak & Juditsky 1992; Tarvainen & Valpola 2017). Training itself does
    not see the average: checkpoints hold the weights as trained, with the average beside them for a resumed run. It is
    kept in float32 or wider, since bfloat16 would round most of a step of 1 − d away.

    Args:
        trainer: the trainer whose model is averaged; not for sharded models.
        decay: d in (0, 1); the average looks back over about 1 / (1 − d) steps.
        interpolation_weight: w in [0, 1); the result is w θ_0 + (1 − w) θ̄_N, between where training began and where it
            went (WiSE-FT, Wortsman et al. 2022). θ_0 is the model as the trainer was given it.

    Raises:
        ConfigError: the decay is outside (0, 1), or the model is sharded over processes.
    """

    def __init__(self, trainer: Trainer, decay: float, interpolation_weight: float = 0.0):
        if not 0 < decay < 1:
            raise ConfigError(f"ema_decay is {decay}; expected a number in (0, 1), or 0 for no average")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("ema_decay needs whole weights on each process; set it to 0 under FSDP or DeepSpeed")
        self.trainer = trainer
        if not 0 <= interpolation_weight < 1:
            raise ConfigError(f"interpolation_weight is {interpolation_weight}; expected a number in [0, 1)")
        self.decay = decay
        self.interpolation_weight = interpolation_weight
        self.start = {name: p.detach().clone() for name, p in self._trained().items()} if interpolation_weight else {}
        self.average: dict[str, torch.Tensor] = {}

    def _trained(self) -> dict[str, torch.Tensor]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.average = {name: p.detach().to(_wide(p), copy=True) for name, p in self._trained().items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.guard.step_was_skipped:
            return
        for name, p in self._trained().items():
            self.average[name].lerp_(p.to(_wide(p)), 1 - self.decay)

    def save_into(self, checkpoint: Path) -> None:
        """Write the average beside the weights; the trainer calls it before it marks the checkpoint as whole."""
        save_file({name: value.contiguous().cpu() for name, value in self.average.items()}, checkpoint / FILE)

    def load_from(self, checkpoint: Path) -> None:
        """Continue with the average of a checkpoint, where it holds one; the trainer calls it once training begins."""
        if (checkpoint / FILE).is_file():
            saved = load_file(checkpoint / FILE)
            self.average = {name: saved[name].to(p.device, _wide(p)) for name, p in self._trained().items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights; called once, when training has ended."""
        for name, p in self._trained().items():
            result = self.average[name]
            if self.interpolation_weight:
                result = result.lerp(self.start[name].to(result), self.interpolation_weight)
            p.copy_(result)


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
