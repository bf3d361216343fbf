"""What a run resumes from: a whole checkpoint, all of whose weights are loaded, at the learning rate of its schedule.

transformers leaves what a checkpoint lacks as it was, and with it all that was saved under other names than the
parameters' (fused experts). Resumed by another schedule, it would make its first step at the rate of the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.training.run.checkpoints import check_format, newest_whole_checkpoint
from rlseq.training.trl.checkpoint.sharded_weights import check_sharded


def resumable_checkpoint(asked: str | Path | bool | None, run: Path) -> Path | None:
    """The checkpoint to resume from, in a format that is read; True asks for the newest whole one of the run."""
    if asked is True:
        asked, _ = newest_whole_checkpoint(run)
    if not asked:
        return None
    check_format(Path(asked))
    return Path(asked)


def check_sharded_weights(trainer: Trainer, model: Any, checkpoint: Path) -> None:
    """Where FSDP or DeepSpeed load it: the first process looks, and all of them hear of it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        with raise_on_all_ranks():
            if trainer.accelerator.is_main_process:
                check_sharded(model, checkpoint)


def is_loaded_here(model: Any, *, sharded: bool) -> bool:
    """Whether rlseq loads a checkpoint's weights, which then are all there, and not FSDP, DeepSpeed or transformers."""
    return not sharded and isinstance(model, PreTrainedModel | PeftModel)


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
