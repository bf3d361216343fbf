"""What a checkpoint of a run on rollouts must also hold, so that the resumed run is the uninterrupted one, bit for bit.

TRL 1.16 saves weights, optimizer, scheduler and random states. It leaves out its count of micro-batches, the rollouts
that are still to be trained on, the metrics and losses not yet logged, the order of any epoch but the first, and a
reference model that has moved (`sync_ref_model`).
Each rank writes its own to `checkpoint-N/resume_state/`, before the trainer's state, which marks a checkpoint as whole.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from rlseq.errors import ConfigError
from rlseq.training.rollouts import MicroBatch
from rlseq.training.run.checkpoints import RESUME_STATE, write_format

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"


class Stateful(Protocol):
    """What holds a part of a run's state, as torch's optimizers and schedulers do."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state; other parts' entries are ignored."""


class ResumeState:
    """Saves and restores what TRL's trainer forgets.

    Args:
        trainer: on rollouts.
        parts: further objects whose state each rank saves and restores.

    Attributes:
        parts: they may be added to until training begins.
        shared: likewise, of objects whose state is equal on all ranks; another number of processes resumes it too.

    Raises:
        ConfigError: the reference moves, and is sharded.
    """

    def __init__(self, trainer: Any, parts: Sequence[Stateful]):
        if trainer.args.sync_ref_model and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ConfigError(
                "sync_ref_model moves the reference, which a checkpoint must then hold whole; leave it out under FSDP "
                "or DeepSpeed"
            )
        self.trainer = trainer
        self.parts = [_TrainingLoop(trainer), *parts]
        self.shared: list[Stateful] = []
        self.first_step = 0  # that the summed loss of the run counts from

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint, on every process, before the rest is written."""
        args, trainer = self.trainer.args, self.trainer
        if args.save_only_model:
            return
        folder = checkpoint / RESUME_STATE
        folder.mkdir(parents=True, exist_ok=True)
        if args.should_save:
            write_format(checkpoint)
        shared = {name: value for part in self.shared for name, value in part.state_dict().items()}
        state = {"world_size": trainer.accelerator.num_processes, "shared": shared}
        for part in self.parts:
            state |= part.state_dict()
        torch.save(state, folder / f"rank-{trainer.accelerator.process_index}.pt")
        if args.sync_ref_model and args.should_save:
            reference = {name: p.detach().contiguous().cpu() for name, p in trainer.ref_model.named_parameters()}
            save_file(reference, folder / REFERENCE_FILE)
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "save_into") and args.should_save:
                callback.save_into(checkpoint)

    # -- resuming ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def taken_up(self, checkpoint: Path | None) -> Iterator[None]:
        """Let the training within begin at the state of a checkpoint; None: at the state of a new run."""
        restore = _Restore(self, checkpoint)
        self.trainer.add_callback(restore)  # the last one, so that what other callbacks begin with is there
        try:
            yield
        finally:
            self.trainer.remove_callback(restore)

    def load(self, checkpoint: Path | None) -> None:
        """Count from the step that training is at, and take up the state of the checkpoint, where there is one."""
        trainer = self.trainer
        trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        self.first_step = trainer.state.global_step
        if checkpoint is None:
            return
        self._load_reference(checkpoint)
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "load_from"):
                callback.load_from(checkpoint)
        file = checkpoint / RESUME_STATE / f"rank-{trainer.accelerator.process_index}.pt"
        if not file.is_file():
            logger.warning("%s is missing: the run resumes, but not bit for bit", file)
            return
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for part in self.shared:
            part.load_state_dict(saved["shared"])
        if saved["world_size"] != trainer.accelerator.num_processes:
            logger.warning(
                "the checkpoint is of %d processes, the run has %d: rollouts not yet trained on are sampled again",
                saved["world_size"],
                trainer.accelerator.num_processes,
            )
            return
        for part in self.parts:
            part.load_state_dict(saved)
        self.first_step = 0

    @torch.no_grad()
    def _load_reference(self, checkpoint: Path) -> None:
        """Take up the reference model as it was when the checkpoint was written, where it moves."""
        file = checkpoint / RESUME_STATE / REFERENCE_FILE
        if not self.trainer.args.sync_ref_model:
            return
        if not file.is_file():
            logger.warning("%s is missing: the reference is the start again", file)
            return
        saved = load_file(file)
        for name, p in self.trainer.ref_model.named_parameters():
            p.copy_(saved[name])

    def with_mean_loss(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What is logged, with the mean loss of the whole run: transformers divides by the steps since it resumed."""
        if "train_loss" not in logs:
            return logs
        steps = self.trainer.state.global_step - self.first_step
        return logs | {"train_loss": self.trainer._total_loss_scalar / max(steps, 1)}


class _TrainingLoop:
    """The part of the state that TRL's and transformers' training loop has."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "step": trainer._step,
            "micro_batches": None if trainer.starts_batch else [part.as_dict() for part in trainer._buffered_inputs],
            "metrics": dict(trainer._metrics["train"]),
            "loss_since_logged": trainer._tr_loss,
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer, device = self.trainer, self.trainer.accelerator.device
        trainer._step = state["step"]
        if state["micro_batches"] is not None:
            trainer._buffered_inputs = [MicroBatch(**part).to(device) for part in state["micro_batches"]]
        trainer._metrics["train"] = defaultdict(list, state["metrics"])
        trainer._tr_loss = state["loss_since_logged"].to(device)
        trainer._total_loss_scalar = state["total_loss"]
        trainer._globalstep_last_logged = state["last_logged"]


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

    def __init__(self, state: ResumeState, checkpoint: Path | None):
        self.state = state
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state.load(self.checkpoint)
