"""A real Trainer that learns in milliseconds a step; run as a script, it trains until it is told to stop.

python tests/tiny_trainer.py OUTPUT_DIR MAX_STEPS
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from rlseq.training.trl.trainer import RunMixin


class Line(torch.nn.Module):
    """y = w·x, fitted to y = 2x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        prediction = self.weight * x
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


class TinyTrainer(RunMixin, Trainer):
    """A Trainer as the recipes' trainers are."""


@dataclass
class TinyArguments(TrainingArguments):
    """With what the recipes' settings have beside transformers'."""

    max_skipped_steps: int = 3


def tiny_trainer(output_dir, callbacks, *, rows: int = 8, **settings) -> Trainer:
    """A trainer of `rows` examples, 2 a step; `settings` are TrainingArguments."""
    data = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(rows)]
    defaults = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
    }
    args = TinyArguments(output_dir=str(output_dir), use_cpu=True, **{**defaults, **settings})
    return TinyTrainer(Line(), args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


class _Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        print(state.global_step, flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    from rlseq.training.run.callbacks import GracefulStop, MetricsWriter

    stop = GracefulStop()
    trainer = tiny_trainer(
        sys.argv[1],
        [stop, _Slow(), MetricsWriter(Path(sys.argv[1]) / "metrics.jsonl")],
        max_steps=int(sys.argv[2]),
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer.train()
    print(f"stopped by {stop.stopped} at {trainer.state.global_step}")
