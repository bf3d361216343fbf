"""What an evaluation measures, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlseq.engine.strategies import Strategy, Sweep, parse_strategy


@dataclass(frozen=True)
class ContrastSettings:
    """What is measured, and how; part of every result's signature.

    Attributes:
        strategies: decoding strategies as `rlseq.engine.strategies.parse_strategy` reads them.
        samples_per_row: completions drawn a row under strategies that sample.
        max_new_tokens: completions are cut after this many tokens.
        seed: of the sampling and of the bootstrap.
        resamples: bootstrap resamples, and sign flips of the permutation test.
        batch_rows: rows decoded together; changes memory and time only.
        max_kv_gb: a budget for the KV cache of decoding, in gigabytes; changes memory and time only. None: none.
        primary: the one comparison with a claim, `metric:strategy`; the rest are exploratory.
        primary_against: strategy of the first model that the primary comparison is made with, if another.
        exact_map_rows: exact search runs on the first N rows; None: on all.
        studies: what else is measured, by the names of `rlseq.evaluation.studies.table.STUDIES`.
        study_rows: studies that decode or score again run on the first N rows; None: on all.
        coverage_samples: completions a row that the study of coverage draws.
        temperatures: those of the study of sharpening.
        prefix_lengths: tokens of the prefixes that the study of prefixes continues.
        choose_split: the split on whose rows settings with alternatives are chosen (rlseq.evaluation.tune_decoding),
            by name; None: nothing can be chosen.
        choose_rows: only its first N rows; None: all.
        likelihood_dataset: text without prompts whose bits per byte are measured
            (rlseq.evaluation.measure.documents); its configuration, split, column and number of rows (None: all).
        likelihood_stride: tokens by which windows over it slide; None: half the context.
        likelihood_context: longest window, in tokens; None: the model's.
        dtype: of the models' weights: float32, bfloat16, float16, or auto (each checkpoint's own).
        allow_missing_weights: whether weights that a checkpoint lacks may be random.
        quantization: fields of the `BitsAndBytesConfig` by which models (adapters' bases) are loaded, in JSON's types;
            None: as they were saved.
    """

    strategies: tuple[str, ...] = ("greedy", "sample", "beam")
    samples_per_row: int = 4
    max_new_tokens: int = 256
    seed: int = 0
    resamples: int = 10_000
    batch_rows: int = 256
    max_kv_gb: float | None = None
    primary: str | None = None
    primary_against: str | None = None
    exact_map_rows: int | None = None
    studies: tuple[str, ...] = ()
    study_rows: int | None = 500
    coverage_samples: int = 32
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
    prefix_lengths: tuple[int, ...] = (1, 2, 4, 8)
    choose_split: str | None = None
    choose_rows: int | None = 500
    likelihood_dataset: str | None = None
    likelihood_config: str | None = None
    likelihood_split: str | None = None
    likelihood_column: str = "text"
    likelihood_rows: int | None = None
    likelihood_stride: int | None = None
    likelihood_context: int | None = None
    dtype: str = "float32"
    allow_missing_weights: bool = False
    quantization: Mapping[str, Any] | None = None

    def parsed(self) -> list[Strategy]:
        """The strategies as objects."""
        return [parse_strategy(text) for text in self.strategies]

    def decisive(self) -> dict[str, Any]:
        """The settings that decide numbers, by name, in JSON's types: those of memory and time alone are left out."""
        shown = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        without = ["batch_rows", "max_kv_gb"]
        if not any(isinstance(strategy, Sweep) for strategy in self.parsed()):
            without += ["choose_split", "choose_rows"]
        without += [name for name in ("allow_missing_weights", "quantization") if not getattr(self, name)]
        return {name: value for name, value in shown.items() if name not in without}
