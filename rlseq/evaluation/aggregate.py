"""From per-row statistics to numbers: which metrics there are, their values with intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.engine.strategies import Greedy, parse_strategy
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.measure.references import agreement, sampled_and_exact
from rlseq.evaluation.metrics import (
    CHANCE_METRICS,
    COMPLETION_METRICS,
    LIKELIHOOD_METRICS,
    THOUGHT_METRICS,
    Metric,
)
from rlseq.evaluation.names import Names
from rlseq.evaluation.results.primary import Primary
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import (
    COMPLETION,
    CORPUS,
    REWARD,
    Pair,
    RowStatistics,
    rows_matrix,
)
from rlseq.evaluation.stats.bootstrap import bootstrap_many, paired_bootstrap_many
from rlseq.evaluation.stats.power import power_of
from rlseq.evaluation.stats.seeds import claim_of
from rlseq.scoring import Ratio, RewardSuite
from rlseq.scoring.corpus import value_of


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


def quality_metrics(suite: RewardSuite, *, with_references: bool, with_thoughts: bool = False) -> dict[str, Metric]:
    """The quality metrics: each reward's mean, the corpus aggregates, then what is measured of any completion.

    Without references there is none that needs them, and without thoughts none of those; `metrics_under` says which of
    them a strategy has.
    """
    metrics: dict[str, Metric] = {}
    names = Names.of(suite)
    for reward, name in names.rewards.items():
        pair = Pair(REWARD("sum", reward), REWARD("count", reward))
        metrics[name] = Metric(
            name,
            f"{reward} (reward)",
            pair,
            "mean reward over completions",
            True,
            kind="reward",
            counted=Pair(pair.denominator, COMPLETION("samples")),
        )
    for given, name in names.corpus.items():
        corpus, count = suite.corpus[given], CORPUS("count", given)
        metrics[name] = Metric(
            name,
            corpus.label or given,
            (*(CORPUS("sum", given, key) for key in corpus.statistics), count),
            corpus.description or f"of the details of reward {corpus.reward}",
            corpus.higher_is_better,
            _CorpusAggregate(given, corpus),
            percent=isinstance(corpus, Ratio),  # any other has a scale of its own: corpus chrF goes to 100
            kind="corpus",
            table="shape" if corpus.higher_is_better is None else "quality",
            counted=Pair(count, COMPLETION("samples")),
        )
    built_in = COMPLETION_METRICS | (THOUGHT_METRICS if with_thoughts else {}) | CHANCE_METRICS
    return metrics | {name: m for name, m in built_in.items() if with_references or not m.needs_references}


def metrics_under(metrics: Mapping[str, Metric], strategy: str) -> dict[str, Metric]:
    """Those of the metrics that a strategy, named by its spec, has."""
    is_stochastic = parse_strategy(strategy).is_stochastic
    return {name: metric for name, metric in metrics.items() if is_stochastic or not metric.sampled}


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


def put(
    entry: dict[str, Any], strategy: str | None, metric: Metric, cell: dict[str, Any], *parts: Sequence[RowStatistics]
) -> None:
    """Put a metric's value where results.json has it, in the entry of a checkpoint or method; `parts` as `coverage`."""
    block = entry["likelihood"] if strategy is None else entry["strategies"].setdefault(strategy, {})
    *outer, last = metric.place
    for key in outer:
        block = block.setdefault(key, {})
    block[last] = cell | coverage(metric, *parts)


def model_results(
    found: Mapping[str, ModelStatistics],
    metrics: Mapping[str, Metric],
    settings: ContrastSettings,
    resampled: Mapping[str, ModelStatistics] | None = None,
) -> dict[str, Any]:
    """Each model's value and 95% interval of every metric, in the shape of `models` in results.json.

    Args:
        resampled: what intervals are from: clusters (`rlseq.evaluation.results.clusters`), or None for the rows.
    """
    tables: dict[tuple[str, str | None, str], tuple[np.ndarray, Any]] = {}
    for name, statistics in (resampled or found).items():
        for strategy, metric_name, metric in measured(statistics, metrics):
            tables[name, strategy, metric_name] = (matrix(rows_under(statistics, strategy), metric), metric.aggregate)
    intervals = bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    results: dict[str, Any] = {}
    for (name, strategy, metric_name), interval in intervals.items():
        model = results.setdefault(name, {"path": found[name].path, "likelihood": {}, "strategies": {}})
        metric = LIKELIHOOD_METRICS[metric_name] if strategy is None else metrics[metric_name]
        cell = {"value": interval.value, "ci95": list(interval.ci95)}
        put(model, strategy, metric, cell, rows_under(found[name], strategy))
    for name, statistics in found.items():
        counts = agreement(statistics.strategies.get(Greedy().spec, []))
        if counts is not None:
            results[name]["greedy_and_teacher_forcing"] = counts
        for strategy, rows in statistics.strategies.items():
            gap = sampled_and_exact(rows)
            if gap is not None:
                results[name].setdefault("sampled_and_exact", {})[strategy] = gap
    return results


def measured(statistics: ModelStatistics, metrics: Mapping[str, Metric]) -> Iterator[tuple[str | None, str, Metric]]:
    """What was measured of a model: (strategy, metric's name, metric); None is teacher forcing."""
    if any(statistics.likelihood):
        for name, metric in LIKELIHOOD_METRICS.items():
            yield None, name, metric
    for strategy in statistics.strategies:
        for name, metric in metrics_under(metrics, strategy).items():
            yield strategy, name, metric


def rows_under(statistics: ModelStatistics, strategy: str | None) -> Sequence[RowStatistics]:
    """A model's rows under a strategy; None is teacher forcing."""
    return statistics.likelihood if strategy is None else statistics.strategies[strategy]


def measured_places(
    first: ModelStatistics, metrics: Mapping[str, Metric], settings: ContrastSettings
) -> Iterator[tuple[str | None, str | None, str, Any]]:
    """What models are compared by: (strategy of a, that of b, metric's name, metric); None is teacher forcing."""
    for strategy, name, metric in measured(first, metrics):
        yield strategy, strategy, name, metric
    primary = Primary.of(settings)
    if primary and settings.primary_against:
        yield primary.spec_against, primary.spec, primary.metric, metrics[primary.metric]


def comparisons(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> list[dict[str, Any]]:
    """Every model against the first: the difference b − a of every metric, and the primary one across strategies.

    A difference that is not defined (nothing was measured on one side) is NaN, as are its interval and p-value.
    """
    names = list(found)
    pairs: dict[tuple[str, str, str | None, str | None, str], tuple[np.ndarray, np.ndarray, Any]] = {}
    a = names[0]
    for b in names[1:]:
        for strategy_a, strategy_b, name, metric in measured_places(found[a], metrics, settings):
            sides = rows_under(found[a], strategy_a), rows_under(found[b], strategy_b)
            pairs[a, b, strategy_a, strategy_b, name] = (*(matrix(side, metric) for side in sides), metric.aggregate)
    found_pairs = paired_bootstrap_many(pairs, seed=settings.seed, resamples=settings.resamples) if pairs else {}
    found_rows = []
    for place, result in found_pairs.items():
        *_, strategy, name = place
        metric = LIKELIHOOD_METRICS[name] if strategy is None else metrics[name]
        power = power_of(result.deviation, result.rows, metric.unit)
        of = {"of": "clusters"} if settings.cluster_column else {}
        found_rows.append(compared(*place, result) | claim_of(1, 1) | {"power": power and power.as_json() | of})
    return found_rows


def compared(
    a: str, b: str, strategy_a: str | None, strategy_b: str | None, metric: str, result: Any
) -> dict[str, Any]:
    """A comparison b − a as results.json has it; of a difference that is not defined, the p-value is not either."""
    return {
        "a": a,
        "b": b,
        "strategy": strategy_b,
        **({"strategy_a": strategy_a} if strategy_a != strategy_b else {}),
        "metric": metric,
        "difference": result.difference,
        "ci95": list(result.ci95),
        "p_value": math.nan if math.isnan(result.difference) else result.p_value,
    }
