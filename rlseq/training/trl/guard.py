"""Optimizer steps whose loss or gradient is not finite: they move nothing, on any process, and their batch is kept."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rlseq.errors import TrainingError
from rlseq.training.run.records import append_jsonl

FOLDER = "skipped"
NAN = float("nan")


class Guard:
    """Skips optimizer steps whose loss or gradient is not finite, on all processes or on none.

    A skipped step moves no weight, no optimizer state and no average of weights; it counts as a step, and the
    learning rate's schedule continues. Its batch is kept in RUN/skipped/step-N/, one file per rank.

    Args:
        run: the run's folder.
        max_in_a_row: the number of skipped steps in a row after which the run ends with a `TrainingError`.
        accelerator: of the trainer.
        describe: a micro-batch -> one record per row, for the reader.

    Attributes:
        step_was_skipped: whether the last optimizer step was.
    """

    def __init__(
        self,
        run: Path,
        *,
        max_in_a_row: int,
        accelerator: Accelerator,
        describe: Callable[[Any], list[dict[str, Any]]],
    ):
        self.run = run
        self.max_in_a_row = max_in_a_row
        self.accelerator = accelerator
        self.describe = describe
        self.step_was_skipped = False
        self.in_a_row = 0
        self.since_logged = 0
        self.micro_batches: list[tuple[Any, Tensor]] = []  # and their losses, since the last step

    def keep(self, inputs: Any, loss: Tensor) -> Tensor:
        """Remember a micro-batch until the optimizer has stepped; returns its loss, 0 where that is not finite.

        NaN would stay in transformers' running sum for good; `with_skipped` logs it another way.
        """
        self.micro_batches.append((inputs, loss.detach()))
        return torch.where(loss.isfinite(), loss, 0.0)

    def before_step(self, model: torch.nn.Module, grad_norm: Any, *, step: int) -> None:
        """Drop the gradients of a step that is not finite on any process; called on all of them before the optimizer.

        Args:
            model: whose parameters the optimizer moves.
            grad_norm: of this step, or None where it is not computed.
            step: the number of the step that the optimizer is about to make.

        Raises:
            TrainingError: too many were skipped in a row, or DeepSpeed has made the step already.
        """
        batches, self.micro_batches = self.micro_batches, []
        losses = torch.stack([loss for _, loss in batches]) if batches else torch.zeros(1)
        bad = not losses.isfinite().all().item()
        norm = NAN if grad_norm is None or bad else float(grad_norm)
        if self.accelerator.scaler is None:  # a gradient that overflows in float16 is the loss scaler's to skip
            bad = bad or not (math.isfinite(norm) or grad_norm is None)
        skipped = self.accelerator.reduce(torch.tensor(float(bad), device=self.accelerator.device)).item() > 0
        self.step_was_skipped = skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped:
            self._skip(model, batches, norm, step)

    def _skip(self, model: torch.nn.Module, batches: Sequence[tuple[Any, Tensor]], grad_norm: float, step: int) -> None:
        for parameter in model.parameters():
            parameter.grad = None  # what has no gradient is left alone by the optimizer, its state too
        self.since_logged += 1
        folder = self.run / FOLDER / f"step-{step:06d}"
        keep_batch(folder, step, self.accelerator.process_index, batches, self.describe)
        losses = [round(loss.item(), 6) for _, loss in batches]
        what = f"optimizer step {step} was skipped: loss {losses}, norm of the gradient {grad_norm:.4g}"
        if self.accelerator.is_main_process:
            print(f"warning, {what}. Its batch: {folder}", file=sys.stderr, flush=True)
        if getattr(self.accelerator.state, "deepspeed_plugin", None) is not None:
            raise TrainingError(
                f"{what}, but DeepSpeed had made it by then. Go on from the last checkpoint, with a lower "
                "--learning_rate.",
                on_every_rank=True,
            )
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"{what}; so were {self.max_in_a_row} in a row (max_skipped_steps), so the run ends. The weights are "
                f"as before them. Look at the batches in {folder.parent} (a reward or a log-prob that is huge?), check "
                "that the model's own weights are finite (`rlseq doctor`), and resume from the last checkpoint with a "
                "lower --learning_rate, a --max_grad_norm above 0, or --bf16 false --fp16 false.",
                on_every_rank=True,
            )

    def with_skipped(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What training logs, with the number of steps skipped since it last did."""
        if not self.since_logged:
            return logs
        logs = logs | {"skipped_steps": self.since_logged}
        if "loss" in logs:
            logs["loss"] = NAN  # a mean with steps left out would look like one without
        self.since_logged = 0
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run counts on from."""
        return {"skipped_since_logged": self.since_logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.since_logged = state["skipped_since_logged"]


def keep_batch(
    folder: Path,
    step: int,
    rank: int,
    batches: Sequence[tuple[Any, Tensor]],
    describe: Callable[[Any], list[dict[str, Any]]],
) -> None:
    """Write this rank's micro-batches: rank-R.jsonl to read, one line per row, and rank-R.safetensors, every tensor.

    Args:
        batches: (inputs, loss) of each micro-batch of an optimizer step; inputs are a mapping, or a dataclass like
            `MicroBatch`. Tensors are named `NUMBER.INPUT`, where NUMBER counts the micro-batches.
        describe: inputs -> a record a row.
    """
    records, tensors = [], {}
    for number, (inputs, loss) in enumerate(batches):
        common = {"step": step, "rank": rank, "micro_batch": number, "loss": loss.item()}
        records += [common | record for record in describe(inputs)] or [common]
        for name, x in (inputs if isinstance(inputs, Mapping) else vars(inputs)).items():
            if torch.is_tensor(x):
                tensors[f"{number}.{name}"] = x.detach().cpu().clone().contiguous()
    (folder / f"rank-{rank}.jsonl").unlink(missing_ok=True)
    append_jsonl(folder / f"rank-{rank}.jsonl", records)
    save_file(tensors, folder / f"rank-{rank}.safetensors")
