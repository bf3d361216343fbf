"""The settings of `rlseq doctor`, `reward` and `difficulty`, composed of those of training and evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlseq.config.arguments import (
    DataArguments,
    EvaluateArguments,
    EvaluationArguments,
    RejectionArguments,
    RewardArguments,
    WeightedArguments,
)
from rlseq.config.fields import Conflict, Need, as_declared, at_least, setting
from rlseq.config.groups.rows import RenderedRowsArguments
from rlseq.config.groups.thoughts import ThoughtArguments
from rlseq.config.validation.validate import Settings


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
class EvalRowsArguments(RenderedRowsArguments):
    """Rows of the evaluation split."""

    _argument_group_name = "data (rlseq)"

    eval_split: str = as_declared(DataArguments, "eval_split", help="Split to check.")
    eval_rows: int | None = as_declared(DataArguments, "eval_rows", help="Use only its first N rows.")


@dataclass
class TrainRowsArguments(RenderedRowsArguments):
    """Rows of the training split, a few of them."""

    _argument_group_name = "data (rlseq)"

    train_split: str = as_declared(DataArguments, "train_split", help="Split that the reward is checked on.")
    train_rows: int = as_declared(DataArguments, "train_rows", default=32, help="Use only its first N rows.")


@dataclass
class CheckArguments(ThoughtArguments, Settings):
    """The model whose completions `rlseq reward check` scores."""

    _argument_group_name = "model (rlseq)"

    model_name_or_path: str | None = setting(
        None, "Sample from this model: do its completions differ in reward?", metavar="PATH"
    )
    samples_per_row: int = as_declared(
        EvaluationArguments, "samples_per_row", default=8, help="Completions sampled per row from that model."
    )
    max_new_tokens: int = as_declared(EvaluateArguments, "max_new_tokens")
    stop_strings: list[str] | None = as_declared(EvaluateArguments, "stop_strings")


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
    system_prompt: str | None = _as_the_run("system_prompt")
    train_split: str | None = as_declared(DataArguments, "train_split", default=None, help="Split of the rollouts.")
    think_end: str | None = as_declared(EvaluateArguments, "think_end")


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


@dataclass
class CompareArguments(Settings):
    """The rollouts on which `rlseq reward compare` compares two rewards, and what it shows of them."""

    _argument_group_name = "rollouts (rlseq)"

    rollouts: Path = as_declared(ScoreArguments, "rollouts")
    limit: int = setting(10, "Show N rollouts on which the two differ; 0: all.", metavar="N", range=at_least(0))
    output: Path | None = setting(None, "Write the numbers to this JSON file.")


@dataclass
class AuditArguments(Settings):
    """What `rlseq audit` compares the optimised reward with, and how it says what it found."""

    _argument_group_name = "audit (rlseq)"

    held_out_rewards: list[str | dict] | None = as_declared(
        RewardArguments,
        "reward_funcs",
        default=None,
        help="Rewards that the run was not trained on, named as for recipes/grpo.py; they score the logged rollouts. "
        "Rewards that the run logged with weight 0 are held out too.",
        conflicts=Conflict("names no reward; give one, or leave it out", lambda config: config.held_out_rewards == []),
    )
    json: bool = as_declared(DoctorArguments, "json")


_REWARDS = Need("--reward_funcs, which score samples", lambda config: config.reward_funcs)


@dataclass
class DifficultyArguments(Settings):
    """The model, and how its completions are measured."""

    _argument_group_name = "measurement (rlseq)"

    model: str = setting(dataclasses.MISSING, "Path or hub id of a model, or folder of an adapter.")
    output_dir: str = as_declared(
        EvaluateArguments,
        "output_dir",
        default="runs/difficulty",
        help="Folder for the data set with the column; no file in it is replaced.",
    )
    column: str | None = setting(None, "Name of the column; default: pass_rate, or mean_reward.")
    exact: bool | None = setting(
        None,
        "Write the exact chance that a sample is one of the references; default: where no reward is given.",
    )
    reward_funcs: list[str | dict] | None = as_declared(
        RejectionArguments,
        "reward_funcs",
        conflicts=Conflict("score samples, and --exact samples none: give one of them", lambda config: config.exact),
    )
    reward_weights: list[float] | None = as_declared(WeightedArguments, "reward_weights", needs=_REWARDS)
    max_error_rate: float = as_declared(RejectionArguments, "max_error_rate", needs=_REWARDS)
    samples_per_row: int = as_declared(
        EvaluationArguments, "samples_per_row", default=8, help="Completions sampled per row.", needs=_REWARDS
    )
    pass_threshold: float = setting(
        1.0,
        "A completion passes if its reward, the weighted sum, is at least this.",
        needs=(_REWARDS, Need("a pass rate: --mean_reward asks for the mean", lambda config: not config.mean_reward)),
    )
    mean_reward: bool = setting(
        False, "Write the mean reward of the samples and its standard error instead of a pass rate.", needs=_REWARDS
    )
    strategy: str = setting("sample", "How completions are sampled: sample, sample:temperature=0.7,top_p=0.9.")
    max_new_tokens: int = as_declared(
        EvaluateArguments,
        "max_new_tokens",
        help="Longest completion, in tokens: max_completion_length of the training.",
    )
    stop_strings: list[str] | None = as_declared(EvaluateArguments, "stop_strings")
    think_end: str | None = as_declared(RejectionArguments, "think_end", needs=_REWARDS)
    seed: int = as_declared(EvaluateArguments, "seed", help="Seed of the sampling.", needs=_REWARDS)
    dtype: str = as_declared(EvaluateArguments, "dtype", help="Precision of the weights; auto: the checkpoint's own.")
    allow_missing_weights: bool = as_declared(EvaluateArguments, "allow_missing_weights")
    eval_batch_size: int = as_declared(
        EvaluationArguments,
        "eval_batch_size",
        help="Rows measured together, and kept together on an interruption (values differ by rounding at most).",
    )
    max_kv_gb: float | None = as_declared(EvaluationArguments, "max_kv_gb", needs=_REWARDS)
    chat_template_kwargs: str | dict[str, Any] | None = as_declared(EvaluateArguments, "chat_template_kwargs")
