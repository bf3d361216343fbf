"""`--max_memory_gb`: smaller micro-batches, more of them a step, so that an update needs no more than is allowed.

The completions that are sampled together and the optimizer step stay as they are: only what is held between forward
and backward is less. The memory is reckoned, not measured (`rlseq.training.plan.memory`).
"""

from __future__ import annotations

import copy
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from rlseq.common.disk import readable_size
from rlseq.config.training import ModelArguments, RolloutRunArguments
from rlseq.errors import ConfigError
from rlseq.training.plan.dry_run import Plan, plan_rollouts, reckon_memory, size_of_run
from rlseq.training.plan.memory import PEAK, ModelSize
from rlseq.training.run.recipe import Task

PART_MEANS = ("bnpo",)  # losses that are a mean over the tokens of each micro-batch


def split_micro_batches(config: Any, run: RolloutRunArguments, model_args: ModelArguments, task: Task) -> str:
    """Split the micro-batches of a run on rollouts into as many as `--max_memory_gb` takes; whole groups, if possible.

    Changes `per_device_train_batch_size`, `gradient_accumulation_steps` and `steps_per_generation` of the settings.

    Returns:
        What was changed, in words; empty if nothing was, or no limit is given.

    Raises:
        ConfigError: the limit is below what the smallest micro-batch needs, or the loss depends on micro-batches.
    """
    if run.max_memory_gb is None:
        return ""
    size = size_of_run(config, model_args)
    rows = config.per_device_train_batch_size
    for parts in _numbers_of_parts(rows, config.num_generations):
        trial = _split(config, parts)
        peak = _peak(trial, model_args, size, plan_rollouts(trial, task.prompts, PartialState().num_processes))
        if peak <= run.max_memory_gb * 1e9:
            break
    else:
        raise ConfigError(
            f"--max_memory_gb is {run.max_memory_gb:g}, and with one completion a micro-batch a process needs "
            f"{readable_size(peak)} (--dry_run says for what). Give at least that, or sample fewer or shorter "
            "completions together."
        )
    if parts == 1:
        return ""
    if config.loss_type in PART_MEANS and config.objective == "policy_gradient":
        raise ConfigError(
            f"--max_memory_gb {run.max_memory_gb:g} splits a micro-batch of {rows} completions into {parts}, which "
            f"changes a loss of type {config.loss_type}: it is a mean over the tokens of each. Take another "
            "--loss_type (dapo is a mean over those of the whole step), or give more memory."
        )
    vars(config).update(vars(trial))
    return (
        f"micro-batches of {trial.per_device_train_batch_size} instead of {rows} completions, "
        f"{trial.gradient_accumulation_steps} a step, for at most {run.max_memory_gb:g} GB"
    )


def _numbers_of_parts(rows: int, group: int) -> list[int]:
    """Into how many equal parts a micro-batch can be split: first those of whole groups, then smaller ones."""
    divisors = [parts for parts in range(1, rows + 1) if rows % parts == 0]
    whole = [parts for parts in divisors if (rows // parts) % group == 0]
    return whole + [parts for parts in divisors if not whole or parts > whole[-1]]


def _split(config: Any, parts: int) -> Any:
    trial = copy.copy(config)
    trial.per_device_train_batch_size //= parts
    trial.gradient_accumulation_steps *= parts
    trial.steps_per_generation *= parts
    return trial


def _peak(config: Any, model_args: ModelArguments, size: ModelSize, plan: Plan) -> int:
    peak = reckon_memory(config, model_args, size, plan, plan.generations_a_process * plan.longest)[PEAK][0]
    return max(gather_object([peak]))  # processes hold different amounts already, and must split alike
