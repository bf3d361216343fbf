"""GRPO: fine-tune a teacher-forced model on the sequences it samples, scored whole by rewards.

    accelerate launch --config_file accelerate_config.yaml recipes/grpo.py

With no arguments it fine-tunes the bundled grapheme-to-phoneme base by `phoneme_accuracy` (recipes/g2p/grpo.yaml:
about 4 minutes on 2 cores) and writes runs/g2p-grpo/: every rollout, every metric, the checkpoints, and in
evaluation/report.html the contrast of the base with the result. `--config` and flags take any model, data and
rewards; every field of TRL's GRPOConfig and ModelConfig is a flag under its TRL name:

    accelerate launch recipes/grpo.py --config recipes/g2p/grpo.yaml \
        --reward_funcs my_rewards.py:brevity phoneme_accuracy --reward_weights 0.1 1.0

A step: P prompts, G samples each -> rewards -> advantages within each prompt's group -> clipped policy gradient.
Other objectives are one flag away (docs/objectives.md): --advantage_baseline leave_one_out|greedy|batch,
--objective minimum_risk|expected_accuracy|reference_exact, --reference_loss_coef, --reference_prefix. recipes/ppo.py
takes the same flags and puts a critic in place of the group.
"""

from functools import partial
from pathlib import Path

import trl

from rlseq.data import build_prompts
from rlseq.evaluation.contrast import ContrastSettings, check_settings, contrast_and_report, read_jsonl
from rlseq.evaluation.documents import check_windows
from rlseq.evaluation.during import ValidationProbe, learning_warnings, measured_together
from rlseq.evaluation.plots import write_curves
from rlseq.training.averaging import WeightAverage
from rlseq.training.callbacks import GracefulStop, MetricsWriter, Progress, Warnings
from rlseq.training.config import (
    DataArguments,
    GRPOConfig,
    ModelArguments,
    RewardArguments,
    RunArguments,
    TrainingEvaluationArguments,
)
from rlseq.training.dry_run import describe_rollouts
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import load_model
from rlseq.training.parser import RecipeParser, run_recipe
from rlseq.training.recipe import (
    announce,
    choose_best_by,
    default_config,
    describe_round,
    finish,
    load_task,
    open_run,
    say,
)

DEFAULT_CONFIG = Path(__file__).parent / "g2p" / "grpo.yaml"


def main() -> None:
    parser = RecipeParser(
        [DataArguments, RewardArguments, TrainingEvaluationArguments, RunArguments, GRPOConfig, ModelArguments],
        description=__doc__.splitlines()[0],
    )
    data, rewards, evaluation, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts: model path, rewards, data, directory.
    during = config.eval_strategy != "no"
    task = load_task(data, rewards, model_args, config, evaluates=evaluation.evaluate or during)
    measured, _ = measured_together(task.suite, task.eval_suite)
    settings = ContrastSettings(**evaluation.contrast_values(config.max_completion_length))
    if evaluation.evaluate:
        check_settings(settings, measured, task.eval_rows, data.prompt_options())
        check_windows(settings, {"base": model_args.model_name_or_path})
    probe = None
    if during:
        probe = ValidationProbe(
            build_prompts(task.eval_rows[: evaluation.probe_rows], task.tokenizer, **data.prompt_options()),
            task.tokenizer,
            task.suite,
            task.eval_suite,
            max_new_tokens=config.max_completion_length,
            seed=evaluation.eval_seed,
        )
        choose_best_by(config, probe.metrics, probe.best)
    if run.dry_run:
        say(describe_rollouts(config, run, model_args, task.prompts))
        measured.close()
        task.close()
        return
    directory = open_run(config, run, data, rewards, evaluation, model_args)
    announce(config, run, f"{len(task.prompts):,} prompts, {describe_round(config)}")

    trainer = GRPOTrainer(
        load_model(model_args),
        config,
        task.prompts,
        task.suite,
        task.tokenizer,
        rollouts_dir=directory.rollouts,
        probe=probe,
        peft_config=trl.get_peft_config(model_args),
        callbacks=[MetricsWriter(directory.metrics)],
    )
    Progress.replace_default(trainer)
    trainer.add_callback(Warnings(partial(learning_warnings, eval_rewards=probe.eval_rewards if probe else ())))
    trainer.add_callback(stop := GracefulStop())
    if config.ema_decay:
        trainer.add_callback(average := WeightAverage(trainer, config.ema_decay, config.start_weight))
    trainer.train(resume_from_checkpoint=directory.resume_from)
    if config.ema_decay and not stop.stopped:
        average.apply()
    ended = finish(trainer, directory, stop)
    if trainer.is_world_process_zero():
        write_curves(read_jsonl(directory.metrics), directory.curves)
    if ended and evaluation.evaluate:
        contrast_and_report(
            {"base": model_args.model_name_or_path, "rl": config.output_dir},
            task.eval_rows,
            measured,
            settings=settings,
            prompt_options=data.prompt_options(),
            output_dir=directory.evaluation,
            title=f"GRPO on {data.dataset_name} ({data.eval_split})",
            metrics_file=directory.metrics,
        )
    measured.close()
    task.close()


if __name__ == "__main__":
    run_recipe(main)
