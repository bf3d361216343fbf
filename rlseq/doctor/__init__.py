"""Does a model with its tokenizer fit reinforcement learning? A finding a check, and what to do (docs/reliability.md).

`preflight` makes the checks that read configuration, tokenizer (`chat`) and data (`prompts`), as recipes do at every
start; `forward` holds those that run the model; `command` is `rlseq doctor`, which makes them all.
"""
