"""The recipes: `accelerate launch -m rlseq.recipes.grpo`, or recipes/grpo.py of a checkout, which starts the same.

sft         teacher forcing, for an existing model or a new one
dpo         preferences between completions that a run has logged
grpo, ppo   training on rollouts; what both do around their trainer is in `rollouts`
evaluate    the contrast of any number of checkpoints, in as many processes as are launched
"""
