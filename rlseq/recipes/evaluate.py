"""Evaluate any number of checkpoints on one data set: likelihood of references against quality of generation.

    accelerate launch --config_file accelerate_config.yaml recipes/evaluate.py \
        --models base=recipes/g2p/base rl=runs/g2p-grpo --dataset_name recipes/g2p/data.py \
        --reward_funcs phoneme_accuracy --output_dir runs/contrast

The first model is compared with each of the others, row by row; a name that is repeated is one method with several
training seeds. `--compare` joins finished evaluations instead. `rlseq evaluate` is the same in one process.
Nothing is trained and `test` is touched only with `--eval_split test`.
"""

import dataclasses

from rlseq.evaluation.command import evaluate, join_finished, refuse_beside_compare
from rlseq.evaluation.contrast import ContrastSettings
from rlseq.training.config import DataArguments, EvaluateArguments, EvaluationArguments, RewardArguments
from rlseq.training.parser import RecipeParser, run_recipe


def main() -> None:
    parser = RecipeParser(
        [EvaluateArguments, DataArguments, RewardArguments, EvaluationArguments],
        description=__doc__.splitlines()[0],
    )
    arguments, data, rewards, evaluation = parser.parse()
    measured = [*(rewards.reward_funcs or []), *(rewards.eval_reward_funcs or [])]  # all are only measured
    if arguments.compare:
        given = (arguments, data, rewards, evaluation)
        values, defaults = (
            {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
            for parts in (given, [type(part)() for part in given])
        )
        refuse_beside_compare(values, defaults)
        return join_finished(arguments.compare, output_dir=arguments.output_dir, reward_funcs=measured or None)
    evaluate(
        arguments.models or [],
        dataset_name=data.dataset_name,
        split=data.eval_split,
        limit=data.eval_rows,
        config_name=data.dataset_config,
        prompt_options=data.prompt_options(),
        reward_funcs=measured,
        max_error_rate=rewards.max_error_rate,
        settings=ContrastSettings(
            **evaluation.contrast_values(arguments.max_new_tokens),
            choose_split=arguments.choose_split,
            choose_rows=arguments.choose_rows,
        ),
        output_dir=arguments.output_dir,
    )


if __name__ == "__main__":
    run_recipe(main)
