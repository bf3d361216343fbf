"""Rows that are not independent: those of one document, user or template are a cluster, resampled as one.

Statistics are sums over rows, so a cluster has those of its rows added up. What then resamples, flips or leaves out
rows does so with clusters (the cluster bootstrap; Davison & Hinkley 1997, §3.8).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.statistics import RowStatistics
from rlseq.types import Prompt


def check_clusters(column: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that every row names its cluster, and that there are two at least.

    Raises:
        ConfigError: says which row does not.
    """
    if column is None or not rows:
        return
    known = dict.fromkeys(name for row in rows for name in row)
    if column not in known:
        raise ConfigError(
            f"the data has no column {column!r} (--cluster_column); its columns are {', '.join(known)}."
            + did_you_mean(column, known)
        )
    without = [i for i, row in enumerate(rows) if row.get(column) is None]
    if without:
        raise ConfigError(
            f"--cluster_column {column!r}: {len(without):,} of {len(rows):,} rows have no value there, first row "
            f"{without[0]}; give each a cluster"
        )
    if len({_name(row[column]) for row in rows}) == 1:
        raise ConfigError(
            f"--cluster_column {column!r}: all {len(rows):,} rows are one cluster; nothing can be resampled"
        )


def count_clusters(column: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many clusters these rows have."""
    return len({_name(row[column]) for row in rows})


def clusters_of(column: str | None, prompts: Sequence[Prompt]) -> list[str] | None:
    """By row the cluster; None where rows are independent."""
    if column is None:
        return None
    return [_name(prompt.columns.get(column, prompt.prompt)) for prompt in prompts]


def summed(found: Mapping[str, ModelStatistics], clusters: Sequence[str] | None) -> Mapping[str, ModelStatistics]:
    """The statistics of clusters, in the order of their first rows; of rows as they are without clusters."""
    if clusters is None:
        return found
    return {
        name: dataclasses.replace(
            statistics,
            likelihood=_sums(statistics.likelihood, clusters),
            strategies={strategy: _sums(rows, clusters) for strategy, rows in statistics.strategies.items()},
        )
        for name, statistics in found.items()
    }


def clusters_note(column: str, clusters: Sequence[str], studies: Sequence[str]) -> str:
    """What a report says of the clusters."""
    return (
        f"Rows are clustered by {column}: intervals, p values and power treat the {len(set(clusters)):,} clusters as "
        f"independent, not the {len(clusters):,} rows."
        + (f" The intervals of {', '.join(studies)} resample rows, and may be too narrow." if studies else "")
    )


def _sums(rows: Sequence[RowStatistics], clusters: Sequence[str]) -> list[RowStatistics]:
    found: dict[str, RowStatistics] = {cluster: {} for cluster in clusters}
    for row, cluster in zip(rows, clusters, strict=True):
        mine = found[cluster]
        for statistic, value in row.items():
            mine[statistic] = mine[statistic] + value if statistic in mine else value
    return list(found.values())


def _name(value: Any) -> str:
    """A cluster's value as text: equal ones have equal texts."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
