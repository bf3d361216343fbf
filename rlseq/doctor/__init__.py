"""Checks that a model and its tokenizer fit reinforcement learning, each with what to do (docs/reliability.md).

`static` makes the checks that read configuration, tokenizer (`chat`) and data (`prompts`); recipes make them at every
start. `forward` holds the checks that run the model. `rlseq doctor` makes all of them.
"""
