"""For any Trainer: what it resumes from it loads whole, and a run that is finished it does not train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.engine.model.load import load_into
from rlseq.training.run.checkpoints import check_format, newest_whole_checkpoint
from rlseq.training.trl.sharded_weights import check_sharded


class ResumeMixin(Trainer):
    """Loads checkpoints whole or refuses them, to resume and as the best of a run.

    transformers leaves what a checkpoint lacks as it was, and with it all that was saved under other names than the
    parameters' (fused experts). Resumed at the last step, it would train one step more; and by another schedule, make
    its first step at the rate of the checkpoint.
    """

    resumed_from: Path | None = None  # the checkpoint that training went on from

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any):
        """Train, from the start or from where a checkpoint was written; True: the newest whole one of the run."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint, _ = newest_whole_checkpoint(Path(self.args.output_dir))
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.resumed_from is None:
            return super().train(**kwargs)
        check_format(self.resumed_from)
        self._check_sharded(self.model, self.resumed_from)
        return super().train(resume_from_checkpoint=str(self.resumed_from), **kwargs)

    def save_beside(self, checkpoint: Path) -> None:
        """Write what transformers leaves out of a checkpoint, on every process, before the rest is written."""

    def _check_sharded(self, model: Any, checkpoint: str | Path) -> None:
        """Where FSDP or DeepSpeed load it: the first process looks, and all of them hear of it."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            with raise_on_all_ranks():
                if self.accelerator.is_main_process:
                    check_sharded(model, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel | PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_into(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        model, best = self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._check_sharded(model, best)
        if sharded or not isinstance(model, PreTrainedModel | PeftModel) or not best.is_dir():
            super()._load_best_model()
        else:
            load_into(model, best)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Likewise where a callback says at the beginning that training is to stop.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        take_scheduled_rate(self.lr_scheduler)
        super()._run_epoch(**kwargs)


def take_scheduled_rate(scheduler: Any) -> None:
    """Give the optimizer the learning rate of the schedule at its step, where that is a function of the step alone."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds one
    if isinstance(scheduler, LambdaLR):
        groups = scheduler.optimizer.param_groups
        for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            rate = base * share(scheduler.last_epoch)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = [float(group["lr"]) for group in groups]  # what is logged
