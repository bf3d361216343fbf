"""The metrics of rlseq itself: of what statistics each is, what it is called and means, and which way is better.

Those of a suite's rewards are made beside them (`rlseq.evaluation.aggregate.quality_metrics`). All that is said of a
metric is said by its `Metric`: results.json keeps it, and tables and figures read it there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.evaluation.statistics import CHANCE, COMPLETION, LIKELIHOOD, THOUGHT, Pair, Statistic
from rlseq.evaluation.stats.estimators import ExpRatioOfSums, RatioOfSums

PASS_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Metric:
    """A number for a set of rows: an aggregate over per-row statistics, and how to read it.

    Attributes:
        name: in results.json.
        label: in tables and figures.
        higher_is_better: None: neither.
        percent: whether it is a share.
        kind: mean, accuracy, reward or corpus.
        table: of the report: likelihood, curve (over k), quality, shape (of completions) or chance.
        counted: completions that have a value, and all.
        sampled: whether it is of a distribution that is sampled from; strategies that search or choose have none.
        needs_references: whether only rows with references have it.
        needs_all_answers: whether it means what its label says only where a row's references are all its right answers.
        fault: whether it is a share of what goes wrong: the terminal leaves it out where that is 0 everywhere.
        place: keys in a block of results.json.
    """

    name: str
    label: str
    statistics: tuple[Statistic, ...]
    description: str
    higher_is_better: bool | None
    aggregate: Any = RatioOfSums()
    percent: bool = False
    kind: str = "mean"
    table: str = "quality"
    counted: Pair | None = None
    sampled: bool = False
    needs_references: bool = False
    needs_all_answers: bool = False
    fault: bool = False
    place: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", self.place or (self.name,))

    @property
    def unit(self) -> float:
        """One point: 0.01 of a rate, reward or likelihood; 1 of what has another scale (tokens, corpus chrF)."""
        return 0.01 if self.percent or self.kind == "reward" or self.table == "likelihood" else 1.0

    def as_json(self) -> dict[str, Any]:
        """What results.json says of it."""
        fields = ("higher_is_better", "kind", "label", "description", "percent", "table", "fault")
        return {name: getattr(self, name) for name in fields}


@dataclass(frozen=True)
class _BitsPerByte(RatioOfSums):
    """Σ nats / (ln 2 · Σ bytes)."""

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return super().from_sums(sums) / np.log(2)


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


NLL = Metric(
    "nll_per_token",
    "NLL per token",
    Pair(LIKELIHOOD("nll"), LIKELIHOOD("tokens")),
    "mean next-token loss over the references, stop included (nats)",
    False,
    table="likelihood",
)
EXPECTED_ACCURACY = Metric(
    "expected_accuracy",
    "Expected accuracy",
    Pair(LIKELIHOOD("expected_accuracy"), LIKELIHOOD("rows")),
    "exact probability that one sample is one of the references: mean Σ exp(log-prob) under the distribution sampled "
    "from (under teacher forcing, that of ancestral sampling)",
    True,
    percent=True,
    table="likelihood",
    needs_all_answers=True,
)
PASS_AT_K = "exact_pass_at_k"  # of which there is a metric for each k
PASS_METRICS = {
    k: Metric(
        f"{PASS_AT_K}.{k}",
        f"Exact pass@{k}",
        Pair(LIKELIHOOD("pass_at", k), LIKELIHOOD("rows")),
        f"chance that {k} samples hold a right one",
        True,
        percent=True,
        table="curve",
        needs_all_answers=True,
        place=(PASS_AT_K, str(k)),
    )
    for k in PASS_AT
}
LIKELIHOOD_METRICS = _by_name(
    NLL,
    Metric(
        "perplexity",
        "Perplexity",
        NLL.statistics,
        "exp of the NLL per token",
        False,
        ExpRatioOfSums(),
        table="likelihood",
    ),
    Metric(
        "bits_per_byte",
        "Bits per byte",
        Pair(LIKELIHOOD("nll"), LIKELIHOOD("bytes")),
        "bits to code a byte of reference text; free of the tokenizer",
        False,
        _BitsPerByte(),
        table="likelihood",
    ),
    Metric(
        "sequence_logprob",
        "Sequence log-prob",
        Pair(LIKELIHOOD("sequence_logprob"), LIKELIHOOD("references")),
        "mean log-prob of a whole reference (nats)",
        True,
        table="likelihood",
    ),
    EXPECTED_ACCURACY,
    Metric(
        "token_accuracy",
        "Token accuracy",
        Pair(LIKELIHOOD("correct_tokens"), LIKELIHOOD("tokens")),
        "share of reference tokens that are the argmax given the true tokens before them; ties go to the lowest id",
        True,
        percent=True,
        table="likelihood",
    ),
    Metric(
        "teacher_forced_exact_match",
        "Teacher-forced exact match",
        Pair(LIKELIHOOD("matched_rows"), LIKELIHOOD("rows")),
        "share of rows with a reference whose every token is the argmax: what greedy decoding reproduces, if not cut",
        True,
        percent=True,
        table="likelihood",
        needs_all_answers=True,
    ),
    *PASS_METRICS.values(),
)

EXACT_MATCH = Metric(
    "exact_match",
    "Exact match",
    Pair(COMPLETION("exact_match"), COMPLETION("with_references")),
    "share of completions whose tokens are those of a reference",
    True,
    percent=True,
    kind="accuracy",
    needs_references=True,
    needs_all_answers=True,
)
LOGPROB = Metric(
    "logprob",
    "Sequence log-prob",
    Pair(COMPLETION("logprob"), COMPLETION("samples")),
    "mean log-prob of the whole completion under its strategy (nats)",
    None,
    table="shape",
)
TOKEN_LOGPROB = Metric(
    "logprob_per_token",
    "Log-prob per token",
    Pair(COMPLETION("logprob"), COMPLETION("length")),
    "log-prob of all completions under their strategy over their tokens, stops included (nats)",
    None,
    table="shape",
)
# What is measured of any completion; `rlseq.evaluation.names` keeps these names from rewards and corpus metrics.
COMPLETION_METRICS = _by_name(
    EXACT_MATCH,
    Metric(
        "length",
        "Length",
        Pair(COMPLETION("length"), COMPLETION("samples")),
        "mean tokens, stop included",
        None,
        table="shape",
    ),
    Metric(
        "truncated",
        "Truncated",
        Pair(COMPLETION("truncated"), COMPLETION("samples")),
        "share of completions cut at the limit",
        False,
        percent=True,
        table="shape",
        fault=True,
    ),
    LOGPROB,
    TOKEN_LOGPROB,
    Metric(
        "length_ratio",
        "Length ratio",
        Pair(COMPLETION("compared_length"), COMPLETION("closest_length")),
        "tokens of the completions over those of the references closest to them in length, stop included",
        None,
        table="shape",
        needs_references=True,
    ),
    Metric(
        "repetition",
        "Repetition",
        Pair(COMPLETION("repeated_ngrams"), COMPLETION("ngrams")),
        "share of the 4-grams of tokens that stood in the same completion before: Σ (all − distinct) / Σ all",
        None,
        percent=True,
        table="shape",
        fault=True,
    ),
)

# Exact chances, from teacher forcing under the distribution that a strategy samples from.
SAMPLED_ACCURACY = dataclasses.replace(
    EXPECTED_ACCURACY,
    statistics=Pair(CHANCE("expected_accuracy"), CHANCE("reference_rows")),
    sampled=True,
    needs_references=True,
)
UNREACHABLE = (
    Metric(
        "unreachable",
        "Unreachable rows",
        Pair(CHANCE("unreachable"), CHANCE("reference_rows")),
        "share of rows none of whose references the strategy can ever generate (truncated away, or over the limit)",
        False,
        percent=True,
        table="chance",
        sampled=True,
        needs_references=True,
        needs_all_answers=True,
    ),
    Metric(
        "unreachable_references",
        "Unreachable references",
        Pair(CHANCE("unreachable_references"), CHANCE("references")),
        "share of references that the strategy can never generate (truncated away, or over the limit)",
        False,
        percent=True,
        table="chance",
        sampled=True,
        needs_references=True,
        needs_all_answers=True,
    ),
)
CHANCE_METRICS = _by_name(SAMPLED_ACCURACY, *UNREACHABLE)

# What is measured of thoughts, where a text ends them (--think_end).
_FORCED = Pair(THOUGHT("forced"), THOUGHT("with_references"))
THOUGHT_METRICS = _by_name(
    Metric(
        "sequence_logprob_after_thought",
        "Reference log-prob after own thought",
        Pair(THOUGHT("reference_logprob"), THOUGHT("references")),
        "mean log-prob of a whole reference behind a thought that the model generated (nats)",
        True,
        counted=_FORCED,
        needs_references=True,
    ),
    Metric(
        "nll_per_token_after_thought",
        "Reference NLL per token after own thought",
        Pair(THOUGHT("reference_nll"), THOUGHT("reference_tokens")),
        "mean next-token loss over the references behind thoughts that the model generated, stop included (nats)",
        False,
        counted=_FORCED,
        needs_references=True,
    ),
    Metric(
        "thought_length",
        "Thought length",
        Pair(THOUGHT("length"), THOUGHT("samples")),
        "mean tokens of a thought, its end included; of one that was never closed, all of the completion",
        None,
        table="shape",
    ),
    Metric(
        "thought_unclosed",
        "Thoughts never closed",
        Pair(THOUGHT("unclosed"), THOUGHT("samples")),
        "share of completions whose thought was never closed, which have no answer",
        False,
        percent=True,
        table="shape",
        fault=True,
    ),
)

BUILT_IN = LIKELIHOOD_METRICS | COMPLETION_METRICS | THOUGHT_METRICS | CHANCE_METRICS
