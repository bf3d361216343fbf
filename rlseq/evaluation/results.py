"""A contrast on disk: results.json, and the rows of statistics and completions that it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.evaluation.compression import write_documents
from rlseq.evaluation.measure import ModelStatistics
from rlseq.types import Prompt


def finite_or_null(value: Any) -> Any:
    """Nested dicts and lists with None for NaN and infinities, which JSON cannot hold: 0 / 0 is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(element) for element in value]
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def spec_on_file(spec: Any) -> Any:
    """A reward's spec as JSON has it; None for a function, or a spec with one, which no file can hold."""
    try:
        return json.loads(json.dumps(spec))
    except TypeError:
        return None


def write_results(
    results: Mapping[str, Any],
    found: Mapping[str, ModelStatistics],
    output_dir: Path,
    *,
    rows_of: Sequence[Prompt],
) -> None:
    """Write per_example.jsonl, samples.jsonl, studies.jsonl, documents.jsonl, then results.json.

    A line of per_example.jsonl and of studies.jsonl is of a model and row, of samples.jsonl of a completion, and of
    documents.jsonl of a model and document; studies and documents are there if any were measured. All statistics are on
    file, so that evaluations can be joined (rlseq.evaluation.join); results.json comes last: with it the rest is whole.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").unlink(missing_ok=True)
    places = [(name, statistics, i) for name, statistics in found.items() for i in range(len(rows_of))]
    _write_jsonl(
        output_dir / "per_example.jsonl",
        (
            {
                "model": name,
                "key": rows_of[i].key,
                "prompt": rows_of[i].messages_or_text,
                "references": list(rows_of[i].columns.get("references", ())),
                "likelihood": statistics.likelihood[i],
                "strategies": {s: rows[i] for s, rows in statistics.strategies.items()},
            }
            for name, statistics, i in places
        ),
    )
    _write_jsonl(output_dir / "samples.jsonl", (record for s in found.values() for record in s.samples))
    if results["studies"]:
        studies = (
            {
                "model": name,
                "key": rows_of[i].key,
                "studies": {study: rows[i] for study, rows in statistics.studies.items()},
            }
            for name, statistics, i in places
        )
        _write_jsonl(output_dir / "studies.jsonl", studies)
    coded = {name: statistics.documents for name, statistics in found.items() if statistics.documents is not None}
    if coded:
        write_documents(coded, output_dir / "documents.jsonl")
    (output_dir / "results.json").write_text(_json(results, indent=1), encoding="utf-8")


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(_json(record) + "\n")


def _json(value: Any, **options: Any) -> str:
    return json.dumps(finite_or_null(value), ensure_ascii=False, allow_nan=False, **options)
