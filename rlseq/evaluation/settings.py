"""What an evaluation measures, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlseq.config.arguments import STUDIES, EvaluateArguments, EvaluationArguments
from rlseq.config.fields import as_declared
from rlseq.engine.model.quantization import quantization_fields
from rlseq.engine.strategies import Strategy, Sweep, parse_strategy


@dataclass(frozen=True)
class ContrastSettings:
    """What is measured, and how; part of every result's spec. Defaults and ranges are those of the flags.

    Attributes:
        strategies: decoding strategies as `rlseq.engine.strategies.parse_strategy` reads them.
        samples_per_row: completions per row under strategies that sample.
        max_new_tokens: completions are cut after this many tokens.
        stop_strings: texts that end a completion, as of `rlseq.engine.sampling.sample`; None: none.
        think_end: the text that ends a thought in a completion: thoughts are measured, and so is how likely references
            are behind them (rlseq.evaluation.measure.thoughts); None: completions have none.
        group_column: the column by whose values the metrics are reported too
            (rlseq.evaluation.report.groups); None: none.
        seed: of the sampling and of the bootstrap.
        resamples: bootstrap resamples, and sign flips of the permutation test.
        eval_batch_size: rows decoded together; changes memory and time only.
        max_kv_gb: a budget for the KV cache of decoding, in gigabytes; changes memory and time only. None: none.
        cluster_column: column that names each row's cluster
            (rlseq.evaluation.results.clusters); None: rows are independent.
        right_answers: whether a row's references are all its right answers (`listed`), or not (`open`); `auto`: as
            `rlseq.evaluation.right_answers` measures it.
        primary: the one comparison with a claim, `metric:strategy`; the rest are exploratory.
        primary_against: strategy of the first model that the primary comparison is made with, if another.
        studies: what else is measured, by the names of `rlseq.evaluation.studies.table.STUDIES`.
        study_rows: studies that decode or score again run on the first N rows; None: on all.
        coverage_samples: completions per row in the study of coverage.
        temperatures: those of the study of sharpening.
        map_rows: the study map searches the first N rows; None: the first `study_rows`.
        map_max_nodes: prefixes that it expands per row at most.
        prefix_lengths: tokens of the prefixes that the study exposure_bias continues.
        tune_split: the split on whose rows sweeps are tuned (rlseq.evaluation.tune_decoding), by name; None: nothing
            can be tuned.
        tune_rows: only its first N rows; None: all.
        likelihood_dataset: text without prompts whose bits per byte are measured
            (rlseq.evaluation.measure.documents); its configuration, split, column and number of rows (None: all).
        likelihood_stride: tokens by which windows over it slide; None: half the context.
        likelihood_context: longest window, in tokens; None: the model's.
        dtype: of the models' weights: float32, bfloat16, float16, or auto (each checkpoint's own).
        allow_missing_weights: whether weights that a checkpoint lacks may be random.
        quantization: fields of the `BitsAndBytesConfig` by which models (adapters' bases) are loaded, in JSON's types;
            None: as they were saved.
    """

    strategies: tuple[str, ...] = as_declared(EvaluationArguments, "strategies")
    samples_per_row: int = as_declared(EvaluationArguments, "samples_per_row")
    max_new_tokens: int = as_declared(EvaluateArguments, "max_new_tokens")
    stop_strings: tuple[str, ...] | None = as_declared(EvaluateArguments, "stop_strings")
    think_end: str | None = as_declared(EvaluateArguments, "think_end")
    group_column: str | None = as_declared(EvaluateArguments, "group_column")
    seed: int = as_declared(EvaluateArguments, "seed")
    resamples: int = as_declared(EvaluationArguments, "resamples")
    eval_batch_size: int = as_declared(EvaluationArguments, "eval_batch_size")
    max_kv_gb: float | None = as_declared(EvaluationArguments, "max_kv_gb")
    cluster_column: str | None = as_declared(EvaluationArguments, "cluster_column")
    right_answers: str = as_declared(EvaluationArguments, "right_answers")
    primary: str | None = as_declared(EvaluationArguments, "primary")
    primary_against: str | None = as_declared(EvaluationArguments, "primary_against")
    studies: tuple[str, ...] = as_declared(EvaluationArguments, "studies", default=())
    study_rows: int | None = as_declared(EvaluationArguments, "study_rows")
    coverage_samples: int = as_declared(EvaluationArguments, "coverage_samples")
    temperatures: tuple[float, ...] = as_declared(EvaluationArguments, "temperatures")
    map_rows: int | None = as_declared(EvaluationArguments, "map_rows")
    map_max_nodes: int = as_declared(EvaluationArguments, "map_max_nodes")
    prefix_lengths: tuple[int, ...] = as_declared(EvaluationArguments, "prefix_lengths")
    tune_split: str | None = as_declared(EvaluateArguments, "tune_split", default=None)
    tune_rows: int | None = as_declared(EvaluateArguments, "tune_rows")
    likelihood_dataset: str | None = as_declared(EvaluationArguments, "likelihood_dataset")
    likelihood_config: str | None = as_declared(EvaluationArguments, "likelihood_config")
    likelihood_split: str | None = as_declared(EvaluationArguments, "likelihood_split")
    likelihood_column: str = as_declared(EvaluationArguments, "likelihood_column")
    likelihood_rows: int | None = as_declared(EvaluationArguments, "likelihood_rows")
    likelihood_stride: int | None = as_declared(EvaluationArguments, "likelihood_stride")
    likelihood_context: int | None = as_declared(EvaluationArguments, "likelihood_context")
    dtype: str = as_declared(EvaluateArguments, "dtype")
    allow_missing_weights: bool = as_declared(EvaluateArguments, "allow_missing_weights")
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, *arguments: Any, **more: Any) -> ContrastSettings:
        """The settings that these dataclasses of `rlseq.config.arguments` hold.

        Args:
            more: settings by name, in place of theirs.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        found = {f.name: getattr(part, f.name) for part in arguments for f in dataclasses.fields(part)} | more
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name in names
        }
        studies = values.get("studies", ())
        values["studies"] = STUDIES if studies == ("all",) else tuple(name for name in studies if name != "none")
        if isinstance(name := values.get("quantization"), str):  # as a flag has it
            values["quantization"] = quantization_fields(name, values["dtype"])
        return cls(**values)

    def parsed(self) -> list[Strategy]:
        """The strategies as objects."""
        return [parse_strategy(text) for text in self.strategies]

    def reproducibility_fields(self) -> dict[str, Any]:
        """The settings that decide numbers, by name, in JSON's types: those of memory and time alone are left out."""
        shown = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        without = ["eval_batch_size", "max_kv_gb"]
        if not any(isinstance(strategy, Sweep) for strategy in self.parsed()):
            without += ["tune_split", "tune_rows"]
        optional = (
            "stop_strings",
            "think_end",
            "group_column",
            "allow_missing_weights",
            "quantization",
            "cluster_column",
        )
        without += [name for name in optional if not getattr(self, name)]
        without += ["right_answers"] if self.right_answers == "auto" else []
        return {name: value for name, value in shown.items() if name not in without}
