"""A contrast on disk: results.json, per_example.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def write_results(
    results: Mapping[str, Any],
    found: Mapping[str, ModelStatistics],
    output_dir: Path,
    *,
    rows_of: Sequence[Prompt],
) -> None:
    """Write results.json, per_example.jsonl (a line a model and row) and samples.jsonl (a line a completion)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(_json(results, indent=1), encoding="utf-8")
    with (output_dir / "per_example.jsonl").open("w", encoding="utf-8") as file:
        for name, statistics in found.items():
            for i, prompt in enumerate(rows_of):
                likelihood = statistics.likelihood[i]
                record = {
                    "model": name,
                    "key": prompt.key,
                    "prompt": prompt.messages_or_text,
                    "references": list(prompt.columns.get("references", ())),
                    **{
                        key: likelihood[key] for key in ("nll", "tokens", "sequence_logprob", "p_correct") if likelihood
                    },
                    "strategies": {s: rows[i] for s, rows in statistics.strategies.items()},
                }
                file.write(_json(record) + "\n")
    with (output_dir / "samples.jsonl").open("w", encoding="utf-8") as file:
        for statistics in found.values():
            for record in statistics.samples:
                file.write(_json(record) + "\n")


def _json(value: Any, **options: Any) -> str:
    return json.dumps(finite_or_null(value), ensure_ascii=False, allow_nan=False, **options)
