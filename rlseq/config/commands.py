"""The settings of `rlseq doctor` and `rlseq reward`, composed of those of training and evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlseq.config.arguments import DataArguments, EvaluateArguments, EvaluationArguments, RowsArguments
from rlseq.config.fields import as_declared, setting
from rlseq.config.validate import Settings


@dataclass
class DoctorArguments(Settings):
    """What `rlseq doctor` looks at, and how it says what it found."""

    _argument_group_name = "model (rlseq)"

    model_name_or_path: str = setting(
        dataclasses.MISSING, "Path or hub id of a model, or folder of an adapter.", metavar="PATH"
    )
    chat_template_kwargs: str | dict[str, Any] | None = as_declared(EvaluateArguments, "chat_template_kwargs")
    max_new_tokens: int | None = as_declared(
        EvaluateArguments,
        "max_new_tokens",
        default=None,
        help="Longest completion that will be sampled, in tokens (max_completion_length of a training run; "
        "default: the longest reference).",
    )
    json: bool = setting(False, "Print the results as JSON, and nothing else.")


@dataclass
class EvalRowsArguments(RowsArguments):
    """Rows of the evaluation split."""

    _argument_group_name = "data (rlseq)"

    eval_split: str = as_declared(DataArguments, "eval_split", help="Split to check.")
    eval_rows: int | None = as_declared(DataArguments, "eval_rows", help="Use only its first N rows.")


@dataclass
class TrainRowsArguments(RowsArguments):
    """Rows of the training split, a few of them."""

    _argument_group_name = "data (rlseq)"

    train_split: str = as_declared(DataArguments, "train_split", help="Split that the reward is checked on.")
    train_rows: int = as_declared(DataArguments, "train_rows", default=32, help="Use only its first N rows.")


@dataclass
class CheckArguments(Settings):
    """The model whose completions `rlseq reward check` scores."""

    _argument_group_name = "model (rlseq)"

    model_name_or_path: str | None = setting(
        None, "Sample from this model: do its completions differ in reward?", metavar="PATH"
    )
    samples_per_row: int = as_declared(
        EvaluationArguments, "samples_per_row", default=8, help="Completions sampled per row from that model."
    )
    max_new_tokens: int = as_declared(EvaluateArguments, "max_new_tokens")


def _as_the_run(name: str) -> Any:
    """A setting of the data that is the run's where it is not given."""
    return as_declared(DataArguments, name, default=None)


@dataclass
class LoggedRowsArguments(Settings):
    """The data set of logged rollouts, for columns that the log lacks; not given: as in RUN/config.yaml."""

    _argument_group_name = "data, for columns that the log lacks; default: as in RUN/config.yaml, else as in training"

    dataset_name: str | None = _as_the_run("dataset_name")
    dataset_config: str | None = _as_the_run("dataset_config")
    prompt_column: str | None = _as_the_run("prompt_column")
    reference_column: str | None = _as_the_run("reference_column")
    prompt_template: str | None = _as_the_run("prompt_template")
    reference_template: str | None = _as_the_run("reference_template")
    merge_references: bool | None = _as_the_run("merge_references")
    train_split: str | None = as_declared(DataArguments, "train_split", default=None, help="Split of the rollouts.")


@dataclass
class OutputArguments(Settings):
    """Where scored rollouts go."""

    _argument_group_name = "output (rlseq)"

    output: Path | None = setting(
        None, "Write the records to this jsonl file, with values, status, details and total (the weighted sum)."
    )


@dataclass
class ScoreArguments(OutputArguments):
    """What `rlseq reward score` scores."""

    _argument_group_name = "rollouts (rlseq)"

    rollouts: Path = dataclasses.field(
        kw_only=True, metadata={"help": "jsonl file with prompt, completion and columns, or a run directory."}
    )
