"""The settings of the recipes, as dataclasses that `RecipeParser` reads from YAML and flags.

TRL's own fields keep TRL's names and meaning. Where a default differs from TRL's, it differs here, in
`DefaultsMixin` and the two config classes below it, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import trl

from rlseq.errors import ConfigError


def bf16_supported() -> bool:
    """Whether this machine's accelerator computes in bfloat16 (a CPU is left in float32)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _default(value: Any, help: str) -> Any:
    return field(default=value, metadata={"help": help})


@dataclass
class DataArguments:
    """Data: where the prompts and references come from."""

    _argument_group_name = "data (rlseq)"

    dataset_name: str | None = _default(
        None, "Task module (path/to/task.py), local json/jsonl/csv/parquet file or folder, or hub id."
    )
    dataset_config: str | None = _default(None, "Configuration name of a hub data set.")
    train_split: str = _default("train", "Split to train on.")
    eval_split: str = _default("validation", "Split to evaluate on; test is touched only when named here.")
    prompt_column: str = _default("prompt", "Column of the prompt: text or chat messages.")
    reference_column: str = _default("references", "Column of the right answer: a text or a list of texts.")
    prompt_template: str | None = _default(
        None,
        "Jinja template over a row's columns that makes the prompt, e.g. \"{{ word | list | join(' ') }} = \".",
    )
    reference_template: str | None = _default(None, "Jinja template over a row's columns that makes the reference.")
    merge_references: bool = _default(False, "Make rows with equal prompts one row with all their references.")
    train_rows: int | None = _default(None, "Use only the first so many rows of the training split.")
    eval_rows: int | None = _default(None, "Use only the first so many rows of the evaluation split.")

    def prompt_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.build_prompts` that these settings stand for."""
        return {
            "prompt_column": self.prompt_column,
            "reference_column": self.reference_column,
            "prompt_template": self.prompt_template,
            "reference_template": self.reference_template,
            "merge_references": self.merge_references,
        }


@dataclass
class RewardArguments:
    """Rewards: what is optimised (their weights: --reward_weights)."""

    _argument_group_name = "rewards (rlseq)"

    reward_funcs: list[str | dict] | None = field(
        default=None,
        metadata={
            "help": "Rewards: bundled names, path/to/file.py:function or package.module:function. In YAML an entry may "
            "also be a mapping {func, weight, kwargs, timeout, on_error, ...}."
        },
    )
    max_error_rate: float = _default(
        0.05, "Stop when a reward fails (error, timeout, invalid) on more than this share of a step's completions."
    )


@dataclass
class EvaluationArguments:
    """Evaluation: likelihood against generation, at the end of a run or of any checkpoints."""

    _argument_group_name = "evaluation (rlseq)"

    evaluate: bool = _default(True, "Evaluate the start against the result when training ends.")
    strategies: list[str] = field(
        default_factory=lambda: ["greedy", "sample", "beam"],
        metadata={"help": "Decoding strategies: greedy, sample, sample:temperature=0.7, beam, beam:width=10."},
    )
    samples_per_row: int = _default(4, "Completions drawn a row under strategies that sample.")
    eval_batch_size: int = _default(256, "Rows decoded together in evaluation (completions do not depend on it).")
    eval_seed: int = _default(0, "Seed of the evaluation's sampling and of its bootstrap.")
    resamples: int = _default(10_000, "Bootstrap resamples of rows, and sign flips of the permutation test.")
    primary: str | None = _default(None, "The one comparison with a claim, metric:strategy, e.g. wer:greedy.")
    primary_against: str | None = _default(None, "The start's strategy in it, if another: its best decoding.")

    def contrast_values(self, max_new_tokens: int) -> dict[str, Any]:
        """These settings by the names of `rlseq.evaluation.contrast.ContrastSettings`."""
        return {
            "strategies": tuple(self.strategies),
            "samples_per_row": self.samples_per_row,
            "max_new_tokens": max_new_tokens,
            "seed": self.eval_seed,
            "resamples": self.resamples,
            "batch_rows": self.eval_batch_size,
            "primary": self.primary,
            "primary_against": self.primary_against,
        }


@dataclass
class EvaluateArguments:
    """What recipes/evaluate.py evaluates."""

    _argument_group_name = "models (rlseq)"

    models: list[str] | None = field(
        default=None, metadata={"help": "Checkpoints as NAME=PATH; the first is the baseline."}
    )
    output_dir: str = _default("runs/contrast", "Where results.json and report.html go.")
    max_new_tokens: int = _default(256, "Longest completion, in tokens.")


@dataclass
class RunArguments:
    """The run directory and the processor."""

    _argument_group_name = "run (rlseq)"

    overwrite_output_dir: bool = _default(
        False, "If output_dir holds an earlier run, move that aside (to NAME.previous-DATE) and start anew."
    )
    num_cpu_threads: int | None = _default(
        None, "Threads of a process that trains on the CPU; default: the cores over the processes on this machine."
    )


@dataclass
class ModelArguments(trl.ModelConfig):
    """The model: TRL's ModelConfig, in float32 unless told otherwise."""

    _argument_group_name = "model (TRL's ModelConfig)"


@dataclass
class DefaultsMixin:
    """Defaults that differ from TRL's, for every recipe.

    * bf16: only where the accelerator computes in it (TRL: always, which raises on a machine without one).
    * gradient_checkpointing: off without an accelerator, where it only costs time.
    * use_cpu: on without an accelerator (TRL: off, and several processes then come up as one each).
    * logging_nan_inf_filter: off, so that a NaN loss is seen.
    * report_to: none, since metrics.jsonl holds every number; name a tracker to use it.
    * logging_steps 1 and save_only_model off, so that any step can be looked at and resumed from.
    """

    bf16: bool | None = _default(None, "bf16 mixed precision; default: where the accelerator supports it.")
    gradient_checkpointing: bool | None = _default(None, "Recompute activations; default: on accelerators only.")
    use_cpu: bool | None = _default(None, "Train on the CPU; default: where there is no accelerator.")
    logging_nan_inf_filter: bool = _default(False, "Replace NaN and infinite losses in the log (TRL: on).")
    report_to: str | list[str] = field(default="none", metadata={"help": "Trackers to report to, or none."})
    logging_steps: float = _default(1, "Log every so many steps.")
    output_dir: str | None = _default("runs/run", "The run directory.")

    def __post_init__(self) -> None:
        if self.use_cpu is None:
            self.use_cpu = not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = bf16_supported() and not self.fp16
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = torch.accelerator.is_available()
        if self.activation_checkpointing is None:  # transformers' new name of the same setting
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()


@dataclass
class SFTConfig(DefaultsMixin, trl.SFTConfig):
    """TRL's SFTConfig with rlseq's defaults: the loss is on the completion only."""

    _argument_group_name = "training (rlseq)"

    completion_only_loss: bool | None = _default(True, "Loss on the completion only.")
    early_stopping_patience: int | None = _default(
        None, "Stop when validation NLL has not fallen for so many evaluations, and keep the best checkpoint."
    )


@dataclass
class NewModelArguments:
    """A model from scratch, instead of --model_name_or_path."""

    _argument_group_name = "new model (rlseq)"

    new_model: dict | str | None = _default(
        None, "Config of a new, randomly initialised model, e.g. {model_type: llama, hidden_size: 128, ...}."
    )
    new_tokenizer: str | None = _default(
        None, "Tokenizer of the new model: a path or hub id, or path/to/file.py:function that builds it."
    )


@dataclass
class GRPOConfig(DefaultsMixin, trl.GRPOConfig):
    """TRL's GRPOConfig with rlseq's defaults.

    * disable_dropout: on, else the ratio of a recomputed log-prob to the sampled one is not 1 on policy.
    * remove_unused_columns: off, rewards read them.
    * use_liger_kernel, log_completions: off as in TRL; rollouts/ holds every completion.
    """

    _argument_group_name = "training (rlseq)"

    disable_dropout: bool = _default(True, "Disable dropout in the model.")
    remove_unused_columns: bool | None = _default(False, "Keep columns: rewards read them.")
    reference_loss_coef: float = _default(
        0.0, "Weight of the teacher-forced cross-entropy on the references, mixed into the loss of each step."
    )
    ema_decay: float = _default(
        0.0, "Keep an exponential moving average of the weights with this decay as the result; 0: the last weights."
    )
    start_weight: float = _default(
        0.0, "Share of the weights that training started from in the result (needs ema_decay); 0: none."
    )
    pack_updates: bool = _default(
        True, "Compute a prompt once for all its completions in the update (exact; off where a model cannot)."
    )
    rlseq_sampler: bool = _default(
        True, "Draw rollouts by rlseq.sampler (shared prefill, counter-based noise); off: TRL's own generate."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_warped_training(self)
        if self.start_weight and not self.ema_decay:
            raise ConfigError("start_weight mixes the start into the averaged weights; it needs ema_decay above 0")


def refuse_warped_training(config: trl.GRPOConfig) -> None:
    """Refuse truncated sampling in training: a token that leaves the nucleus has log-prob −∞ and no gradient.

    Raises:
        ConfigError: top_k, top_p, min_p or repetition_penalty is set.
    """
    set_to = {
        "top_k": config.top_k not in (None, 0, -1),
        "top_p": config.top_p not in (None, 1.0),
        "min_p": config.min_p not in (None, 0.0),
        "repetition_penalty": config.repetition_penalty not in (None, 1.0),
    }
    wrong = [name for name, is_set in set_to.items() if is_set]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} cannot be used in training: the log-probs that are optimised would not be those of "
            "the distribution sampled from. Leave it out (temperature is supported), or use it in evaluation "
            "(--strategies)."
        )
