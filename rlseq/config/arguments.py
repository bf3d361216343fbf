"""rlseq's own settings, as plain dataclasses: the flags of its recipes and of `rlseq evaluate`, each declared once.

The recipes read them beside TRL's (`rlseq.config.training`), by `rlseq.config.parsing.parser`; a command makes its
flags of them by `rlseq.config.parsing.flags`. Neither torch, trl nor transformers is imported here, so that `--help` is
quick. A field's metadata holds what argparse gets for its flag, and its range.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from rlseq.config.fields import (
    ABOVE_0,
    FINITE_ABOVE_0,
    SHARE,
    Conflict,
    Need,
    Range,
    as_declared,
    at_least,
    setting,
)
from rlseq.config.groups.chat_template import template_options
from rlseq.config.groups.precision import FinalPrecisionArguments, PrecisionArguments
from rlseq.config.groups.rows import RenderedRowsArguments
from rlseq.config.groups.thoughts import ThoughtArguments
from rlseq.config.validation.validate import Settings

_DOCUMENTS = Need("--likelihood_dataset, text without prompts", lambda config: config.likelihood_dataset is not None)
STUDIES = ("ranking", "coverage", "sharpening", "exposure_bias", "kl", "map", "lookahead")
COVERAGE = Range("2 to 256: the largest k is the largest power of two among them", least=2, most=256)
TEMPERATURES = Range(f"{FINITE_ABOVE_0.words} (for the limit 0 use greedy)", above=0, below=math.inf)


@dataclass
class EvaluateArguments(PrecisionArguments, ThoughtArguments, Settings):
    """What an evaluation by itself is of: `rlseq evaluate`, recipes/evaluate.py."""

    _argument_group_name = "models (rlseq)"

    models: list[str] | None = setting(
        None,
        "Checkpoints (paths or hub ids). The first is the baseline; a NAME given several times is one method "
        "with several "
        "training seeds.",
        metavar="NAME=PATH",
    )
    compare: list[str] | None = setting(
        None,
        "Join finished evaluations (results.json or its folder) instead of measuring; NAME picks one of their models. "
        "Or compare lm-eval's samples_*.jsonl, or inspect's logs (files or folders).",
        metavar="[NAME=]RESULTS",
    )
    output_dir: str = setting("runs/contrast", "Folder for results.json and report.html.")
    max_new_tokens: int = setting(256, "Longest completion, in tokens.", range=at_least(1))
    stop_strings: list[str] | None = setting(
        None,
        "Texts that end a completion, beside the model's end tokens; its text ends before the one met (in bash a new "
        "line is $'\\n').",
        metavar="TEXT",
    )
    group_column: str | None = setting(
        None,
        "Column by whose values the metrics are reported too, e.g. task: a section of the report and of results.json.",
    )
    seed: int = setting(0, "Seed of the evaluation's sampling and of its bootstrap.")
    allow_missing_weights: bool = setting(
        False,
        "Load a checkpoint although it lacks weights (they are random) or holds layers that its configuration "
        "does not.",
    )
    tune_split: str = setting(
        "validation", "Split on which a strategy with several values, as sample:temperature=0.5/0.7/1, is tuned."
    )
    tune_rows: int = setting(500, "Tune on the first N rows of tune_split.", range=at_least(1))
    chat_template_kwargs: str | dict[str, Any] | None = setting(
        None, "Variables for the chat template, as JSON.", metavar='{"enable_thinking":false}'
    )

    def template_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.prompts.build_prompts` that these settings stand for.

        Raises:
            ConfigError: chat_template_kwargs is no mapping.
        """
        given = template_options(self.chat_template_kwargs)
        return {"chat_template_kwargs": given} if given else {}


@dataclass
class EvaluationDataArguments(RenderedRowsArguments):
    """Data: where the prompts and references come from."""

    _argument_group_name = "data (rlseq)"

    eval_split: str = setting("validation", "Split to evaluate on; test is touched only when named here.")
    max_prompt_length: int | None = setting(
        None, "Longest prompt, in tokens, as the chat template renders it; default: no limit.", range=at_least(1)
    )
    overlong_prompts: Literal["fail", "drop"] = setting(
        "fail",
        "What to do with longer prompts: fail refuses the data and names them, drop leaves them out of training and "
        "evaluation and says how many.",
        needs=Need("--max_prompt_length", lambda config: config.max_prompt_length is not None),
    )
    eval_rows: int | None = setting(None, "Use only the first N rows of the evaluation split.", range=at_least(1))

    def length_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.lengths.within_length` that these settings stand for."""
        return {"max_prompt_length": self.max_prompt_length, "drop": self.overlong_prompts == "drop"}


@dataclass
class DataArguments(EvaluationDataArguments):
    """The data of training too."""

    train_split: str = setting("train", "Split to train on.")
    train_rows: int | None = setting(None, "Use only the first N rows of the training split.", range=at_least(1))


@dataclass
class RewardArguments(Settings):
    """Rewards: what is optimised (their weights: --reward_weights)."""

    _argument_group_name = "rewards (rlseq)"

    reward_funcs: list[str | dict] | None = setting(
        None,
        "Rewards: bundled names, path/to/file.py:function or package.module:function. In YAML an entry may also be a "
        "mapping {func, weight, kwargs, timeout, on_error, ...}.",
    )
    eval_reward_funcs: list[str | dict] | None = setting(
        None, "Rewards that are measured in evaluation and never optimised, named as in reward_funcs."
    )
    max_error_rate: float = setting(
        0.05,
        "Stop when a reward fails (error, timeout, invalid) on more than this share of a step's completions.",
        range=SHARE,
    )


@dataclass
class WeightedArguments(Settings):
    """Rewards and their weights, outside of a TRL configuration, which has reward_weights."""

    _argument_group_name = "rewards (rlseq)"

    reward_funcs: list[str | dict] = as_declared(RewardArguments, "reward_funcs", default=dataclasses.MISSING)
    reward_weights: list[float] | None = setting(None, "A weight for each of reward_funcs (default: 1 each).")


@dataclass
class EvaluationArguments(Settings):
    """Evaluation: likelihood against generation, at the end of a run or of any checkpoints."""

    _argument_group_name = "evaluation (rlseq)"

    strategies: list[str] = setting(
        ["greedy", "sample", "beam"],
        "Decoding strategies: greedy, sample, sample:temperature=0.7, beam:width=10, best_of:n=8, "
        "best_of:n=8,by=REWARD, mbr:n=8,utility=REWARD. Of several numbers, "
        "sample:temperature=0.5/0.7/1, `rlseq evaluate` and recipes/evaluate.py tune for each model on "
        "--tune_split (docs/evaluation.md).",
    )
    samples_per_row: int = setting(4, "Completions sampled per row, for strategies that sample.", range=at_least(1))
    eval_batch_size: int = setting(
        256,
        "Rows decoded together in evaluation; changes speed and memory, not completions.",
        range=at_least(1),
    )
    max_kv_gb: float | None = setting(
        None,
        "Largest KV cache while decoding, in gigabytes; fewer rows are decoded together to keep it (default: no "
        "limit).",
        range=ABOVE_0,
    )
    resamples: int = setting(
        10_000, "Bootstrap resamples of rows, and sign flips of the permutation test.", range=at_least(1)
    )
    studies: list[str] = setting(
        ["ranking"],
        f"Studies to run: {', '.join(STUDIES)}, all or none (docs/evaluation.md). Only ranking costs no decoding or "
        "scoring beyond the evaluation's own.",
    )
    study_rows: int = setting(500, "The costly studies run on the first N rows.", range=at_least(1))
    coverage_samples: int = setting(32, "Completions sampled per row in the study coverage.", range=COVERAGE)
    temperatures: list[float] = setting(
        [0.3, 0.5, 0.7, 0.85, 1.0, 1.2], "Temperatures in the study sharpening.", range=TEMPERATURES
    )
    map_rows: int | None = setting(
        None, "The study map searches on the first N rows (default: study_rows).", range=at_least(1)
    )
    map_max_nodes: int = setting(20_000, "Most prefixes that the study map expands per row.", range=at_least(1))
    prefix_lengths: list[int] = setting(
        [1, 2, 4, 8], "Lengths, in tokens, of the prefixes in the study exposure_bias.", range=at_least(1)
    )
    likelihood_dataset: str | None = setting(
        None, "Text without prompts, for bits per byte: txt, json, jsonl, csv or parquet, a task module, or hub id."
    )
    likelihood_config: str | None = setting(
        None, "Configuration name of likelihood_dataset, if a hub data set.", needs=_DOCUMENTS
    )
    likelihood_split: str | None = setting(
        None,
        "Split of likelihood_dataset (default: validation, or train where that is the only one).",
        needs=_DOCUMENTS,
    )
    likelihood_column: str = setting("text", "Column of likelihood_dataset that holds the text.", needs=_DOCUMENTS)
    likelihood_rows: int | None = setting(
        None, "Use only the first N documents of likelihood_dataset.", range=at_least(1), needs=_DOCUMENTS
    )
    likelihood_stride: int | None = setting(
        None,
        "Tokens that the window over a document moves by (default: half the window).",
        range=at_least(1),
        needs=_DOCUMENTS,
    )
    likelihood_context: int | None = setting(
        None,
        "Longest window over a document, in tokens (default: the model's context).",
        range=at_least(2),
        needs=_DOCUMENTS,
    )
    cluster_column: str | None = setting(
        None,
        "Column that names each row's cluster (its document, user or template): intervals, p values and power resample "
        "clusters instead of rows.",
    )
    right_answers: Literal["auto", "listed", "open"] = setting(
        "auto",
        "Whether each row's references are all its right answers (listed) or others are right too (open): the report "
        "then leaves out the chance that a sample is a reference. auto: measured by the rewards.",
    )
    primary: str | None = setting(
        None,
        "The comparison that the evaluation is for, as metric:strategy, e.g. wer:greedy; all others are exploratory.",
    )
    primary_against: str | None = setting(
        None, "Strategy of the baseline in the primary comparison, if it is another one."
    )


@dataclass
class TrainingEvaluationArguments(FinalPrecisionArguments, EvaluationArguments):
    """Evaluation around and during a training run."""

    evaluate: bool = setting(True, "When training ends, evaluate the model before and after training.")
    eval_seed: int = as_declared(EvaluateArguments, "seed")  # seed is that of training
    eval_dtype: str = as_declared(EvaluateArguments, "dtype")  # dtype is that of training
    eval_rows_during_training: int = setting(
        500,
        "During training, evaluate on the first N rows of eval_split, as often as eval_strategy says.",
        range=at_least(1),
    )


@dataclass
class RunArguments(Settings):
    """The run directory and the processor."""

    _argument_group_name = "run (rlseq)"

    overwrite_output_dir: bool = setting(
        False, "If output_dir holds a run, move it to NAME.previous-DATE and start again."
    )
    resume_with_changes: bool = setting(
        False,
        "Resume from a checkpoint although reward code, reward arguments, data rows, system prompt or chat template "
        "have changed.",
    )
    dry_run: bool = setting(
        False, "Check everything that can be checked without training, print what the run would do and need, and stop."
    )
    num_cpu_threads: int | None = setting(
        None,
        "Threads of each process that trains on the CPU (default: OMP_NUM_THREADS if set, else the machine's "
        "cores divided "
        "by its processes).",
        range=at_least(1),
    )


@dataclass
class RolloutRunArguments(RunArguments):
    """The run directory, the processor and its memory."""

    max_memory_gb: float | None = setting(
        None,
        "Most memory of a process, as --dry_run reckons it, in gigabytes: micro-batches are "
        "split until it suffices, with the same optimizer steps; default: no limit.",
        range=FINITE_ABOVE_0,
    )


@dataclass
class NewModelArguments(Settings):
    """A model from scratch, instead of --model_name_or_path."""

    _argument_group_name = "new model (rlseq)"

    new_model: dict | str | None = setting(
        None, "Config of a new, randomly initialised model, e.g. {model_type: llama, hidden_size: 128, ...}."
    )
    new_tokenizer: str | None = setting(
        None, "Tokenizer of the new model: a path or hub id, or path/to/file.py:function that builds it."
    )


_SAMPLES = Need("--rejection_samples", lambda config: config.rejection_samples is not None)
_CHOICE = Need(
    "--from_rollouts or --rejection_samples, samples to choose among",
    lambda config: config.from_rollouts is not None or config.rejection_samples is not None,
)
_SCORES_NOTHING = Conflict(
    "is about scoring the samples of --rejection_samples, and nothing else here; --from_rollouts takes the totals of "
    "the log (`rlseq reward score SPEC --rollouts F --output G` writes others)",
    lambda config: config.rejection_samples is None,
)


@dataclass
class RejectionArguments(Settings):
    """Rejection sampling: references replaced by the model's own samples that scored best."""

    _argument_group_name = "rejection sampling (rlseq)"

    from_rollouts: list[str] | None = setting(
        None,
        "Take samples and their totals from these run directories or jsonl files.",
        conflicts=(
            Conflict(
                "takes samples that exist, --rejection_samples generates new ones: give one of them",
                lambda config: config.rejection_samples is not None,
            ),
            Conflict("names nothing; give run directories or jsonl files", lambda config: not config.from_rollouts),
        ),
    )
    rejection_samples: int | None = setting(
        None,
        "Sample N completions per prompt from model_name_or_path, and score them with reward_funcs.",
        range=at_least(1),
        conflicts=Conflict(
            "needs --reward_funcs (`rlseq reward list` shows the bundled ones)", lambda config: not config.reward_funcs
        ),
    )
    reward_funcs: list[str | dict] | None = as_declared(
        RewardArguments,
        "reward_funcs",
        help="Rewards that score the samples, named as for recipes/grpo.py.",
        conflicts=_SCORES_NOTHING,
    )
    reward_weights: list[float] | None = as_declared(WeightedArguments, "reward_weights", conflicts=_SCORES_NOTHING)
    max_error_rate: float = as_declared(
        RewardArguments,
        "max_error_rate",
        help="Stop when a reward fails on more than this share of the samples that are scored together.",
        needs=_SAMPLES,
    )
    temperature: float = setting(1.0, "Sampling temperature.", range=FINITE_ABOVE_0, needs=_SAMPLES)
    max_new_tokens: int = as_declared(
        EvaluateArguments,
        "max_new_tokens",
        help="Longest sample, in tokens; a sample that is cut at this length is not kept.",
        needs=_SAMPLES,
    )
    stop_strings: list[str] | None = as_declared(
        EvaluateArguments,
        "stop_strings",
        help="Texts that end a sample; its text ends before the one met, and is trained with the end token behind it.",
        needs=_SAMPLES,
    )
    think_end: str | None = as_declared(
        EvaluateArguments,
        "think_end",
        help="Text that ends the thought in a sample, e.g. </think>: rewards may ask for `thought` (the text before "
        "it) and `answer` (after it).",
        needs=_SAMPLES,
    )
    rejection_keep: int = setting(
        1,
        "Keep the N distinct completions per prompt with the highest total reward.",
        range=at_least(1),
        needs=_CHOICE,
    )
    min_reward: float | None = setting(
        None, "Keep only completions whose total reward is at least this.", needs=_CHOICE
    )

    @property
    def active(self) -> bool:
        """Whether training is on samples instead of references."""
        return self.from_rollouts is not None or self.rejection_samples is not None
