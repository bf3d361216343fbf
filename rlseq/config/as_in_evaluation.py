"""Settings of training on rollouts that the evaluations during and after it share."""

from __future__ import annotations

from dataclasses import dataclass

from rlseq.config.arguments import EvaluateArguments
from rlseq.config.fields import as_declared
from rlseq.config.groups.thoughts import ThoughtArguments


@dataclass
class AsInEvaluation(ThoughtArguments):
    """Those that `rlseq evaluate` has too, under the same names."""

    stop_strings: list[str] | None = as_declared(
        EvaluateArguments,
        "stop_strings",
        help="Texts that end a completion, beside the model's end tokens, in training and evaluation; its text ends "
        "before the one met, and the tokens up to it are trained (in bash a new line is $'\\n').",
    )
    group_column: str | None = as_declared(
        EvaluateArguments,
        "group_column",
        help="Column by whose values metrics are logged and reported too, e.g. task: group/VALUE/reward.",
    )
