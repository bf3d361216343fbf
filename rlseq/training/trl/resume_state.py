"""What a checkpoint of a run on rollouts must also hold, so that the resumed run is the uninterrupted one, bit for bit.

TRL 1.16 saves weights, optimizer, scheduler and random states. It leaves out its count of micro-batches, the rollouts
that are still to be trained on, the metrics and losses not yet logged, the order of any epoch but the first, and a
reference model that has moved (`sync_ref_model`).
Each rank writes its own to `checkpoint-N/resume_state/`, before the trainer's state, which marks a checkpoint as whole.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import trl
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from rlseq.errors import ConfigError
from rlseq.training.run.checkpoints import RESUME_STATE, write_format
from rlseq.training.trl.resume import ResumeMixin

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"


class ResumeStateMixin(ResumeMixin, trl.GRPOTrainer):
    """Saves and restores what TRL's trainer forgets; a subclass extends `resume_state` and `restore_resume_state`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.sync_ref_model and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(
                "sync_ref_model moves the reference, which a checkpoint must then hold whole; leave it out under FSDP "
                "or DeepSpeed"
            )
        self.add_callback(_Restore(self))

    def resume_state(self) -> dict[str, Any]:
        """This rank's state as tensors and plain values."""
        in_a_round = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return {
            "world_size": self.accelerator.num_processes,
            "shared": self.shared_state(),
            "step": self._step,
            "reference_rewards": self.batch.reference_rewards if in_a_round else {},
            "buffered_inputs": self._buffered_inputs if in_a_round else None,
            "metrics": dict(self._metrics["train"]),
            "loss_since_logged": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def shared_state(self) -> dict[str, Any]:
        """The part that is equal on all ranks, which another number of processes resumes too."""
        return {}

    def restore_shared_state(self, state: dict[str, Any]) -> None:
        """Take up what `shared_state` returned."""

    def restore_resume_state(self, state: dict[str, Any]) -> None:
        """Take up where `resume_state` was called."""
        device = self.accelerator.device
        self._step = state["step"]
        self.batch.reference_rewards = state["reference_rewards"]
        if state["buffered_inputs"] is not None:
            self._buffered_inputs = [
                {name: x.to(device) if torch.is_tensor(x) else x for name, x in part.items()}
                for part in state["buffered_inputs"]
            ]
        self._metrics["train"] = defaultdict(list, state["metrics"])
        self._tr_loss = state["loss_since_logged"].to(device)
        self._total_loss_scalar = state["total_loss"]
        self._total_loss_since = 0
        self._globalstep_last_logged = state["last_logged"]

    @torch.no_grad()
    def restore_reference(self, checkpoint: Path) -> None:
        """Take up the reference model as it was when the checkpoint was written, where it moves."""
        file = checkpoint / RESUME_STATE / REFERENCE_FILE
        if not self.args.sync_ref_model:
            return
        if not file.is_file():
            logger.warning("%s is missing: the reference is the start again", file)
            return
        saved = load_file(file)
        for name, p in self.ref_model.named_parameters():
            p.copy_(saved[name])

    def begin_or_resume(self) -> None:
        """Count from the step that training is at, and take up the state of the checkpoint, where there is one."""
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._total_loss_since = self.state.global_step
        if self.resumed_from is None:
            return
        self.restore_reference(self.resumed_from)
        file = self.resumed_from / RESUME_STATE / f"rank-{self.accelerator.process_index}.pt"
        if not file.is_file():
            logger.warning("%s is missing: the run resumes, but not bit for bit", file)
            return
        saved = torch.load(file, map_location="cpu", weights_only=True)
        self.restore_shared_state(saved["shared"])
        if saved["world_size"] != self.accelerator.num_processes:
            logger.warning(
                "the checkpoint is of %d processes, the run has %d: rollouts not yet trained on are sampled again",
                saved["world_size"],
                self.accelerator.num_processes,
            )
            return
        self.restore_resume_state(saved)

    def log(self, logs, start_time=None):
        if "train_loss" in logs:  # transformers divides the loss of the whole run by the steps since it was resumed
            steps = self.state.global_step - self._total_loss_since
            logs = logs | {"train_loss": self._total_loss_scalar / max(steps, 1)}
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs: Any) -> None:
        begin_epoch(sampler_of(kwargs["train_dataloader"]), kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def save_beside(self, checkpoint: Path) -> None:
        super().save_beside(checkpoint)
        if self.args.save_only_model:
            return
        folder = checkpoint / RESUME_STATE
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            write_format(checkpoint)
        torch.save(self.resume_state(), folder / f"rank-{self.accelerator.process_index}.pt")
        if self.args.sync_ref_model and self.args.should_save:
            reference = {name: p.detach().contiguous().cpu() for name, p in self.ref_model.named_parameters()}
            save_file(reference, folder / REFERENCE_FILE)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "save_into") and self.args.should_save:
                callback.save_into(checkpoint)


def begin_epoch(sampler: RepeatSampler, epoch: int) -> None:
    """Make the order of an epoch a function of (seed, epoch) alone, so that any epoch can be resumed."""
    if sampler.shuffle:
        sampler.generator.manual_seed((sampler.seed or 0) + 1_000_003 * epoch)  # the first is TRL's


def sampler_of(loader: Any) -> RepeatSampler:
    """TRL's sampler of prompts inside a data loader, whatever accelerate has wrapped around it."""
    inner = loader.batch_sampler
    while not isinstance(inner, RepeatSampler):
        inner = getattr(inner, "batch_sampler", None) or inner.sampler
    return inner


class _Restore(TrainerCallback):
    """Restores the state once the trainer has set its own to that of a new run."""

    def __init__(self, trainer: ResumeStateMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_or_resume()
