"""From per-row statistics to numbers: which metrics there are, their values with intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.decoding import parse_strategy
from rlseq.evaluation.measure import PASS_AT, ContrastSettings, ModelStatistics, RowStatistics
from rlseq.evaluation.modes import EMPTY, MODE_EMPTY, mode_results, proven_rows
from rlseq.evaluation.stats import ExpRatioOfSums, RatioOfSums, bootstrap_many, paired_bootstrap_many
from rlseq.scoring import RewardSuite


@dataclass(frozen=True)
class Metric:
    """A number for a set of rows: an aggregate over named per-row statistics, and how to read it."""

    statistics: tuple[str, ...]
    aggregate: Any
    higher_is_better: bool | None
    description: str
    percent: bool = False
    kind: str = "mean"


@dataclass(frozen=True)
class _CorpusAggregate:
    """A reward's corpus metric as an aggregate of a statistics matrix (n, K)."""

    metric: Any

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return self.metric.compute({name: sums[..., i] for i, name in enumerate(self.metric.statistics)})


@dataclass(frozen=True)
class _BitsPerByte(RatioOfSums):
    """Σ nats / (ln 2 · Σ bytes)."""

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return super().from_sums(sums) / np.log(2)


LIKELIHOOD_METRICS = {
    "nll_per_token": Metric(
        ("nll", "tokens"),
        RatioOfSums(),
        False,
        "mean next-token loss over the references, stop included (nats)",
    ),
    "perplexity": Metric(("nll", "tokens"), ExpRatioOfSums(), False, "exp of the NLL per token"),
    "bits_per_byte": Metric(
        ("nll", "bytes"),
        _BitsPerByte(),
        False,
        "bits to code a byte of reference text; free of the tokenizer",
    ),
    "sequence_logprob": Metric(
        ("sequence_logprob", "references"), RatioOfSums(), True, "mean log-prob of a whole reference (nats)"
    ),
    "exact_accuracy": Metric(
        ("p_correct", "rows"),
        RatioOfSums(),
        True,
        "chance that one ancestral sample is one of the references: mean Σ exp(log-prob), no sampling noise",
        percent=True,
    ),
    **{
        f"exact_pass_at_k.{k}": Metric(
            (f"pass_at_{k}", "rows"),
            RatioOfSums(),
            True,
            f"chance that {k} samples hold a right one",
            percent=True,
        )
        for k in PASS_AT
    },
}

# What is measured of any completion; a reward of one of these names is listed as reward.<name>.
COMPLETION_METRICS = {
    "exact_match": Metric(
        ("exact_match", "with_references"),
        RatioOfSums(),
        True,
        "share of completions whose tokens are those of a reference",
        percent=True,
        kind="accuracy",
    ),
    "length": Metric(("length", "samples"), RatioOfSums(), None, "mean tokens, stop included"),
    "truncated": Metric(
        ("truncated", "samples"), RatioOfSums(), False, "share of completions cut at the limit", percent=True
    ),
    "logprob": Metric(
        ("logprob", "samples"), RatioOfSums(), None, "mean log-prob of a completion under its own strategy (nats)"
    ),
}


def quality_metrics(suite: RewardSuite, *, with_references: bool) -> dict[str, Metric]:
    """The quality metrics: each reward's mean, the corpus aggregates, then what is measured of any completion.

    Without references there is no `exact_match`.
    """
    metrics: dict[str, Metric] = {}
    for reward, name in reward_metrics(suite).items():
        metrics[name] = Metric(
            (f"{reward}:sum", f"{reward}:count"),
            RatioOfSums(),
            True,
            "mean reward over completions",
            kind="reward",
        )
    for name, corpus in suite.corpus.items():
        metrics[name] = Metric(
            tuple(f"{corpus.reward}.{key}" for key in corpus.statistics),
            _CorpusAggregate(corpus),
            corpus.higher_is_better,
            corpus.description,
            percent=True,
            kind="corpus",
        )
    measured = dict(COMPLETION_METRICS)
    if not with_references:
        del measured["exact_match"]
    return metrics | measured


def reward_metrics(suite: RewardSuite) -> dict[str, str]:
    """The metric of each reward: its own name, unless a metric that is always there has it."""
    return {name: f"reward.{name}" if name in COMPLETION_METRICS else name for name in suite.names}


def matrix(rows: Sequence[RowStatistics], metric: Any) -> np.ndarray:
    """The statistics of a metric as (R, K); a row that has none of them is zeros."""
    return np.array([[row.get(key, 0.0) for key in metric.statistics] for row in rows])  # (R, K)


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
            for metric_name, metric in metrics.items():
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
    for name, statistics in found.items():
        for strategy, rows in statistics.strategies.items():
            block = mode_results(rows, metrics, seed=settings.seed, resamples=settings.resamples)
            if block is not None:
                results[name]["strategies"][strategy]["modes"] = block
    return results


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
        if any(found[a].likelihood):
            for name, metric in LIKELIHOOD_METRICS.items():
                compare(a, b, None, None, name, metric)
        for strategy in found[a].strategies:
            for name, metric in metrics.items():
                compare(a, b, strategy, strategy, name, metric)
            if proven_rows(found[a].strategies[strategy]) is not None:
                compare(a, b, strategy, strategy, EMPTY, MODE_EMPTY)
        if settings.primary and settings.primary_against:
            name, _, strategy = settings.primary.partition(":")
            against = parse_strategy(settings.primary_against).signature
            compare(a, b, against, parse_strategy(strategy).signature, name, metrics[name])
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
        }
        for (a, b, strategy_a, strategy_b, name), result in found_pairs.items()
    ]


def primary_comparison(settings: ContrastSettings, names: list[str]) -> dict[str, str] | None:
    """Which comparison has the claim, as results.json names it; None where there is none."""
    if settings.primary is None or len(names) < 2:
        return None
    metric, _, strategy = settings.primary.partition(":")
    primary = {"metric": metric, "strategy": parse_strategy(strategy).signature, "a": names[0], "b": names[1]}
    against = primary["strategy"]
    if settings.primary_against:
        against = parse_strategy(settings.primary_against).signature
    return primary if against == primary["strategy"] else {**primary, "strategy_a": against}
