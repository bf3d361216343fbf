"""Direct preference optimisation on a run's rollouts: `accelerate launch recipes/dpo.py`, from a checkout.

The recipe itself, which explains what it does and what it takes, is rlseq/recipes/dpo.py; where rlseq is installed
without a checkout, `accelerate launch -m rlseq.recipes.dpo` is the same.
"""

from rlseq.common.interrupts import exit_on_sigint

if __name__ == "__main__":  # processes that multiprocessing spawns import this file too, and need nothing of it
    with exit_on_sigint():
        from rlseq.recipes.dpo import main
        from rlseq.training.run.launch import run_recipe

    run_recipe(main)
