"""Methods in results.json: values and comparisons of methods that several training seeds stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlseq.evaluation.aggregate import compared, matrix, measured, measured_places, put, rows_under
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
    resampled = crossed_bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    results: dict[str, Any] = {
        method: {"checkpoints": names, "seeds": len(names), "likelihood": {}, "strategies": {}}
        for method, names in repeated.items()
    }
    for (method, strategy, name), mean in resampled.items():
        metric = LIKELIHOOD_METRICS[name] if strategy is None else metrics[name]
        cell = {"value": mean.value, "ci95": list(mean.ci95), "per_seed": list(mean.per_seed)}
        put(results[method], strategy, metric, cell, *(rows_under(found[seed], strategy) for seed in repeated[method]))
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
    resampled = crossed_bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    rows = []
    for place, claim in about.items():
        side_a, side_b = resampled[*place, "a"], resampled[*place, "b"]
        values = {"value_a": side_a.value, "value_b": side_b.value}
        rows.append(compared(a, *place, difference(side_a, side_b)) | values | claim)
    return rows
