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

from accelerate import PartialState

from rlseq.config.groups.adapters import peft_config_of
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import (
    ModelArguments,
    PPOConfig,
    RewardArguments,
    RolloutRunArguments,
    TrainingDataArguments,
    TrainingEvaluationArguments,
)
from rlseq.recipes.rollouts import check_reloaded, contrast_with_base, evaluation_costs, prepare, share, train
from rlseq.scoring.specs.find import bundled_folder
from rlseq.training.critic import check_critic_path
from rlseq.training.models import load_model, merge_result
from rlseq.training.plan.dry_run import describe_rollouts, plan_rollouts
from rlseq.training.plan.micro_batches import split_micro_batches
from rlseq.training.ppo import PPOTrainer
from rlseq.training.run.callbacks import MetricsWriter
from rlseq.training.run.launch import run_recipe
from rlseq.training.run.recipe import announce, default_config, describe_round, open_run, say, task_inputs

DEFAULT_CONFIG = bundled_folder("recipes") / "g2p" / "ppo.yaml"


def main() -> None:
    parser = RecipeParser(
        [
            TrainingDataArguments,
            RewardArguments,
            TrainingEvaluationArguments,
            RolloutRunArguments,
            PPOConfig,
            ModelArguments,
        ],
        description=__doc__.splitlines()[0],
    )
    data, rewards, evaluation, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts: model paths, rewards, data, directory.
    check_critic_path(config.critic, config.critic_name_or_path)
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

    trainer = PPOTrainer(
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
    ended = train(trainer, directory, prepared.evaluator)
    if ended:
        merge_result(config.output_dir, model_args)
        check_reloaded(trainer, directory, model_args)
        results = {}
        if evaluation.evaluate:
            results = contrast_with_base(prepared, directory, data, config, model_args, method="PPO")
        share(trainer, directory, data, model_args, results)
    prepared.close()
    directory.release()


if __name__ == "__main__":
    run_recipe(main)
