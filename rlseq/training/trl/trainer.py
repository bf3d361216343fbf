"""What rlseq's trainers on rollouts and on references share: which methods of transformers and TRL they override.

Each method is a few lines around the one it overrides; what is done stands in the objects and functions that it calls:

    guard           a step whose loss or gradient is not finite changes nothing       guard.py
    resume_state    what a checkpoint of a run on rollouts also holds                 resume_state.py
    publisher       the model card, and what is pushed to the hub                     publish.py
    checkpoints     complete or absent; loaded whole or refused                       resume.py, run/checkpoints.py
    faults          what fails for want of memory or disk says so, on all processes   run/faults.py
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.engine.model.load import load_into
from rlseq.training.run.checkpoints import through_to_disk
from rlseq.training.run.faults import evaluation_advice, memory_for, saving, update_advice
from rlseq.training.trl.checkpoint.publish import Publisher
from rlseq.training.trl.checkpoint.resume import (
    check_sharded_weights,
    is_loaded_here,
    resumable_checkpoint,
    take_scheduled_rate,
)
from rlseq.training.trl.checkpoint.resume_state import ResumeState, begin_epoch, sampler_of
from rlseq.training.trl.guard import Guard


class RunMixin(Trainer):
    """For TRL's trainers: steps that are not finite are skipped, checkpoints are whole, faults say what to do.

    Attributes:
        guard: skips steps.
        publisher: writes the card, and pushes.
        resume_state: of trainers on rollouts, which TRL does not resume exactly; None: transformers' checkpoint is all.
    """

    resume_state: ResumeState | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guard = Guard(
            Path(self.args.output_dir),
            max_in_a_row=self.args.max_skipped_steps,
            accelerator=self.accelerator,
            describe=self.describe_rows,
        )
        self.publisher = Publisher(self)
        self.add_callback(self.publisher.card_of_checkpoint())

    # `raise_on_all_ranks`: a script calls these by itself, too, and a process that fails leaves no other waiting.

    @raise_on_all_ranks(exchange=False)
    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any):
        """Train, from the start or from where a checkpoint was written; True: the newest whole one of the run."""
        with memory_for("the update", update_advice, self.args):
            checkpoint = resumable_checkpoint(resume_from_checkpoint, Path(self.args.output_dir))
            if checkpoint is not None:
                check_sharded_weights(self, self.model, checkpoint)
                kwargs["resume_from_checkpoint"] = str(checkpoint)
            with nullcontext() if self.resume_state is None else self.resume_state.taken_up(checkpoint):
                return super().train(**kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.resume_state is not None:
            begin_epoch(sampler_of(kwargs["train_dataloader"]), kwargs["epoch"])
        # A run that is finished already would train one step more; likewise where a callback asked to stop.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        take_scheduled_rate(self.lr_scheduler)
        super()._run_epoch(**kwargs)

    # -- a step --------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = copy.copy(inputs)  # SFT's loss takes what it needs out of `inputs`
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return found
        loss = self.guard.keep(given, found[0] if return_outputs else found)
        return (loss, *found[1:]) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)  # the last call before the optimizer steps
        self.guard.before_step(model, grad_norm, step=self.state.global_step + 1)
        return grad_norm

    def describe_rows(self, inputs: Any) -> list[dict[str, Any]]:
        """A micro-batch's rows for the reader of a skipped step; trainers on rollouts say more."""
        ids = inputs.get("input_ids")
        return [] if ids is None else [{"text": self.processing_class.decode(row)} for row in ids.tolist()]

    def log(self, logs, start_time=None):
        if self.model.training:
            logs = self.guard.with_skipped(logs)
        if self.resume_state is not None:
            logs = self.resume_state.with_mean_loss(logs)
        super().log(logs, start_time)

    @raise_on_all_ranks(exchange=False)
    def evaluate(self, *args, **kwargs):
        with memory_for("evaluation", evaluation_advice, self.args):
            return super().evaluate(*args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @raise_on_all_ranks(exchange=False)
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        wait, saves = self.accelerator.wait_for_everyone, self.args.should_save
        whole = saving(checkpoint, main_process=saves, wait=wait)
        # The trainer's state marks the checkpoint as whole: the process that writes it waits for every rank's part.
        with whole, through_to_disk(self.state, checkpoint, wait=wait):
            if self.resume_state is not None:
                self.resume_state.save(checkpoint)
            super()._save_checkpoint(model, trial)
            if not saves:
                wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_loaded_here(self.model, sharded=self.is_fsdp_enabled):
            load_into(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        model, best = self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint)
        check_sharded_weights(self, model, best)
        if best.is_dir() and is_loaded_here(model, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_into(model, best)
        else:
            super()._load_best_model()

    # -- the hub -------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **_: Any,
    ) -> Any:
        """Push model, tokenizer and card; on every process. Arguments are those of transformers."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return self.publisher.push(
            commit_message,
            blocking=blocking,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=private,
            dataset_name=dataset_name,
            tags=tags,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        with self.publisher.from_hub_folder(Path(checkpoint_folder)):
            super()._push_from_checkpoint(checkpoint_folder)
