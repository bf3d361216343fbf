"""The table of what rewards said of rollouts, as the `rlseq reward` commands print it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlseq.common.tables import render_table
from rlseq.scoring.corpus import of_completions
from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.table import ScoreTable

MOMENTS = ("n", "mean", "sd", "min", "max")
STATUSES = ("abstained", "error", "timeout", "invalid")


def print_scores(suite: RewardSuite, table: ScoreTable) -> None:
    """Print each reward's moments and failures, their weighted sum, and the corpus metrics."""
    rows = [
        (name, f"{weight:g}", *scores(table, name)) for name, weight in zip(suite.names, suite.weights, strict=True)
    ]
    rows.append(("weighted sum", "", *moments(table.totals), *[""] * len(STATUSES)))
    header = ("reward", "weight", *MOMENTS, *STATUSES)
    print(render_table(rows, header, right=range(1, len(header))))
    count = len(table.totals)
    for name, metric in suite.corpus.items():
        value, present = of_completions(name, metric, table.details[metric.reward])
        of = f" of {present:,} of {count:,} completions" if present < count else ""
        said = f"  ({metric.description})" if metric.description else ""
        print(f"{name} = {number(value)}{of}{said}")


def scores(table: ScoreTable, name: str) -> tuple[str, ...]:
    """One reward's cells under MOMENTS and STATUSES."""
    return *moments(table.values[name]), *(f"{table.failure_counts[name][status]:,}" for status in STATUSES)


def moments(values: Sequence[float | None]) -> tuple[str, ...]:
    """The cells under MOMENTS; values that are None are left out."""
    present = [value for value in values if value is not None]
    if not present:
        return ("0", "-", "-", "-", "-")
    mean = math.fsum(present) / len(present)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in present) / len(present))
    return (f"{len(present):,}", *map(number, (mean, sd, min(present), max(present))))


def number(value: float) -> str:
    """Four digits; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.4g}"
