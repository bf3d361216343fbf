"""From per-row statistics to numbers: which metrics there are, their values with intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.decoding import Greedy, parse_strategy
from rlseq.evaluation.measure import ModelStatistics
from rlseq.evaluation.modes import EMPTY, MODE_EMPTY, mode_results, proven_rows
from rlseq.evaluation.names import Names
from rlseq.evaluation.references import OF_ANSWERS, PASS_AT, agreement, drawn_and_exact
from rlseq.evaluation.seeds import claim_of
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import (
    CHANCE,
    COMPLETION,
    CORPUS,
    LIKELIHOOD,
    REWARD,
    Pair,
    RowStatistics,
    Statistic,
    rows_matrix,
)
from rlseq.evaluation.stats import ExpRatioOfSums, RatioOfSums, bootstrap_many, paired_bootstrap_many
from rlseq.scoring import Ratio, RewardSuite
from rlseq.scoring.corpus import value_of


@dataclass(frozen=True)
class Metric:
    """A number for a set of rows: an aggregate over per-row statistics, and how to read it."""

    statistics: tuple[Statistic, ...]
    aggregate: Any
    higher_is_better: bool | None
    description: str
    percent: bool = False
    kind: str = "mean"
    label: str = ""  # in tables and reports; of rlseq's own metrics `rlseq.evaluation.metrics` knows it
    counted: Pair | None = None  # completions that have a value, and all
    sampled: bool = False  # of a distribution that is sampled from: strategies that search or choose have none


@dataclass(frozen=True)
class _CorpusAggregate:
    """A reward's corpus metric as an aggregate of a matrix (n, K + 1): its statistics, and a count of completions."""

    name: str
    metric: Any

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        by_name = {name: sums[..., i] for i, name in enumerate(self.metric.statistics)}
        with np.errstate(divide="ignore", invalid="ignore"):
            value = value_of(self.name, self.metric, by_name)
        return np.where(sums[..., -1] > 0, value, np.nan)


@dataclass(frozen=True)
class _BitsPerByte(RatioOfSums):
    """Σ nats / (ln 2 · Σ bytes)."""

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return super().from_sums(sums) / np.log(2)


LIKELIHOOD_METRICS = {
    "nll_per_token": Metric(
        Pair(LIKELIHOOD("nll"), LIKELIHOOD("tokens")),
        RatioOfSums(),
        False,
        "mean next-token loss over the references, stop included (nats)",
    ),
    "perplexity": Metric(
        Pair(LIKELIHOOD("nll"), LIKELIHOOD("tokens")), ExpRatioOfSums(), False, "exp of the NLL per token"
    ),
    "bits_per_byte": Metric(
        Pair(LIKELIHOOD("nll"), LIKELIHOOD("bytes")),
        _BitsPerByte(),
        False,
        "bits to code a byte of reference text; free of the tokenizer",
    ),
    "sequence_logprob": Metric(
        Pair(LIKELIHOOD("sequence_logprob"), LIKELIHOOD("references")),
        RatioOfSums(),
        True,
        "mean log-prob of a whole reference (nats)",
    ),
    "exact_accuracy": Metric(
        Pair(LIKELIHOOD("p_correct"), LIKELIHOOD("rows")),
        RatioOfSums(),
        True,
        "chance that one ancestral sample is one of the references: mean Σ exp(log-prob), no sampling noise",
        percent=True,
    ),
    "argmax_accuracy": Metric(
        Pair(LIKELIHOOD("argmax_tokens"), LIKELIHOOD("tokens")),
        RatioOfSums(),
        True,
        "share of reference tokens that are the argmax given the true tokens before them; ties go to the lowest id",
        percent=True,
    ),
    "argmax_match": Metric(
        Pair(LIKELIHOOD("argmax_rows"), LIKELIHOOD("rows")),
        RatioOfSums(),
        True,
        "share of rows with a reference whose every token is the argmax: what greedy decoding reproduces, if not cut",
        percent=True,
    ),
    **{
        f"exact_pass_at_k.{k}": Metric(
            Pair(LIKELIHOOD("pass_at", k), LIKELIHOOD("rows")),
            RatioOfSums(),
            True,
            f"chance that {k} samples hold a right one",
            percent=True,
        )
        for k in PASS_AT
    },
}

# What is measured of any completion; `rlseq.evaluation.names` keeps these names from rewards and corpus metrics.
COMPLETION_METRICS = {
    "exact_match": Metric(
        Pair(COMPLETION("exact_match"), COMPLETION("with_references")),
        RatioOfSums(),
        True,
        "share of completions whose tokens are those of a reference",
        percent=True,
        kind="accuracy",
    ),
    "length": Metric(
        Pair(COMPLETION("length"), COMPLETION("samples")), RatioOfSums(), None, "mean tokens, stop included"
    ),
    "truncated": Metric(
        Pair(COMPLETION("truncated"), COMPLETION("samples")),
        RatioOfSums(),
        False,
        "share of completions cut at the limit",
        percent=True,
    ),
    "logprob": Metric(
        Pair(COMPLETION("logprob"), COMPLETION("samples")),
        RatioOfSums(),
        None,
        "mean log-prob of a completion under its own strategy (nats)",
    ),
    "length_ratio": Metric(
        Pair(COMPLETION("compared_length"), COMPLETION("closest_length")),
        RatioOfSums(),
        None,
        "tokens of the completions over those of the references closest to them in length, stop included",
    ),
    "repetition": Metric(
        Pair(COMPLETION("repeated_ngrams"), COMPLETION("ngrams")),
        RatioOfSums(),
        None,
        "share of the 4-grams of tokens that stood in the same completion before: Σ (all − distinct) / Σ all",
        percent=True,
    ),
}

# Exact chances, from teacher forcing under the distribution that a strategy samples from.
GENERATION_METRICS = {
    "p_reference": Metric(
        Pair(CHANCE("p_reference"), CHANCE("reference_rows")),
        RatioOfSums(),
        True,
        "exact chance that the strategy generates one of the references: mean Σ exp(log-prob) under its distribution",
        percent=True,
        kind="accuracy",
        sampled=True,
    ),
    "unreachable": Metric(
        Pair(CHANCE("unreachable"), CHANCE("reference_rows")),
        RatioOfSums(),
        False,
        "share of rows none of whose references the strategy can ever generate (truncated away, or over the limit)",
        percent=True,
        sampled=True,
    ),
    "unreachable_references": Metric(
        Pair(CHANCE("unreachable_references"), CHANCE("references")),
        RatioOfSums(),
        False,
        "share of references that the strategy can never generate (truncated away, or over the limit)",
        percent=True,
        sampled=True,
    ),
}


def quality_metrics(suite: RewardSuite, *, with_references: bool) -> dict[str, Metric]:
    """The quality metrics: each reward's mean, the corpus aggregates, then what is measured of any completion.

    Without references there is none of `OF_ANSWERS`; `metrics_under` says which of them a strategy has.
    """
    metrics: dict[str, Metric] = {}
    names = Names.of(suite)
    for reward, name in names.rewards.items():
        pair = Pair(REWARD("sum", reward), REWARD("count", reward))
        metrics[name] = Metric(
            pair,
            RatioOfSums(),
            True,
            "mean reward over completions",
            kind="reward",
            label=f"{reward} (reward)",
            counted=Pair(pair.denominator, COMPLETION("samples")),
        )
    for given, name in names.corpus.items():
        corpus, count = suite.corpus[given], CORPUS("count", given)
        metrics[name] = Metric(
            (*(CORPUS("sum", given, key) for key in corpus.statistics), count),
            _CorpusAggregate(given, corpus),
            corpus.higher_is_better,
            corpus.description or f"of the details of reward {corpus.reward}",
            percent=isinstance(corpus, Ratio),  # any other has a scale of its own: corpus chrF goes to 100
            kind="corpus",
            label=corpus.label or given,
            counted=Pair(count, COMPLETION("samples")),
        )
    measured = COMPLETION_METRICS | GENERATION_METRICS
    return metrics | {name: m for name, m in measured.items() if with_references or name not in OF_ANSWERS}


def metrics_under(metrics: Mapping[str, Metric], strategy: str) -> dict[str, Metric]:
    """Those of the metrics that a strategy, named by its signature, has."""
    draws = parse_strategy(strategy).samples
    return {name: metric for name, metric in metrics.items() if draws or not metric.sampled}


def matrix(rows: Sequence[RowStatistics], metric: Any) -> np.ndarray:
    """The statistics of a metric as (R, K); a row that has none of them is zeros."""
    return rows_matrix(rows, metric.statistics)


def coverage(metric: Metric, *parts: Sequence[RowStatistics]) -> dict[str, int]:
    """How many of all completions a number is of, where some have no value: {"completions", "of"}; else nothing.

    Args:
        parts: rows of statistics, of each checkpoint that the number is of.
    """
    if metric.counted is None:
        return {}
    present, every = (round(sum(row.get(name, 0.0) for rows in parts for row in rows)) for name in metric.counted)
    return {"completions": present, "of": every} if present < every else {}


def model_results(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> dict[str, Any]:
    """Each model's value and 95% interval of every metric, in the shape of `models` in results.json."""
    tables: dict[tuple[str, str | None, str], tuple[np.ndarray, Any]] = {}
    for name, statistics in found.items():
        if any(statistics.likelihood):
            for metric_name, metric in LIKELIHOOD_METRICS.items():
                tables[name, None, metric_name] = (matrix(statistics.likelihood, metric), metric.aggregate)
        for strategy, rows in statistics.strategies.items():
            for metric_name, metric in metrics_under(metrics, strategy).items():
                tables[name, strategy, metric_name] = (matrix(rows, metric), metric.aggregate)
    intervals = bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    results: dict[str, Any] = {}
    for (name, strategy, metric_name), interval in intervals.items():
        model = results.setdefault(name, {"path": found[name].path, "likelihood": {}, "strategies": {}})
        place = model["likelihood"] if strategy is None else model["strategies"].setdefault(strategy, {})
        if "." in metric_name and strategy is None:
            metric_name, _, key = metric_name.partition(".")
            place = place.setdefault(metric_name, {})
            metric_name = key
        place[metric_name] = {"value": interval.value, "ci95": list(interval.ci95)}
        if strategy is not None:
            place[metric_name] |= coverage(metrics[metric_name], found[name].strategies[strategy])
    for name, statistics in found.items():
        counts = agreement(statistics.strategies.get(Greedy().signature, []))
        if counts is not None:
            results[name]["greedy_and_teacher_forcing"] = counts
        for strategy, rows in statistics.strategies.items():
            quality = metrics_under(metrics, strategy)
            block = mode_results(rows, quality, seed=settings.seed, resamples=settings.resamples)
            if block is not None:
                results[name]["strategies"][strategy]["modes"] = block
            gap = drawn_and_exact(rows)
            if gap is not None:
                results[name].setdefault("drawn_and_exact", {})[strategy] = gap
    return results


def measured_places(
    first: ModelStatistics, metrics: Mapping[str, Metric], settings: ContrastSettings
) -> Iterator[tuple[str | None, str | None, str, Any]]:
    """What models are compared by: (strategy of a, that of b, metric's name, metric); None is teacher forcing."""
    if any(first.likelihood):
        for name, metric in LIKELIHOOD_METRICS.items():
            yield None, None, name, metric
    for strategy, rows in first.strategies.items():
        for name, metric in metrics_under(metrics, strategy).items():
            yield strategy, strategy, name, metric
        if proven_rows(rows) is not None:
            yield strategy, strategy, EMPTY, MODE_EMPTY
    if settings.primary and settings.primary_against:
        name, _, strategy = settings.primary.partition(":")
        against = parse_strategy(settings.primary_against).signature
        yield against, parse_strategy(strategy).signature, name, metrics[name]


def comparisons(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> list[dict[str, Any]]:
    """Every model against the first: the difference b − a of every metric, and the primary one across strategies.

    A difference that is not defined (nothing was measured on one side) is NaN, as are its interval and p-value.

    Exact search is compared on the rows where it proved the mode, on both sides where both are exact searches; such
    a comparison says on how many `rows`, and the two values there.
    """
    names = list(found)
    pairs: dict[tuple[str, str, str | None, str | None, str], tuple[np.ndarray, np.ndarray, Any]] = {}
    on_proven: dict[tuple[str, str, str | None, str | None, str], dict[str, Any]] = {}

    def compare(a: str, b: str, strategy_a: str | None, strategy_b: str | None, name: str, metric: Any) -> None:
        sides = [
            found[m].likelihood if s is None else found[m].strategies[s] for m, s in ((a, strategy_a), (b, strategy_b))
        ]
        place, tables = (a, b, strategy_a, strategy_b, name), [matrix(side, metric) for side in sides]
        proofs = [proof for side in sides if (proof := proven_rows(side)) is not None]
        if proofs:
            known = np.prod(proofs, axis=0)  # (R,)
            tables = [table * known[:, None] for table in tables]
            values = [float(metric.aggregate(table)) for table in tables]
            on_proven[place] = {"rows": int(known.sum()), "value_a": values[0], "value_b": values[1]}
        pairs[place] = (*tables, metric.aggregate)

    a = names[0]
    for b in names[1:]:
        for place in measured_places(found[a], metrics, settings):
            compare(a, b, *place)
    found_pairs = paired_bootstrap_many(pairs, seed=settings.seed, resamples=settings.resamples) if pairs else {}
    return [
        {
            "a": a,
            "b": b,
            "strategy": strategy_b,
            **({"strategy_a": strategy_a} if strategy_a != strategy_b else {}),
            "metric": name,
            "difference": result.difference,
            "ci95": list(result.ci95),
            "p_value": math.nan if math.isnan(result.difference) else result.p_value,
            **on_proven.get((a, b, strategy_a, strategy_b, name), {}),
            **claim_of(1, 1),
        }
        for (a, b, strategy_a, strategy_b, name), result in found_pairs.items()
    ]
