"""PPO: fine-tune a teacher-forced model on the sequences it samples, each token's advantage against a critic.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo.py

The same data, rewards, rollouts, run directory, evaluation and flags as recipes/grpo.py, and a critic in place of the
group: one sample a prompt is enough. With no arguments it fine-tunes the bundled grapheme-to-phoneme base
(recipes/g2p/ppo.yaml: about 5 minutes on 2 cores) and writes runs/g2p-ppo/. The critic is `separate` (its own
backbone) or `shared` (a head on the policy's trunk), and is kept in checkpoint-N/critic/:

    accelerate launch recipes/ppo.py --config recipes/g2p/ppo.yaml --critic shared --beta 0.02 --kl_target 1.0

A step: P prompts, a sample each -> rewards, on the last token, minus the KL penalty -> GAE against the critic ->
num_iterations epochs of steps_per_generation minibatches: clipped policy gradient and value loss in one forward.
docs/objectives.md explains every setting and every logged number.
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
    ModelArguments,
    PPOConfig,
    RewardArguments,
    RunArguments,
    TrainingEvaluationArguments,
)
from rlseq.training.critic import check_critic_path
from rlseq.training.dry_run import describe_rollouts
from rlseq.training.models import load_model
from rlseq.training.parser import RecipeParser, run_recipe
from rlseq.training.ppo import PPOTrainer
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

DEFAULT_CONFIG = Path(__file__).parent / "g2p" / "ppo.yaml"


def main() -> None:
    parser = RecipeParser(
        [DataArguments, RewardArguments, TrainingEvaluationArguments, RunArguments, PPOConfig, ModelArguments],
        description=__doc__.splitlines()[0],
    )
    data, rewards, evaluation, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts: model paths, rewards, data, directory.
    during = config.eval_strategy != "no"
    check_critic_path(config.critic, config.critic_name_or_path)
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

    trainer = PPOTrainer(
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
            title=f"PPO on {data.dataset_name} ({data.eval_split})",
            metrics_file=directory.metrics,
        )
    measured.close()
    task.close()


if __name__ == "__main__":
    run_recipe(main)
