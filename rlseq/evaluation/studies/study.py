"""Studies: what a contrast measures of a checkpoint beside likelihood and quality, each in a module of its own.

A study turns the rows into rows of statistics, as everything of a contrast is; from those come values, intervals and
paired differences (`summarise`), and from these a section of the report. It never sees another study.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.statistics import RowStatistics, Statistic, rows_matrix
from rlseq.evaluation.stats.bootstrap import bootstrap_many, paired_bootstrap_many
from rlseq.evaluation.stats.seeds import claim_of, crossed_bootstrap_many, difference, methods
from rlseq.scoring import RewardSuite
from rlseq.types import Prompt, Rollout


@dataclass(frozen=True)
class Context:
    """What a study gets to measure one checkpoint on this process's share of the rows.

    Attributes:
        model: in eval mode, on this process's device.
        prompts: the N rows (of a costly study the first `study_rows` of the data).
        references: by row the distinct references as token ids, stop included; empty where there are none.
        completions: by strategy spec, the completions of each row.
        values: by strategy spec and reward, one value per completion, row after row; None where it abstained or failed.
        settings: of the contrast (`rlseq.evaluation.settings.ContrastSettings`).
        baseline: loads the first model of the contrast, once, on first call; in eval mode, on this device. It is
            `model` itself where that is the first.
        progress: called by a study with the number of rows that are done; it reports each of its N rows once.
    """

    model: torch.nn.Module
    tokenizer: Any
    prompts: Sequence[Prompt]
    references: Sequence[Sequence[tuple[int, ...]]]
    suite: RewardSuite
    completions: Mapping[str, Sequence[Sequence[Rollout]]]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]
    settings: Any
    stop_ids: Collection[int]
    baseline: Callable[[], torch.nn.Module]
    progress: Callable[[int], Any] = lambda rows: None

    def sample(
        self,
        study: str,
        prompts: Sequence[Prompt] | None = None,
        *,
        part: str = "",
        strategy: Sample | None = None,
        model: torch.nn.Module | None = None,
        **options: Any,
    ) -> list[list[Rollout]]:
        """Sample for a study as the settings say: `samples_per_row` completions of each prompt, ancestral.

        Args:
            study, part: name the rng stream. It is the same for every model.
            prompts: what to continue; None: all rows.
            strategy: None: ancestral sampling.
            model: what samples; None: the model that is measured.
            options: of `rlseq.engine.sampling.sample`, in place of the settings.
        """
        settings = self.settings
        return sample(
            self.model if model is None else model,
            self.prompts if prompts is None else prompts,
            strategy=strategy or Sample(),
            seed=settings.seed,
            stream=f"{study}/{part}" if part else study,
            stop_ids=self.stop_ids,
            stop_strings=settings.stop_strings or (),
            tokenizer=self.tokenizer,
            batch_rows=settings.eval_batch_size * settings.samples_per_row,
            max_kv_gb=settings.max_kv_gb,
            **{"num_samples": settings.samples_per_row, "max_new_tokens": settings.max_new_tokens, **options},
        )


@dataclass(frozen=True)
class Table:
    """A table of the report: texts, the first column a row's name. `note` stands below it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        anchor: its name within the page.
        definition: what is measured, in a sentence or two.
        caveat: what the numbers do not say.
        figures: name -> (what it shows, SVG).
    """

    anchor: str
    title: str
    definition: str
    caveat: str
    tables: Sequence[Table] = ()
    figures: Mapping[str, tuple[str, str]] = field(default_factory=dict)


class Study:
    """One additional measurement: it samples or scores, aggregates, and writes its section of the report.

    Its module is named after it and has one instance in `rlseq.evaluation.studies.table`, where alone it is listed.

    Attributes:
        name: as `--studies` and results.json have it.
        costly: whether it decodes or scores again, and so runs on the first `study_rows` rows.
        against_first: whether it measures against the first model of an evaluation. Where evaluations with different
            first models are joined, it is left out.
        together: whether it needs all rows at once. Of several processes the first then measures all rows, and gets no
            completions of the strategies.
    """

    name: ClassVar[str]
    costly: ClassVar[bool] = True
    against_first: ClassVar[bool] = False
    together: ClassVar[bool] = False

    def rows(self, settings: Any) -> int | None:
        """It runs on the first N rows of the data; None: on all."""
        return settings.study_rows if self.costly else None

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Raise ConfigError for settings that cannot work, before a model is loaded."""

    def check_model(self, config: Any) -> None:
        """Raise ModelError for a model that cannot be measured, by its configuration alone."""

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """Completions that it decodes for one model, and sequences that it scores, at most.

        Args:
            rows, references: that it runs on.
        """
        return 0, 0

    def measure(self, context: Context) -> list[RowStatistics]:
        """The statistics of the N rows."""
        return self.statistics(self.sample(context))

    def sample(self, context: Context) -> list[Any]:
        """What the model says about each of the N rows: one record per row, of any type."""
        raise NotImplementedError

    def statistics(self, records: list[Any]) -> list[RowStatistics]:
        """The records as N rows of statistics, of plain Python types; a row without any is empty."""
        return records

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """The study's block of results.json, or None if it has nothing to say.

        Args:
            found: by model its rows.
            metrics: of the evaluation, by name (`rlseq.evaluation.aggregate.quality_metrics`).
        """
        raise NotImplementedError

    def section(self, results: Mapping[str, Any]) -> Section:
        """Its section of the report, from results.json."""
        raise NotImplementedError

    def headline(self, results: Mapping[str, Any], a: str, b: str) -> str:
        """A sentence about b against a for the head of the report; "" if it has none."""
        return ""


@dataclass(frozen=True)
class StudyMetric:
    """A number over rows: an aggregate of per-row statistics (rlseq.evaluation.stats.bootstrap)."""

    statistics: tuple[Statistic, ...]
    aggregate: Any


def summarise(
    found: Mapping[str, Sequence[RowStatistics]],
    metrics: Mapping[str, StudyMetric],
    settings: Any,
    *,
    compare: bool = True,
) -> dict[str, Any]:
    """Values with intervals of every model, and differences to the first on the same rows.

    Where a method has several training seeds (rlseq.evaluation.stats.seeds) it is compared with the first method too,
    by its mean over seeds; if that has several, the single seeds are not compared.

    Args:
        found: by model, R rows.
        metrics: by name; a row that lacks a statistic has 0 of it.
        compare: whether to take differences.

    Returns:
        {"models": {model: {name: {"value", "ci95"}}}, "comparisons": [{"a", "b", "metric", "difference", "ci95"}]};
        what is not defined is NaN. A comparison of methods also has what `seeds.claim_of` gives.
    """
    tables = {
        (model, name): (rows_matrix(rows, metric.statistics), metric.aggregate)
        for model, rows in found.items()
        for name, metric in metrics.items()
    }
    options = {"seed": settings.seed, "resamples": settings.resamples}
    models: dict[str, dict[str, Any]] = {model: {} for model in found}
    for (model, name), interval in bootstrap_many(tables, **options).items():
        models[model][name] = {"value": interval.value, "ci95": list(interval.ci95)}
    by_method = methods(found)
    first, *others = found
    if first not in by_method:
        others = []
    pairs = {
        (other, name): (tables[first, name][0], tables[other, name][0], metric.aggregate)
        for other in others
        for name, metric in metrics.items()
    }
    differences = paired_bootstrap_many(pairs, **options) if pairs and compare else {}
    return {
        "models": models,
        "comparisons": [
            {"a": first, "b": other, "metric": name, "difference": r.difference, "ci95": list(r.ci95)}
            for (other, name), r in differences.items()
        ]
        + (_method_comparisons(by_method, tables, metrics, options) if compare else []),
    }


def _method_comparisons(
    by_method: Mapping[str, Sequence[str]],
    tables: Mapping[tuple[str, str], tuple[np.ndarray, Any]],
    metrics: Mapping[str, StudyMetric],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    (a, seeds_a), *others = by_method.items()
    compared = [(b, seeds_b) for b, seeds_b in others if max(len(seeds_a), len(seeds_b)) > 1]
    if not compared:
        return []
    resampled = crossed_bootstrap_many(
        {
            (method, name): (method, [tables[seed, name][0] for seed in seeds], metric.aggregate)
            for method, seeds in [(a, seeds_a), *compared]
            for name, metric in metrics.items()
        },
        **options,
    )
    found = []
    for b, seeds_b in compared:
        for name in metrics:
            result = difference(resampled[a, name], resampled[b, name])
            claim = claim_of(len(seeds_a), len(seeds_b))
            values = {"difference": result.difference, "ci95": list(result.ci95)}
            found.append({"a": a, "b": b, "metric": name, **values, **claim})
    return found
