"""GRPO: fine-tune a teacher-forced model on the sequences it samples, scored whole by rewards.

    accelerate launch --config_file accelerate_config.yaml recipes/grpo.py

With no arguments it fine-tunes a bundled grapheme-to-phoneme base by `phoneme_accuracy` (recipes/g2p/grpo.yaml:
about 5 minutes on 2 cores) and writes runs/g2p-grpo/: every rollout, every metric, the checkpoints, and in
evaluation/report.html the contrast of the base with the result. `--config` and flags take any model, data and
rewards; every field of TRL's GRPOConfig and ModelConfig is a flag under its TRL name:

    accelerate launch recipes/grpo.py --config recipes/g2p/grpo.yaml \
        --reward_funcs my_rewards.py:brevity phoneme_accuracy --reward_weights 0.1 1.0

A step: P prompts, G samples each -> rewards -> advantages within each prompt's group -> clipped policy gradient.
Other objectives are one flag away (docs/objectives.md): --advantage_baseline leave_one_out|greedy|batch,
--objective minimum_risk|expected_accuracy|max_rl|reference_exact, --reference_loss_coef, --reference_prefix.
recipes/ppo.py takes the same flags and puts a critic in place of the group.
"""

from accelerate import PartialState

from rlseq.config.groups.adapters import peft_config_of
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import (
    GRPOConfig,
    ModelArguments,
    RewardArguments,
    RolloutRunArguments,
    TrainingDataArguments,
    TrainingEvaluationArguments,
)
from rlseq.recipes.rollouts import (
    check_reloaded,
    compare_with_tools,
    contrast_with_base,
    evaluation_costs,
    measure_with_tools,
    prepare,
    share,
    train,
)
from rlseq.scoring.specs.find import bundled_folder
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import load_model, merge_result
from rlseq.training.plan.dry_run import describe_rollouts, plan_rollouts
from rlseq.training.plan.micro_batches import split_micro_batches
from rlseq.training.run.callbacks import MetricsWriter
from rlseq.training.run.launch import run_recipe
from rlseq.training.run.recipe import announce, default_config, describe_round, open_run, say, task_inputs

DEFAULT_CONFIG = bundled_folder("recipes") / "g2p" / "grpo.yaml"


def main() -> None:
    parser = RecipeParser(
        [
            TrainingDataArguments,
            RewardArguments,
            TrainingEvaluationArguments,
            RolloutRunArguments,
            GRPOConfig,
            ModelArguments,
        ],
        description=__doc__.splitlines()[0],
    )
    data, rewards, evaluation, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts: model path, rewards, data, directory.
    prepared = prepare(data, rewards, evaluation, config, model_args)
    task = prepared.task
    split = split_micro_batches(config, run, model_args, task)
    if run.dry_run:
        say(describe_rollouts(config, run, model_args, task))
        if split:
            say(f"  {split}")
        if evaluation.evaluate:
            say(evaluation_costs(prepared, data, config))
        prepared.close()
        return
    inputs = task_inputs(task, data, config)
    steps = plan_rollouts(config, task.prompts, PartialState().num_processes).steps
    directory = open_run(config, run, data, rewards, evaluation, model_args, inputs=inputs, steps=steps)
    announce(config, run, f"{task.describe()}, {describe_round(config)}")
    if split:
        say(f"rlseq: {split}")

    trainer = GRPOTrainer(
        load_model(model_args),
        task.suite,
        config,
        task.prompts,
        processing_class=task.tokenizer,
        rollouts_dir=directory.rollouts,
        evaluator=prepared.evaluator,
        peft_config=peft_config_of(model_args),
        callbacks=[MetricsWriter(directory.metrics)],
    )
    before = measure_with_tools(trainer, prepared, data, evaluation)
    ended = train(trainer, directory, prepared.evaluator)
    if ended:
        merge_result(config.output_dir, model_args)
        check_reloaded(trainer, directory, model_args)
        after = measure_with_tools(trainer, prepared, data, evaluation)
        compare_with_tools(trainer, directory, before, after, prepared.settings)
        results = {}
        if evaluation.evaluate:
            results = contrast_with_base(prepared, directory, data, config, model_args, method="GRPO")
        share(trainer, directory, data, model_args, results)
    prepared.close()
    directory.release()


if __name__ == "__main__":
    run_recipe(main)
