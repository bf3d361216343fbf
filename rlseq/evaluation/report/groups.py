"""The results of an evaluation by group of rows (`--group_column`), and their section of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.data.groups import group_name, rows_by_group
from rlseq.evaluation.aggregate import model_results
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.report import tables
from rlseq.evaluation.results.clusters import clusters_of, summed
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.studies.study import Section, Table
from rlseq.types import Prompt


def of_rows(statistics: ModelStatistics, places: Sequence[int]) -> ModelStatistics:
    """A model's statistics on some of the rows; without its samples and studies."""
    return dataclasses.replace(
        statistics,
        likelihood=[statistics.likelihood[place] for place in places],
        strategies={name: [rows[place] for place in places] for name, rows in statistics.strategies.items()},
        samples=[],
        studies={},
    )


def group_results(
    found: Mapping[str, ModelStatistics],
    prompts: Sequence[Prompt],
    metrics: Mapping[str, Metric],
    settings: ContrastSettings,
) -> dict[str, Any]:
    """The block `groups` of results.json: {"column", "groups": [{"group", "rows", "models": as of all rows}]}.

    A group is named by its value in the data, null for rows without one.
    """
    groups = []
    for value, places in rows_by_group(prompts, settings.group_column):
        own = {name: of_rows(mine, places) for name, mine in found.items()}
        clusters = clusters_of(settings.cluster_column, [prompts[place] for place in places])
        models = model_results(own, metrics, settings, summed(own, clusters))
        kept = {name: {key: entry[key] for key in ("likelihood", "strategies")} for name, entry in models.items()}
        groups.append({"group": value, "rows": len(places), "models": kept})
    return {"column": settings.group_column, "groups": groups}


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The report's section, where there are groups."""
    block = results.get("groups")
    if block is None:
        return []
    blocks = [(None, "Teacher forcing", tables.likelihood_metrics(results))]
    blocks += [(s, tables.labelled(results, s), tables.quality_metrics(results)) for s in tables.strategies(results)]
    found = []
    for strategy, caption, names in blocks:
        infos = [tables.metric(results, name) for name in names]
        rows = [
            [group_name(group["group"]), f"{group['rows']:,}", model, *(info.cell(cell) for info, cell in cells)]
            for group in block["groups"]
            for model in results["models"]
            if (
                cells := [(i, tables.cell({**results, **group, "methods": {}}, model, strategy, i.name)) for i in infos]
            )
            and any(cell for _, cell in cells)
        ]
        if rows:
            header = ["group", "rows", "model", *(info.label for info in infos)]
            found.append(Table(header, rows, caption=caption))
    return [
        Section(
            anchor="groups",
            title=f"By {block['column']}",
            definition=f"Every metric on the rows of one value of the column {block['column']}, with its 95% interval.",
            caveat="No comparison of groups is tested, and small groups have wide intervals.",
            tables=found,
        )
    ]
