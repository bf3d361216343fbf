"""Around a trainer's step: what is not finite moves nothing, what fails for want of memory or disk says so.

train              a failed allocation names the update and what to lower
  compute_loss     micro-batch and loss are remembered until the optimizer has stepped
_get_grad_norm     the last call before the optimizer: here a step is skipped, on all ranks or on none
_save_checkpoint   a checkpoint is whole, or is not there
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.errors import TrainingError
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.run.checkpoints import through_to_disk
from rlseq.training.run.faults import memory_for, saving
from rlseq.training.run.records import append_jsonl
from rlseq.training.run.rollout_log import trained_records
from rlseq.training.trl.resume_state import ResumeStateMixin
from rlseq.types import Prompt

FOLDER = "skipped"
NAN = float("nan")


class GuardMixin(Trainer):
    """For TRL's trainers: skips optimizer steps whose loss or gradient is not finite, and explains other faults.

    A skipped step moves no weight, no optimizer state and no average of weights; it counts as a step, and the
    learning rate's schedule continues. Its batch is kept in RUN/skipped/step-N/, one file per rank. After
    `args.max_skipped_steps` of them in a row the run ends with a `TrainingError`.

    Attributes:
        step_was_skipped: whether the last optimizer step was.
    """

    step_was_skipped = False
    _skipped_in_a_row = 0
    _skipped_since_logged = 0
    _micro_batches: tuple[tuple[Mapping[str, Any], torch.Tensor], ...] = ()  # and their losses, since the last step

    # What a script calls by itself, too: a process that fails leaves no other waiting.

    @raise_on_all_ranks(exchange=False)
    def train(self, *args, **kwargs):
        with memory_for("the update", self._memory_advice):
            return super().train(*args, **kwargs)

    @raise_on_all_ranks(exchange=False)
    def evaluate(self, *args, **kwargs):
        with memory_for("evaluation", self._evaluation_advice):
            return super().evaluate(*args, **kwargs)

    @raise_on_all_ranks(exchange=False)
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = dict(inputs)  # SFT's loss takes what it needs out of `inputs`
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return found
        loss = found[0] if return_outputs else found
        self._micro_batches += ((given, loss.detach()),)
        # NaN would stay in transformers' running sum for good; the log says it another way.
        loss = torch.where(loss.isfinite(), loss, 0.0)
        return (loss, *found[1:]) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        batches, self._micro_batches = self._micro_batches, ()
        losses = torch.stack([loss for _, loss in batches]) if batches else torch.zeros(1)
        bad = not losses.isfinite().all().item()
        norm = NAN if grad_norm is None or bad else float(grad_norm)
        if self.accelerator.scaler is None:  # a gradient that overflows in float16 is the loss scaler's to skip
            bad = bad or not (math.isfinite(norm) or grad_norm is None)
        skipped = self.accelerator.reduce(torch.tensor(float(bad), device=self.accelerator.device)).item() > 0
        self.step_was_skipped = skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self._skip(model, batches, norm)
        return grad_norm

    def _skip(self, model, batches: Sequence[tuple[Mapping[str, Any], torch.Tensor]], grad_norm: float) -> None:
        step, limit = self.state.global_step + 1, self.args.max_skipped_steps
        for parameter in model.parameters():
            parameter.grad = None  # what has no gradient is left alone by the optimizer, its state too
        self._skipped_since_logged += 1
        folder = Path(self.args.output_dir) / FOLDER / f"step-{step:06d}"
        keep_batch(folder, step, self.accelerator.process_index, batches, self.describe_rows)
        losses = [round(loss.item(), 6) for _, loss in batches]
        what = f"optimizer step {step} was skipped: loss {losses}, norm of the gradient {grad_norm:.4g}"
        if self.accelerator.is_main_process:
            print(f"warning, {what}. Its batch: {folder}", file=sys.stderr, flush=True)
        if self.is_deepspeed_enabled:
            raise TrainingError(
                f"{what}, but DeepSpeed had made it by then. Go on from the last checkpoint, with a lower "
                "--learning_rate.",
                on_every_rank=True,
            )
        if self._skipped_in_a_row >= limit:
            raise TrainingError(
                f"{what}; so were {limit} in a row (max_skipped_steps), so the run ends. The weights are as before "
                f"them. Look at the batches in {folder.parent} (a reward or a log-prob that is huge?), check that the "
                "model's own weights are finite (`rlseq doctor`), and resume from the last checkpoint with a lower "
                "--learning_rate, a --max_grad_norm above 0, or --bf16 false --fp16 false.",
                on_every_rank=True,
            )

    def describe_rows(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A micro-batch's rows for the reader; trainers on rollouts say more."""
        ids = inputs.get("input_ids")
        return [] if ids is None else [{"text": self.processing_class.decode(row)} for row in ids.tolist()]

    def log(self, logs, start_time=None):
        if self._skipped_since_logged and self.model.training:
            logs = logs | {"skipped_steps": self._skipped_since_logged}
            if "loss" in logs:
                logs["loss"] = NAN  # a mean with steps left out would look like one without
            self._skipped_since_logged = 0
        super().log(logs, start_time)

    def _memory_advice(self) -> str:
        args = self.args
        longest = "max_completion_length" if hasattr(args, "max_completion_length") else "max_length"
        advice = (
            f"Lower --per_device_train_batch_size ({args.per_device_train_batch_size}) and raise "
            f"--gradient_accumulation_steps ({args.gradient_accumulation_steps}) by as much, which leaves the batch as "
            f"it is; or lower --{longest} ({getattr(args, longest)})"
        )
        return advice + ("." if args.gradient_checkpointing else "; or give --gradient_checkpointing true.")

    def _evaluation_advice(self) -> str:
        return f"Lower --per_device_eval_batch_size ({self.args.per_device_eval_batch_size})."

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        wait, saves = self.accelerator.wait_for_everyone, self.args.should_save
        whole = saving(checkpoint, main_process=saves, wait=wait)
        # The trainer's state marks the checkpoint as whole: the process that writes it waits for every rank's part.
        with whole, through_to_disk(self.state, checkpoint, wait=wait):
            self.save_beside(checkpoint)
            super()._save_checkpoint(model, trial)
            if not saves:
                wait()


class RolloutGuardMixin(GuardMixin, ResumeStateMixin):
    """What training on rollouts adds: where the memory went, and what the rows of a skipped step were."""

    prompts: list[Prompt]
    batch: RolloutBatch

    def _evaluation_advice(self) -> str:
        return "Lower --probe_rows or --max_completion_length."

    def _rollout_advice(self) -> str:
        args = self.args
        return (
            "A process samples per_device_train_batch_size × steps_per_generation "
            f"({args.per_device_train_batch_size} × {args.steps_per_generation}) completions of up to "
            f"max_completion_length ({args.max_completion_length}) "
            "tokens at a time: lower one of them, e.g. --steps_per_generation 1 with the --gradient_accumulation_steps "
            f"of now ({args.gradient_accumulation_steps}), which leaves the batch as it is. --num_generations "
            f"({args.num_generations}) must divide the completions that all processes sample at a time: lower it, too."
        )

    def resume_state(self):
        return super().resume_state() | {"skipped_since_logged": self._skipped_since_logged}

    def restore_resume_state(self, state):
        super().restore_resume_state(state)
        self._skipped_since_logged = state["skipped_since_logged"]

    def describe_rows(self, inputs):
        return trained_records(inputs, self.prompts, self.batch.scored, self.processing_class)


def keep_batch(
    folder: Path,
    step: int,
    rank: int,
    batches: Sequence[tuple[Mapping[str, Any], torch.Tensor]],
    describe: Any,
) -> None:
    """Write this rank's micro-batches: rank-R.jsonl to read, one line per row, and rank-R.safetensors, every tensor.

    Args:
        batches: (inputs, loss) of each micro-batch of an optimizer step; tensors are named `MICRO_BATCH.INPUT`.
        describe: inputs -> a record a row.
    """
    records, tensors = [], {}
    for number, (inputs, loss) in enumerate(batches):
        common = {"step": step, "rank": rank, "micro_batch": number, "loss": loss.item()}
        records += [common | record for record in describe(inputs)] or [common]
        for name, x in inputs.items():
            if torch.is_tensor(x):
                tensors[f"{number}.{name}"] = x.detach().cpu().clone().contiguous()
    (folder / f"rank-{rank}.jsonl").unlink(missing_ok=True)
    append_jsonl(folder / f"rank-{rank}.jsonl", records)
    save_file(tensors, folder / f"rank-{rank}.safetensors")
