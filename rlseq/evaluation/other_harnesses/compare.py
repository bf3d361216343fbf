"""Evaluations of other harnesses, compared on the same rows as those of rlseq: difference, interval, p, power."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlseq.common.escapes import visible
from rlseq.common.tables import render_table
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.other_harnesses.inspect_logs import is_log, log_files, read_inspect
from rlseq.evaluation.other_harnesses.lm_eval import WEIGHTED, read_lm_eval, sample_files
from rlseq.evaluation.other_harnesses.scores import HarnessScores, TaskScores
from rlseq.evaluation.report.formats import NOTHING, Shown, p_text
from rlseq.evaluation.results.compare import named_path
from rlseq.evaluation.results.files import finite_or_null
from rlseq.evaluation.stats.bootstrap import paired_bootstrap_many
from rlseq.evaluation.stats.estimators import ExpRatioOfSums, RatioOfSums
from rlseq.evaluation.stats.holm import holm
from rlseq.evaluation.stats.power import power_of

READERS = {"lm-eval": read_lm_eval, "inspect": read_inspect}


def harness_of(spec: str) -> str | None:
    """Which other harness wrote what PATH or NAME=PATH names; None where rlseq did, or nothing is known there."""
    path = Path(named_path(spec)[1])
    if path.is_dir():
        if (path / "results.json").is_file():
            return None
        return "lm-eval" if sample_files(path) else "inspect" if log_files(path) else None
    if path.suffix == ".jsonl":
        return "lm-eval"
    return "inspect" if is_log(path) else None


def compare(evaluations: Sequence[str], *, seed: int, resamples: int) -> dict[str, Any]:
    """Compare each evaluation with the first: the paired difference of every task's metrics on the same rows.

    A row's repeats (epochs) are averaged, and the row is what is resampled, so that they count as one cluster.

    Args:
        evaluations: PATH or NAME=PATH of each; a PATH is named by its last part, without its ending.
        seed, resamples: as in `paired_bootstrap`.

    Returns:
        What comparison.json holds.

    Raises:
        ConfigError: fewer than two, two of one name, or of two harnesses.
        DataError: files that cannot be read, rows that are not the same ones, nothing in common.
    """
    loaded = _load(evaluations)
    (name_a, a), *others = loaded.items()
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    for name_b, b in others:
        tasks = _common(list(a.tasks), list(b.tasks), "task", (name_a, name_b), notes)
        if not tasks:
            raise DataError(
                f"{name_a} and {name_b} have no task in common: {', '.join(a.tasks)}; and {', '.join(b.tasks)}"
            )
        for task in tasks:
            side = _Pair(task, name_a, name_b, a.tasks[task], b.tasks[task])
            found += side.compare(notes, seed=seed, resamples=resamples)
    if not found:
        raise DataError(f"no metric has numbers in both. {' '.join(dict.fromkeys(notes))}")
    adjusted = holm([comparison["p_value"] for comparison in found])
    for comparison, p in zip(found, adjusted, strict=True):
        comparison["p_adjusted"] = float(p)
    return {
        "harness": a.harness,
        "evaluations": {name: str(scores.path) for name, scores in loaded.items()},
        "seed": seed,
        "resamples": resamples,
        "adjustment": {"method": "holm", "comparisons": len(found)},
        "comparisons": found,
        "notes": list(dict.fromkeys(notes)),
    }


def compare_and_report(evaluations: Sequence[str], output_dir: Path, *, seed: int, resamples: int) -> dict[str, Any]:
    """`compare`, then comparison.json and comparison.md in a folder, and a table on the terminal."""
    results = compare(evaluations, seed=seed, resamples=resamples)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite_or_null(results), indent=1, ensure_ascii=False, allow_nan=False)
    (output_dir / "comparison.json").write_text(text + "\n", encoding="utf-8")
    said = [*_explained(results), *results["notes"]]
    page: list[str] = []
    for heading, rows in _tables(results):
        print(render_table(rows, heading, right=range(2, len(heading)), keys=2), end="\n\n")
        page += ["| " + " | ".join(cells) + " |" for cells in (heading, ["---"] * len(heading), *rows)] + [""]
    (output_dir / "comparison.md").write_text("\n".join([*page, *said]) + "\n", encoding="utf-8")
    for line in (*said, f"rlseq: written to {output_dir / 'comparison.json'}"):
        print(visible(line), flush=True)
    return results


def _load(evaluations: Sequence[str]) -> dict[str, HarnessScores]:
    if len(evaluations) < 2:
        raise ConfigError("--compare needs two finished evaluations at least")
    kinds = {spec: harness_of(spec) for spec in evaluations}
    if len(set(kinds.values())) > 1:
        what = ", ".join(f"{spec!r} is of {kind or 'rlseq, or not there'}" for spec, kind in kinds.items())
        raise ConfigError(f"--compare joins evaluations of one harness: {what}")
    loaded: dict[str, HarnessScores] = {}
    for spec in evaluations:
        given, path = named_path(spec)
        name = given or (Path(path).name if Path(path).is_dir() else Path(path).stem)
        if name in loaded:
            raise ConfigError(f"--compare: two evaluations are called {name!r}; give each a NAME=PATH")
        loaded[name] = READERS[str(kinds[spec])](Path(path))
    return loaded


def _common(a: list[str], b: list[str], what: str, names: tuple[str, str], notes: list[str]) -> list[str]:
    """What both have, in the order of a; a note for what one has alone."""
    for mine, others, name in ((a, b, names[0]), (b, a, names[1])):
        if alone := [one for one in mine if one not in others]:
            notes.append(f"Not compared, {what} of {name} alone: {', '.join(alone)}.")
    return [one for one in a if one in b]


@dataclass(frozen=True)
class _Pair:
    """A task of two evaluations."""

    task: str
    name_a: str
    name_b: str
    a: TaskScores
    b: TaskScores

    def compare(self, notes: list[str], *, seed: int, resamples: int) -> list[dict[str, Any]]:
        for metric in sorted(self.a.left_out | self.b.left_out):
            notes.append(f"Not compared, {metric} of {self.task}: not every score of a row is a number.")
        names = f"{self.name_a} ({self.task})", f"{self.name_b} ({self.task})"
        metrics = _common(list(self.a.scores), list(self.b.scores), "metrics", names, notes)
        tables, aggregates = {}, {}
        for metric in metrics:
            self._check_rows(metric)
            rows = list(dict.fromkeys(row for row, _ in self.a.scores[metric]))
            sides = [_means(scores.scores[metric], rows) for scores in (self.a, self.b)]
            if {side.shape for side in sides} != {sides[0].shape}:
                raise DataError(f"{metric} of {self.task} is a number on one side and a sum with a count on the other")
            tables[metric], aggregates[metric] = zip(*(_with_aggregate(metric, side) for side in sides), strict=True)
        found = []
        for metric in metrics:  # rows may differ between metrics
            (a, b), aggregate = tables[metric], aggregates[metric][0]
            result = paired_bootstrap_many({metric: (a, b, aggregate)}, seed=seed, resamples=resamples)[metric]
            rate = metric not in (*WEIGHTED, "perplexity") and bool(
                min(a[:, 0].min(), b[:, 0].min()) >= 0 and max(a[:, 0].max(), b[:, 0].max()) <= 1
            )
            power = power_of(result.deviation, result.rows, 0.01 if rate else 1.0)
            found.append(
                {
                    "task": self.task,
                    "metric": metric,
                    "a": self.name_a,
                    "b": self.name_b,
                    "rows": result.rows,
                    "repeats": len(self.a.scores[metric]),
                    "value_a": float(aggregate(a)),
                    "value_b": float(aggregate(b)),
                    "difference": result.difference,
                    "ci95": list(result.ci95),
                    "p_value": math.nan if math.isnan(result.difference) else result.p_value,
                    "power": power and power.as_json(),
                    "rate": rate,
                }
            )
        return found

    def _check_rows(self, metric: str) -> None:
        """Raise DataError unless both have the same repeats of the same rows."""
        a, b = self.a.scores[metric], self.b.scores[metric]
        alone = {name: [key for key in mine if key not in others] for name, mine, others in self._sides(a, b)}
        differing = [row for row in dict.fromkeys(row for row, _ in a) if self._differs(row)]
        if not differing and not any(alone.values()):
            return
        parts = [f"{len(keys):,} only in {name} (first {_said(keys[0])})" for name, keys in alone.items() if keys]
        if differing:
            parts.append(f"{len(differing):,} rows ask something else under the same id (first {differing[0]!r})")
        raise DataError(
            f"{metric} of {self.task} is not of the same rows in {self.name_a} ({len(a):,} scores) and {self.name_b} "
            f"({len(b):,} scores): {'; '.join(parts)}. Evaluate both on the same rows, with equal epochs and limit."
        )

    def _sides(self, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
        return [(self.name_a, a, b), (self.name_b, b, a)]

    def _differs(self, row: Hashable) -> bool:
        return row in self.b.contents and self.a.contents[row] != self.b.contents[row]


def _said(key: tuple[Hashable, int]) -> str:
    return f"row {key[0]!r}" + (f", epoch {key[1]}" if key[1] != 1 else "")


def _means(scores: dict[Any, tuple[float, ...]], rows: list[Hashable]) -> np.ndarray:
    """The mean over each row's repeats, (R, K)."""
    by_row: dict[Hashable, list[tuple[float, ...]]] = {row: [] for row in rows}
    for (row, _), score in scores.items():
        by_row[row].append(score)
    return np.array([np.mean(repeats, axis=0) for repeats in by_row.values()])


def _with_aggregate(metric: str, table: np.ndarray) -> tuple[np.ndarray, Any]:
    """Statistics and how the harness makes one number of them: nearly always their mean.

    lm-eval's perplexities are exp(−Σ log-likelihood / Σ words, bytes or documents), its bits per byte that in bits.
    """
    counts = table[:, 1:] if table.shape[1] == 2 else np.ones((len(table), 1))
    if metric == "bits_per_byte":
        return np.hstack([-table[:, :1] / math.log(2), counts]), RatioOfSums()
    if metric in (*WEIGHTED, "perplexity"):
        return np.hstack([-table[:, :1], counts]), ExpRatioOfSums()
    return np.hstack([table[:, :1], counts]), RatioOfSums()


def _tables(results: dict[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """For each evaluation against the first: the table's heading and rows."""
    name_a, *others = results["evaluations"]
    for name_b in others:
        heading = ["task", "metric", "rows", name_a, name_b, "difference", "95% interval", "p", "adjusted p"]
        compared = [found for found in results["comparisons"] if found["b"] == name_b]
        yield [*heading, "detectable"], [_cells(found) for found in compared]


def _cells(found: dict[str, Any]) -> list[str]:
    shown = Shown(percent=found["rate"], decimals=1 if found["rate"] else 4)
    power = found["power"]
    return [
        found["task"],
        found["metric"],
        f"{found['rows']:,}",
        shown.value(found["value_a"]),
        shown.value(found["value_b"]),
        shown.difference(found["difference"]),
        shown.difference_interval(found["ci95"]),
        p_text(found["p_value"]),
        p_text(found["p_adjusted"]),
        shown.difference(power["detectable_difference"]).lstrip("+") if power else NOTHING,
    ]


def _explained(results: dict[str, Any]) -> list[str]:
    found = results["comparisons"]
    said = [
        f"Intervals resample rows; p is of the two-sided sign-flip test, adjusted for {len(found)} comparisons by "
        "Holm's method. Detectable: the smallest difference that these rows detect with 80% power."
    ]
    if any(one["repeats"] != one["rows"] for one in found):
        said.append("A row's repeats (epochs) are averaged: the row is resampled, with all its repeats.")
    return said
