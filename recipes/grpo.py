"""GRPO: fine-tune a teacher-forced model on the sequences it samples, scored whole by rewards.

    accelerate launch --config_file accelerate_config.yaml recipes/grpo.py

With no arguments it fine-tunes the bundled grapheme-to-phoneme base by `phoneme_accuracy` (recipes/g2p/grpo.yaml:
about 4 minutes on 2 cores) and writes runs/g2p-grpo/: every rollout, every metric, the checkpoints, and in
evaluation/report.html the contrast of the base with the result. `--config` and flags take any model, data and
rewards; every field of TRL's GRPOConfig and ModelConfig is a flag under its TRL name:

    accelerate launch recipes/grpo.py --config recipes/g2p/grpo.yaml \
        --reward_funcs my_rewards.py:brevity phoneme_accuracy --reward_weights 0.1 1.0

A step: P prompts, G samples each -> rewards -> advantages within each prompt's group -> clipped policy gradient.
"""

from pathlib import Path

import trl

from rlseq.data import build_prompts, load_rows
from rlseq.errors import ConfigError
from rlseq.evaluation.contrast import ContrastSettings, check_settings, contrast_and_report, read_jsonl
from rlseq.evaluation.plots import write_curves
from rlseq.scoring import load_rewards
from rlseq.training.averaging import WeightAverage
from rlseq.training.callbacks import GracefulStop, MetricsWriter, Progress
from rlseq.training.config import (
    DataArguments,
    EvaluationArguments,
    GRPOConfig,
    ModelArguments,
    RewardArguments,
    RunArguments,
)
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import check_model_path, load_model, load_tokenizer
from rlseq.training.parser import RecipeParser, run_recipe
from rlseq.training.recipe import announce, default_config, finish, open_run, try_rewards

DEFAULT_CONFIG = Path(__file__).parent / "g2p" / "grpo.yaml"


def main() -> None:
    parser = RecipeParser(
        [DataArguments, RewardArguments, EvaluationArguments, RunArguments, GRPOConfig, ModelArguments],
        description=__doc__.splitlines()[0],
    )
    data, rewards, evaluation, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts: model path, rewards, data, directory.
    check_model_path(model_args.model_name_or_path)
    if not data.dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    if not rewards.reward_funcs:
        raise ConfigError("no reward is named; give --reward_funcs (`rlseq reward list` shows the bundled ones)")
    suite = load_rewards(rewards.reward_funcs, weights=config.reward_weights, max_error_rate=rewards.max_error_rate)
    settings = ContrastSettings(**evaluation.contrast_values(config.max_completion_length))
    check_settings(settings, suite)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    options = data.prompt_options()
    rows = load_rows(data.dataset_name, data.train_split, config_name=data.dataset_config)[: data.train_rows]
    prompts = build_prompts(rows, tokenizer, **options)
    eval_rows = []
    if evaluation.evaluate:
        eval_rows = load_rows(data.dataset_name, data.eval_split, config_name=data.dataset_config)[: data.eval_rows]
    try_rewards(suite, prompts[0])
    directory = open_run(config, run, data, rewards, evaluation, model_args)
    announce(
        config,
        run,
        f"{len(prompts):,} prompts, {config.generation_batch_size // config.num_generations} prompts × "
        f"{config.num_generations} samples a generation round",
    )

    trainer = GRPOTrainer(
        load_model(model_args),
        config,
        prompts,
        suite,
        tokenizer,
        rollouts_dir=directory.rollouts,
        peft_config=trl.get_peft_config(model_args),
        callbacks=[MetricsWriter(directory.metrics)],
    )
    Progress.replace_default(trainer)
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
        models = {"base": model_args.model_name_or_path, "rl": config.output_dir}
        contrast_and_report(
            models,
            eval_rows,
            suite,
            settings=settings,
            prompt_options=options,
            output_dir=directory.evaluation,
            title=f"GRPO on {data.dataset_name} ({data.eval_split})",
            metrics_file=directory.metrics,
        )
    suite.close()


if __name__ == "__main__":
    run_recipe(main)
