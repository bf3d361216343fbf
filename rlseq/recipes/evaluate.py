"""Evaluate any number of checkpoints on one data set: likelihood of references against quality of generation.

    accelerate launch --config_file accelerate_config.yaml recipes/evaluate.py \
        --models base=recipes/g2p/base rl=runs/g2p-grpo --dataset_name recipes/g2p/data.py \
        --reward_funcs phoneme_accuracy --output_dir runs/contrast

The first model is compared with each of the others, row by row; a name that is repeated is one method with several
training seeds. `--compare` joins finished evaluations instead. `rlseq evaluate` is the same in one process.
Nothing is trained and `test` is touched only with `--eval_split test`.
"""

from rlseq.cli.evaluate import ARGUMENTS, evaluate_or_join
from rlseq.config.parsing.parser import RecipeParser
from rlseq.training.run.launch import run_recipe


def main() -> None:
    parser = RecipeParser(ARGUMENTS, description=__doc__.splitlines()[0])
    evaluate_or_join(*parser.parse())


if __name__ == "__main__":
    run_recipe(main)
