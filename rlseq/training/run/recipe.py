"""What every training recipe does around its trainer: open the run directory, say what runs, and finish."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainingArguments, get_scheduler

from rlseq.common.escapes import visible
from rlseq.config.groups.adapters import ignored_adapter_settings
from rlseq.config.parsing.config_file import changed_values
from rlseq.config.parsing.parser import write_config
from rlseq.config.training import (
    DataArguments,
    ModelArguments,
    NewModelArguments,
    RewardArguments,
    RunArguments,
    TrainingDataArguments,
)
from rlseq.config.validation.checks import check_group_rewards, check_prompts, check_router, describe_left_out
from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.data.curriculum import rows_in_range
from rlseq.data.lengths import within_length
from rlseq.data.prompts import build_prompts, describe_shared, keeping_all, made_prompts
from rlseq.data.rows import load_rows
from rlseq.doctor.check import FAILED, WARNING
from rlseq.doctor.prompts import check_context
from rlseq.doctor.static import load_configs, static_checks
from rlseq.engine.model.load import is_adapter
from rlseq.engine.thoughts import check_ends
from rlseq.errors import ConfigError, ModelError
from rlseq.scoring import RewardSuite, load_rewards
from rlseq.scoring.check.smoke_test import smoke_test_rewards
from rlseq.training.environment import check_measured, load_environment
from rlseq.training.models import check_attention, check_model_path, load_tokenizer
from rlseq.training.plan.memory import weightless_model
from rlseq.training.run.callbacks import GracefulStop
from rlseq.training.run.checkpoints import read_state
from rlseq.training.run.compatibility import check_compatible, check_compatible_new_model
from rlseq.training.run.directory import RunDirectory, prepare
from rlseq.training.run.faults import writing
from rlseq.training.run.inputs import check_unchanged, run_inputs
from rlseq.training.run.inputs import write as write_inputs
from rlseq.training.run.launch import cpu_threads
from rlseq.training.run.rewards import optimised_rewards
from rlseq.training.tools import check_tools, load_tools
from rlseq.types import Prompt

SELECTS_MODEL_OR_DATA = ("--config", "--model_name_or_path", "--dataset_name", "--new_model")


def default_config(path: Path) -> Path | None:
    """Return the demonstration's YAML when the command line names no config, model or data of its own."""
    named = any(
        arg.split("=")[0].replace("-", "_").lstrip("_") in {s.lstrip("-") for s in SELECTS_MODEL_OR_DATA}
        for arg in sys.argv[1:]
        if arg.startswith("--")
    )
    return None if named else path


@dataclass(frozen=True)
class Task:
    """What a run on rollouts learns: prompts, what scores them, and rows to evaluate on.

    Attributes:
        tokenizer: the model's.
        prompts: what is trained on.
        eval_rows: rows of the evaluation split; empty where nothing is evaluated.
        eval_note: a sentence on those of them that are left out, or "".
        shared: how many prompts of the evaluation split are trained on too, in words; empty where nothing is evaluated.
        suite: the optimised rewards.
        eval_suite: rewards that are only measured, or None.
    """

    tokenizer: Any
    prompts: list[Prompt]
    eval_rows: list[Mapping[str, Any]]
    eval_note: str
    shared: str
    suite: RewardSuite
    eval_suite: RewardSuite | None

    def describe(self) -> str:
        """How many prompts are trained on, and how many of those evaluated on are among them."""
        return f"{len(self.prompts):,} prompts{f' ({self.shared})' * bool(self.shared)}"

    def close(self) -> None:
        """End the rewards' worker processes."""
        for suite in filter(None, (self.suite, self.eval_suite)):
            suite.close()


@keeping_all()
def load_task(
    data: TrainingDataArguments, rewards: RewardArguments, model_args: ModelArguments, config: Any, *, evaluates: bool
) -> Task:
    """Find everything that can be wrong with model path, rewards and data, before anything expensive starts.

    Raises:
        RlseqError: it says what was given, what was expected and what to do.
    """
    check_model_path(model_args.model_name_or_path)
    check_attention(model_args)
    if not data.dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    suite = optimised_rewards(rewards, config)
    measured = rewards.eval_reward_funcs
    eval_suite = load_rewards(measured, think_end=config.think_end) if measured else None
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    check_ends(config.stop_strings, config.think_end, tokenizer)
    rows = load_rows(data.dataset_name, data.train_split, **data.row_options(), weighted=True)[: data.train_rows]
    if (chosen := data.curriculum_range()) is not None:
        rows, dropped = rows_in_range(rows, data.curriculum_column, *chosen)
        say(f"rlseq: {dropped}")
    rows, _ = fitting_rows(rows, data.train_split, data, config, tokenizer)
    prompts = build_prompts(rows, tokenizer, **prompt_options(data, config))
    check_group_rewards(config, suite)
    check_prompts(config, prompts)
    check_tools(config, prompts)
    load_tools(config.tools or [])
    load_environment(config, prompts, suite)
    check_fit(config, model_args, tokenizer, prompts)
    batch = config.generation_batch_size // config.num_generations
    if left_out := describe_left_out(len(prompts), batch, "prompts", shuffled=config.shuffle_dataset):
        say(f"rlseq: {left_out}")
    eval_rows, eval_note, shared = [], "", ""
    if evaluates:
        check_measured(config, suite, eval_suite)
        eval_rows = load_rows(data.dataset_name, data.eval_split, **data.row_options())[: data.eval_rows]
        eval_rows, eval_note = fitting_rows(eval_rows, data.eval_split, data, config, tokenizer)
        held_out = made_prompts(eval_rows, data.prompt_column, data.prompt_template)
        own = (p.prompt[1:] if data.system_prompt else p.prompt for p in prompts)  # without the system prompt
        shared = describe_shared(held_out, data.eval_split, own, data.train_split)
    for each in filter(None, (suite, eval_suite)):
        smoke_test_rewards(each, prompts)
    gc.freeze()  # prompts stay as long as the run: no later collection need go through them
    return Task(tokenizer, prompts, list(eval_rows), eval_note, shared, suite, eval_suite)


def fitting_rows(
    rows: Sequence[Mapping[str, Any]], split: str, data: DataArguments, config: Any, tokenizer: Any
) -> tuple[list[Mapping[str, Any]], str]:
    """Rows without those whose prompts are too long, and a sentence on the latter, which is printed, or "".

    Raises:
        DataError: a prompt is too long and is not to be left out.
    """
    options = prompt_options(data, config)
    kept, left_out = within_length(rows, [tokenizer], split, **data.length_options(), prompt_options=options)
    if left_out:
        say(f"rlseq: {left_out}")
    return kept, left_out


def task_inputs(task: Task, data: DataArguments, config: Any) -> dict[str, Any]:
    """What a run on rollouts begins with beside its settings."""
    return run_inputs(
        {"reward": task.suite, "eval reward": task.eval_suite},
        {
            "training rows": [(p.prompt, p.prompt_ids, p.columns) for p in task.prompts],
            "evaluation rows": task.eval_rows,
        },
        config.named_functions,
        data.rendering(),
    )


def prompt_options(data: DataArguments, config: Any) -> dict[str, Any]:
    """How rows become prompts, in training and in the evaluation of its result."""
    given = config.chat_template_kwargs
    return data.prompt_options() | ({"chat_template_kwargs": given} if given else {})


def check_fit(
    config: Any,
    model_args: ModelArguments,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    sample_tokens: int | None = None,
    new: Any = None,
) -> None:
    """Make the doctor's checks that run no model; warnings are printed.

    Args:
        config: of a run on rollouts, or of teacher forcing: its completions are the references, its dropout acts as
            the model declares it, and no generation configuration matters.
        sample_tokens: the most tokens of a completion that teacher forcing samples for itself.
        new: the configuration of a model that is built with random weights, instead of the one that model_args name.

    Raises:
        ModelError: a check failed; the message says what to do.
        ConfigError: the model has a router loss that the run would leave out, or the adapter does not fit it.
    """
    if ignored := ignored_adapter_settings(model_args):
        say(f"rlseq: warning: {ignored}")
    model_config, generation_config = new, None
    if new is None:
        model_config, generation_config = load_configs(model_args.model_name_or_path, model_args.model_revision)
    options: dict[str, Any] = {"needs_references": True}
    if hasattr(config, "max_completion_length"):
        check_router(config, model_config)
        options = {
            "max_completion_length": config.max_completion_length,
            "disable_dropout": config.disable_dropout,
            "own_sampler": not config.sampled_by_trl,
            "needs_references": config.uses_references,
        }
    results = static_checks(model_config, tokenizer, prompts, generation_config=generation_config, **options)
    if sample_tokens is not None:
        results.append(check_context(model_config, prompts, sample_tokens, setting="max_new_tokens"))
    lines = {status: [r.sentence for r in results if r.status == status] for status in (FAILED, WARNING)}
    if lines[FAILED]:
        raise ModelError("model and data do not fit (`rlseq doctor` looks further).\n  " + "\n  ".join(lines[FAILED]))
    there = is_adapter(model_args.model_name_or_path)
    if (model_args.use_peft or there) and new is None:
        adapted = weightless_model(model_args)  # says where the adapter does not fit
        if hasattr(config, "max_completion_length") and isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                "the adapter is on the output layer too (lm_head), which training on rollouts reads without it: "
                + ("merge it into its base and start from that" if there else "leave that out of --lora_target_modules")
            )
    for line in lines[WARNING]:
        say(f"rlseq: warning: {line}")


def open_run(
    config: TrainingArguments,
    run: RunArguments,
    *others: Any,
    inputs: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> RunDirectory:
    """Claim the run directory and write config.yaml; every rank returns the same paths, only the first writes.

    Args:
        inputs: what the run starts with beside its settings, as `run_inputs` describes it.
        steps: of the optimizer, in all, where that is known; only what is said of the schedule depends on it.

    Raises:
        RunDirectoryError: the directory holds a run and neither continuing nor replacing it was asked for; or it began
            with other rewards or rows.
        ModelError: the checkpoint to resume from is of another model.
    """
    state = PartialState()
    asked = {"resume": config.resume_from_checkpoint, "overwrite": run.overwrite_output_dir}
    checkpoint = prepare(config.output_dir, **asked, main_process=False).resume_from  # claims nothing yet
    if checkpoint is not None:
        check_checkpoint(checkpoint, others)
        changed = inputs and check_unchanged(checkpoint.parent, inputs, accepted=run.resume_with_changes)
        if changed:
            say(f"rlseq: warning: {changed}")
    state.wait_for_everyone()  # the first process may rename checkpoints: while it does, the others do not look
    with state.main_process_first(), writing(config.output_dir):
        directory = prepare(config.output_dir, **asked, main_process=state.is_main_process)
        if state.is_main_process:
            if directory.resume_from is not None:
                _warn_of_changes(directory, steps, config, run, *others)
            write_config(directory.config, config, run, *others)
            if inputs:
                write_inputs(directory.path, inputs)
    return directory


OF_THE_SCHEDULE = {"max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"}
OF_THE_START = {"resume_from_checkpoint", "overwrite_output_dir", "output_dir"}  # of a start and not of the run


def _warn_of_changes(directory: RunDirectory, steps: int | None, *configs: Any) -> None:
    """Warn of settings that a resumed run changes: config.yaml will hold only the new ones."""
    try:
        values = changed_values(directory.config, *configs)
    except ConfigError:  # config.yaml is gone or was edited: nothing to compare with
        return
    changed = [f"{name} {had} -> {has}" for name, (had, has) in values.items() if name not in OF_THE_START]
    if changed:
        say(
            f"rlseq: warning: the run resumes with other settings than it had: {'; '.join(changed)}. config.yaml holds "
            "the new ones alone. The optimizer keeps the checkpoint's state: a new learning_rate or weight_decay "
            f"has no effect.{_schedule_change(directory.resume_from, configs[0], values, steps)}"
        )


def _schedule_change(
    checkpoint: Path, config: TrainingArguments, values: Mapping[str, tuple[Any, Any]], steps: int | None
) -> str:
    """What becomes of the learning rate where its schedule, which no checkpoint holds, is another than before."""
    state = read_state(checkpoint)
    step, had_steps = state["global_step"], state["max_steps"]
    steps = config.max_steps if config.max_steps > 0 else steps
    if not OF_THE_SCHEDULE & values.keys() and steps in (None, had_steps):
        return ""
    says = " The schedule is that of the new settings, so the learning rate jumps"
    had = {name: had for name, (had, _) in values.items()}
    shares = [_rate_share(config, step, had_steps, had), _rate_share(config, step, steps, {})]
    if None in shares:
        return f"{says} to where step {step} of that is."
    return f"{says} at step {step} from {shares[0]:.4g} to {shares[1]:.4g} of learning_rate."


def _rate_share(config: TrainingArguments, step: int, steps: int | None, other: Mapping[str, Any]) -> float | None:
    """The multiplier of the learning rate at a step, under changed settings; None where it is unknown."""
    given = {name: other.get(name, getattr(config, name)) for name in OF_THE_SCHEDULE}
    if steps is None:
        return None
    warmup = given["warmup_steps"] or 0
    warmup = math.ceil(steps * warmup) if warmup < 1 else int(warmup)  # transformers takes a share too
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options = {"num_warmup_steps": warmup, "num_training_steps": steps}
    kind = str(getattr(given["lr_scheduler_type"], "value", given["lr_scheduler_type"]))
    schedule = get_scheduler(kind, optimizer, **options, scheduler_specific_kwargs=given["lr_scheduler_kwargs"])
    return schedule.lr_lambdas[0](step) if hasattr(schedule, "lr_lambdas") else None


def check_checkpoint(checkpoint: Path, settings: Sequence[Any]) -> None:
    """Refuse a checkpoint of another model than the settings name, before anything of the run is touched.

    Raises:
        ModelError: it says what differs.
    """
    for given in settings:
        if isinstance(given, ModelArguments) and given.model_name_or_path:
            name, revision = given.model_name_or_path, given.model_revision
            check_compatible(checkpoint, name, revision=revision, use_peft=given.use_peft)
        elif isinstance(given, NewModelArguments) and isinstance(given.new_model, Mapping):
            check_compatible_new_model(checkpoint, given.new_model)


def say(message: str) -> None:
    """Print one line from the first process only."""
    if PartialState().is_main_process:
        print(visible(message), flush=True)


def announce(config: TrainingArguments, run: RunArguments, what: str) -> None:
    """Say which processes, data and directory the run really has, and take the CPU threads it is to have.

    `accelerate launch` gives a process one thread unless told otherwise, which halves the speed on two cores.
    """
    state = PartialState()
    processes = f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device.type}"
    if state.device.type == "cpu":
        threads, source = cpu_threads(run.num_cpu_threads, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)))
        torch.set_num_threads(threads)
        processes += f", {threads} thread{'s' if threads > 1 else ''} each ({source})"
    say(f"rlseq: {processes}, {what}, into {config.output_dir}")


def describe_round(config: Any) -> str:
    """The size of a rollout batch, in words."""
    prompts = config.generation_batch_size // config.num_generations
    if config.objective in EXACT_OBJECTIVES:
        return f"the references of {prompts} prompts per step, no rollouts"
    samples = f"{config.num_generations} sample{'s' if config.num_generations > 1 else ''}"
    return f"{prompts} prompts × {samples} per rollout batch"


def finish(trainer: Trainer, directory: RunDirectory, stop: GracefulStop) -> bool:
    """Save the final model, or say how to resume when the run was stopped early.

    Returns:
        True if training ran to its end.
    """
    if stop.stopped:
        say(
            f"stopped by {stop.stopped} at step {trainer.state.global_step}, saved. Continue with the same command and "
            "--resume_from_checkpoint latest"
        )
        return False
    with writing(trainer.args.output_dir, "Make room, and resume from the last checkpoint, if one was saved."):
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # `publish` pushes it, once evaluated
    trainer.accelerator.wait_for_everyone()  # else another rank may read it for the evaluation while it is written
    args, state = trainer.args, trainer.state
    best = f"{args.metric_for_best_model} {state.best_metric:.4g}" if state.best_metric is not None else ""
    saved = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
    unsaved = ""
    if best and saved != f"checkpoint-{state.best_global_step}":
        unsaved = f"; the best on validation was not saved ({best}): evaluate where you save"
    if args.load_best_model_at_end and saved:
        say(f"result: the best on validation{' of what was saved' * bool(unsaved)}, {saved}{unsaved or f' ({best})'}")
    elif getattr(args, "ema_decay", 0):
        say(f"result: the average of the weights up to the last step, {state.global_step}")
    else:
        kept = unsaved or (f"; the best on validation is {saved} ({best})" if best else "")
        say(f"result: the last step, {state.global_step}{kept}")
    return True
