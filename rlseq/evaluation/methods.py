"""Methods in results.json: values and comparisons of methods that several training seeds stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlseq.evaluation.aggregate import coverage, matrix, measured, measured_places, put, rows_under
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.metrics import LIKELIHOOD_METRICS, Metric
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.stats.seeds import claim_of, crossed_bootstrap_many, difference, methods


def method_results(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> dict[str, Any]:
    """The block `methods` of results.json: of each method with several seeds what `models` has of a checkpoint.

    A cell is {"value", "ci95", "per_seed"}: the mean over seeds, its interval over seeds and rows, and every seed, in
    the order of `checkpoints`.
    """
    tables: dict[tuple[str, str | None, str], tuple[str, list[np.ndarray], Any]] = {}
    repeated = {method: names for method, names in methods(found).items() if len(names) > 1}
    for method, names in repeated.items():
        seeds = [found[name] for name in names]
        for strategy, name, metric in measured(seeds[0], metrics):
            rows = [matrix(rows_under(seed, strategy), metric) for seed in seeds]
            tables[method, strategy, name] = (method, rows, metric.aggregate)
    draws = crossed_bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    results: dict[str, Any] = {
        method: {"checkpoints": names, "seeds": len(names), "likelihood": {}, "strategies": {}}
        for method, names in repeated.items()
    }
    for (method, strategy, name), drawn in draws.items():
        place = results[method]["likelihood"]
        if strategy is not None:
            place = results[method]["strategies"].setdefault(strategy, {})
        cell = {"value": drawn.value, "ci95": list(drawn.ci95), "per_seed": list(drawn.per_seed)}
        if strategy is None:
            put(place, LIKELIHOOD_METRICS[name], cell)
        else:
            of_seeds = (found[seed].strategies[strategy] for seed in repeated[method])
            put(place, metrics[name], cell | coverage(metrics[name], *of_seeds))
    return results


def method_comparisons(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> list[dict[str, Any]]:
    """Every method against the first, b − a of every metric, where either has several seeds."""
    (a, seeds_a), *others = methods(found).items()
    tables: dict[tuple[Any, ...], tuple[str, list[np.ndarray], Any]] = {}
    about: dict[tuple[Any, ...], dict[str, Any]] = {}
    for b, seeds_b in others:
        if len(seeds_a) == len(seeds_b) == 1:
            continue
        for strategy_a, strategy_b, name, metric in measured_places(found[seeds_a[0]], metrics, settings):
            place = (b, strategy_a, strategy_b, name)
            for side, method, seeds, strategy in (("a", a, seeds_a, strategy_a), ("b", b, seeds_b, strategy_b)):
                rows = [matrix(rows_under(found[seed], strategy), metric) for seed in seeds]
                tables[*place, side] = (method, rows, metric.aggregate)
            about[place] = claim_of(len(seeds_a), len(seeds_b))
    draws = crossed_bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    compared = []
    for place, said in about.items():
        b, strategy_a, strategy_b, name = place
        side_a, side_b = draws[*place, "a"], draws[*place, "b"]
        result = difference(side_a, side_b)
        compared.append(
            {
                "a": a,
                "b": b,
                "strategy": strategy_b,
                **({"strategy_a": strategy_a} if strategy_a != strategy_b else {}),
                "metric": name,
                "difference": result.difference,
                "ci95": list(result.ci95),
                "p_value": math.nan if math.isnan(result.difference) else result.p_value,
                "value_a": side_a.value,
                "value_b": side_b.value,
                **said,
            }
        )
    return compared
