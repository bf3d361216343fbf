"""What the recipes that train on rollouts, grpo and ppo, do in the same way before and after their trainer is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from rlseq.common.formats import METRICS
from rlseq.config.groups.adapters import evaluated_quantization, quantization_note, quantization_of
from rlseq.config.training import (
    DataArguments,
    ModelArguments,
    RewardArguments,
    TrainingDataArguments,
    TrainingEvaluationArguments,
)
from rlseq.data.groups import check_groups
from rlseq.data.prompts import build_prompts
from rlseq.evaluation.audit import report as audit_report
from rlseq.evaluation.browser import page as browser
from rlseq.evaluation.costs import describe_costs
from rlseq.evaluation.during import ValidationEvaluator, learning_warnings, measured_together
from rlseq.evaluation.measure.checks import check_models
from rlseq.evaluation.measure.documents import check_windows
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.evaluation.measure.reloading import (
    ROLLOUTS,
    TOLERANCES,
    Reloaded,
    Remembered,
    compare_reloaded,
)
from rlseq.evaluation.report.formats import Shown, p_text
from rlseq.evaluation.report.plots import write_curves
from rlseq.evaluation.report.write import write_plane
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast_and_report, read_jsonl
from rlseq.evaluation.stats.bootstrap import paired_bootstrap
from rlseq.evaluation.stats.estimators import RatioOfSums
from rlseq.evaluation.stats.power import power_of
from rlseq.scoring import RewardSuite
from rlseq.scoring.check.smoke_test import smoke_test_rewards
from rlseq.training.averaging import WeightAverage
from rlseq.training.models import MERGED, merge, named_alone
from rlseq.training.run.best import choose_best_by
from rlseq.training.run.callbacks import GracefulStop, Progress, Warnings
from rlseq.training.run.directory import RunDirectory, write_json_atomic
from rlseq.training.run.recipe import Task, finish, load_task, prompt_options, say
from rlseq.training.teacher import check_teacher
from rlseq.training.trl.arguments import check_init_kwargs
from rlseq.training.trl.checkpoint.publish import publish
from rlseq.training.trl.logging.trackers import log_contrast
from rlseq.training.trl.with_tools import rewards_with_tools
from rlseq.training.update.own_functions import check_own_functions


@dataclass(frozen=True)
class Prepared:
    """A run on rollouts whose settings were all found good; no model is loaded yet.

    Attributes:
        task: what is learnt, and the rows to evaluate on.
        measured: the rewards of the evaluation, optimised or only measured, as one suite.
        settings: of the contrast after training.
        evaluator: the evaluation during training, or None.
    """

    task: Task
    measured: RewardSuite
    settings: ContrastSettings
    evaluator: ValidationEvaluator | None

    def close(self) -> None:
        """End the rewards' worker processes."""
        self.measured.close()
        self.task.close()


def prepare(
    data: TrainingDataArguments,
    rewards: RewardArguments,
    evaluation: TrainingEvaluationArguments,
    config: Any,
    model_args: ModelArguments,
) -> Prepared:
    """Find everything that can be wrong with model path, rewards, data and evaluation.

    Raises:
        RlseqError: it says what was given, what was expected and what to do.
    """
    check_init_kwargs(config)
    check_own_functions(config)
    during = config.eval_strategy != "no"
    task = load_task(data, rewards, model_args, config, evaluates=evaluation.evaluate or during)
    check_teacher(config, task.tokenizer)
    if config.group_column is not None:
        check_groups(task.prompts, config.group_column, "the training rows")
    measured, _ = measured_together(task.suite, task.eval_suite)
    settings = ContrastSettings.of(
        evaluation,
        max_new_tokens=config.max_completion_length,
        stop_strings=config.stop_strings,
        think_end=config.think_end,
        group_column=config.group_column,
        seed=evaluation.eval_seed,
        dtype=evaluation.eval_dtype,
        allow_missing_weights=model_args.allow_missing_weights,
        quantization=evaluated_quantization(evaluation.eval_quantization, evaluation.eval_dtype, model_args),
    )
    if evaluation.evaluate:
        check_settings(settings, measured, task.eval_rows, prompt_options(data, config))
        base = {"base": named_alone(model_args)}
        check_windows(settings, base)
        check_models(base, task.eval_rows, prompt_options(data, config), settings, measured)
    evaluator = None
    if during:
        prompts = build_prompts(
            task.eval_rows[: evaluation.eval_rows_during_training], task.tokenizer, **prompt_options(data, config)
        )
        if not evaluation.evaluate:
            smoke_test_rewards(measured, prompts, all_used=False)
        evaluator = ValidationEvaluator(
            prompts,
            task.tokenizer,
            task.suite,
            task.eval_suite,
            max_new_tokens=config.max_completion_length,
            stop_strings=config.stop_strings,
            think_end=config.think_end,
            group_column=config.group_column,
            seed=evaluation.eval_seed,
        )
        choose_best_by(config, evaluator.metrics, evaluator.best)
    return Prepared(task, measured, settings, evaluator)


def evaluation_costs(prepared: Prepared, data: TrainingDataArguments, config: Any) -> str:
    """What the evaluation after training decodes and scores, of the model before and after."""
    task = prepared.task
    prompts = build_prompts(task.eval_rows, task.tokenizer, **prompt_options(data, config))
    return describe_costs(prepared.settings, prompts, 2)


def train(trainer: Trainer, directory: RunDirectory, evaluator: ValidationEvaluator | None) -> bool:
    """Train to the end or a signal to stop, save the result, plot the curves, and write the page of a short log.

    Returns:
        True if training ran to its end.
    """
    config = trainer.args
    Progress.replace_default(trainer)
    trainer.add_callback(Warnings(partial(learning_warnings, eval_rewards=evaluator.eval_rewards if evaluator else ())))
    trainer.add_callback(stop := GracefulStop())
    if config.ema_decay:
        trainer.add_callback(average := WeightAverage(trainer, config.ema_decay, config.interpolation_weight))
    trainer.train(resume_from_checkpoint=directory.resume_from)
    if config.ema_decay and not stop.stopped:
        average.apply()
    ended = finish(trainer, directory, stop)
    if trainer.is_world_process_zero():
        write_curves(read_jsonl(directory.metrics, METRICS), directory.curves)
        _look_at_rollouts(directory.path)
    return ended


def _look_at_rollouts(run: Path) -> None:
    """Write the page and the audit of a run with few rollouts; those that an earlier, shorter log left are removed."""
    for name in (browser.FILE_NAME, audit_report.FILE_NAME):
        (run / name).unlink(missing_ok=True)
    if browser.rollouts_at_most(run, browser.SMALL):
        browser.write_page([run], run / browser.FILE_NAME)
        audit_report.write_audit(run)


def check_reloaded(trainer: Trainer, directory: RunDirectory, model_args: ModelArguments) -> list[Reloaded]:
    """Load the result, and its merged form, as an evaluation would: is each the model that was trained?

    Compared are the log-probs of up to 20 rollouts of the last batch (of prompts, where the objective samples none),
    and the weights where each process has them whole; with an evaluation during training, its last metrics too. A line
    says so, and `directory.reloaded` what was found.

    Returns:
        What was found of each folder, on the first process; nothing on others.
    """
    batch = trainer.batch
    pairs = [(p, r.completion_ids) for p, r in zip(batch.prompt_ids, batch.rollouts, strict=True)][:ROLLOUTS]
    pairs = pairs or [(p.prompt_ids[:1], p.prompt_ids[1:]) for p in trainer.prompts[:ROLLOUTS]]
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if whole:  # without the autocast of training, which an evaluation does not have
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with trainer.sampler.model_to_generate() as model:  # on all processes
        expected = Remembered.of(model, *zip(*pairs, strict=True))
    if not trainer.is_world_process_zero():
        return []
    run, quantization = Path(trainer.args.output_dir), quantization_of(model_args)
    common: dict[str, Any] = {"allow_missing": model_args.allow_missing_weights}
    in_memory = {
        "trained": trainer.accelerator.unwrap_model(trainer.model) if whole else None,
        "tolerance": None if whole or trainer.accelerator.mixed_precision == "no" else TOLERANCES[torch.bfloat16],
    }
    again = {"measure": trainer.evaluator, "logged": _last_metrics(trainer)}
    found = [compare_reloaded(run, expected, quantization=quantization, **in_memory, **again, **common)]
    if model_args.merge_adapter:
        if quantization is not None:  # the adapter is merged into a base that was not rounded
            expected = expected.under(load_checkpoint("result", str(run), dtype=expected.dtype_name, **common))
        tolerance = None if quantization is not None else in_memory["tolerance"]
        make = partial(merge, run, model_args)
        found.append(compare_reloaded(run / MERGED, expected, make=make, tolerance=tolerance, **common))
    for one in found:
        say(f"rlseq: {one.describe()}")
    write_json_atomic(directory.reloaded, {"folders": [one.as_json() for one in found]})
    return found


def _last_metrics(trainer: Trainer) -> dict[str, float]:
    """What the evaluation during training said of the weights that are the result, if of these at all.

    Several processes share its rows, and one of them alone loads the result: nothing is measured again there.
    """
    args, state = trainer.args, trainer.state
    if trainer.evaluator is None or getattr(args, "ema_decay", 0) or args.world_size > 1:
        return {}
    best = args.load_best_model_at_end and state.best_model_checkpoint
    step = state.best_global_step if best else state.global_step
    said = [log for log in state.log_history if log.get("step") == step and any(k.startswith("eval_") for k in log)]
    metrics = {name.removeprefix("eval_"): value for name, value in (said[-1] if said else {}).items()}
    known = trainer.evaluator.metrics
    return {name: value for name, value in metrics.items() if name in known and math.isfinite(value)}


def measure_with_tools(
    trainer: Trainer, prepared: Prepared, data: DataArguments, evaluation: TrainingEvaluationArguments
) -> Tensor | None:
    """The rewards of evaluation rows with the tools or environment of the run, (R, rewards); None without any.

    Called before and after training.
    """
    config = trainer.args
    if not evaluation.evaluate or not (config.tools or config.environment):
        return None
    rows = prepared.task.eval_rows[: evaluation.eval_rows_during_training]
    prompts = build_prompts(rows, prepared.task.tokenizer, **prompt_options(data, config))
    return rewards_with_tools(trainer, prompts, seed=evaluation.eval_seed)


def compare_with_tools(
    trainer: Trainer, directory: RunDirectory, before: Tensor | None, after: Tensor | None, settings: ContrastSettings
) -> dict[str, Any]:
    """Compare what `measure_with_tools` gave before and after training, row by row, into evaluation/with_tools.json."""
    if before is None or after is None or not trainer.is_world_process_zero():
        return {}
    found: dict[str, Any] = {}
    for place, name in enumerate([*trainer.suite.names, "total"]):
        sides = [
            torch.stack([side[:, place].nan_to_num(), (~side[:, place].isnan()).float()], 1) for side in (before, after)
        ]
        a, b = (side.numpy() for side in sides)
        result = paired_bootstrap(a, b, RatioOfSums(), seed=settings.seed, resamples=settings.resamples)
        power = power_of(result.deviation, result.rows, 0.01)
        found[name] = {
            "before": float(RatioOfSums()(a)),
            "after": float(RatioOfSums()(b)),
            "difference": result.difference,
            "ci95": list(result.ci95),
            "p_value": result.p_value,
            "power": power and power.as_json(),
        }
        shown, one = Shown(decimals=3), found[name]
        values = f"{shown.value(one['before'])} before and {shown.value(one['after'])} after training"
        p = p_text(one["p_value"])
        change = f"{shown.change(one)}, p {p if p[0] == '<' else f'= {p}'}"
        say(f"rlseq: with tools, on {len(before):,} evaluation rows, {name} is {values}: {change}")
    write_json_atomic(directory.evaluation / "with_tools.json", {"rows": len(before), "rewards": found})
    return found


def contrast_with_base(
    prepared: Prepared,
    directory: RunDirectory,
    data: DataArguments,
    config: Any,
    model_args: ModelArguments,
    *,
    method: str,
) -> dict[str, Any]:
    """Evaluate the result beside the model it started from, into the run's evaluation/.

    Args:
        prepared: as `prepare` returned it.
        directory: the run's, with the result in it.
        data, config, model_args: the run's settings.
        method: what the report's title calls the training.

    Returns:
        The contents of results.json on the first process, an empty dict on others.
    """
    note = quantization_note(model_args, prepared.settings.quantization)
    if note:
        say(f"rlseq: {note}")
    return contrast_and_report(
        {"base": named_alone(model_args), "rl": config.output_dir},
        prepared.task.eval_rows,
        prepared.measured,
        settings=prepared.settings,
        prompt_options=prompt_options(data, config),
        output_dir=directory.evaluation,
        title=f"{method} on {data.dataset_name} ({data.eval_split})",
        metrics_file=directory.metrics,
        data_name=f"{data.dataset_name} ({data.eval_split})",
        notes=[text for text in (prepared.task.eval_note, note) if text],
    )


def share(
    trainer: Trainer,
    directory: RunDirectory,
    data: DataArguments,
    model_args: ModelArguments,
    results: Mapping[str, Any],
) -> None:
    """Log the contrast to the run's trackers, write the result's card and, where asked for, push both to the hub.

    Args:
        results: what `contrast_with_base` returned; empty where nothing was evaluated.
    """
    log_contrast(trainer, results, [directory.curves, write_plane(results, directory.evaluation / "plane.png")])
    report = directory.evaluation / "report.md" if results else None
    publish(trainer, base_model=model_args.model_name_or_path, dataset_name=data.dataset_name, report=report)
