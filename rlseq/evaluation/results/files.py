"""A contrast on disk: results.json, and the rows of statistics and completions that it comes from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.formats import RESULTS, Format
from rlseq.data.groups import group_of
from rlseq.errors import DataError
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.measure.documents import DOCUMENT, Coding, DocumentStatistics
from rlseq.evaluation.results.clusters import clusters_of
from rlseq.evaluation.statistics import COMPLETION, LIKELIHOOD, RowStatistics, rows_as_json, rows_from_json
from rlseq.evaluation.studies.compression import document_records
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


def read_jsonl(path: Path, file_format: Format | None = None) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; with a format, only of a version that this rlseq reads."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for record in records if file_format is not None else ():
        file_format.check(record, path)
    return records


def say_replaced(folder: Path) -> None:
    """Say of a finished evaluation in a folder that the one which begins, or is joined, takes its place."""
    path = folder / "results.json"
    if not path.is_file():
        return
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        what = f" (of {', '.join(results['models'])}{f' on {name}' if (name := results.get('data_name')) else ''})"
    except (OSError, ValueError, KeyError, TypeError):
        what = ""
    said = f"rlseq: {folder} holds an earlier evaluation{what}, which this one replaces once it is finished"
    print(visible(said), flush=True)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation as its files have it."""

    path: Path  # of results.json
    results: Mapping[str, Any]
    prompts: Sequence[Prompt]  # keys, prompts and references of the R rows
    found: Mapping[str, ModelStatistics]


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
    file, so that evaluations can be joined (rlseq.evaluation.results.compare); results.json comes last: with it the
    rest is whole.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "studies.jsonl", "documents.jsonl"):
        (output_dir / name).unlink(missing_ok=True)
    clusters = clusters_of(results["spec"]["settings"].get("cluster_column"), rows_of)
    column = results.get("groups", {}).get("column")
    places = [(name, statistics, i) for name, statistics in found.items() for i in range(len(rows_of))]
    _write_jsonl(
        output_dir / "per_example.jsonl",
        (
            {
                "model": name,
                "key": rows_of[i].key,
                "prompt": rows_of[i].prompt,
                "references": list(rows_of[i].columns.get("references", ())),
                **({} if clusters is None else {"cluster": clusters[i]}),
                **({} if column is None else {"group": group_of(rows_of[i], column)}),
                "likelihood": _as_json(statistics.likelihood[i], LIKELIHOOD.source),
                "strategies": {s: _as_json(rows[i], COMPLETION.source) for s, rows in statistics.strategies.items()},
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
                "studies": {study: _as_json(rows[i], study) for study, rows in statistics.studies.items()},
            }
            for name, statistics, i in places
        )
        _write_jsonl(output_dir / "studies.jsonl", studies)
    coded = {name: statistics.documents for name, statistics in found.items() if statistics.documents is not None}
    if coded:
        _write_jsonl(output_dir / "documents.jsonl", document_records(coded))
    (output_dir / "results.json").write_text(_json(results, indent=1), encoding="utf-8")


def read_evaluation(path: str | Path) -> Evaluation:
    """Read a finished evaluation from its results.json, or the folder of that, and the files beside it.

    Raises:
        DataError: a file is missing, truncated or of another evaluation or version.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"there is no evaluation at {str(path)!r}. Expected the results.json of a finished one, or its folder; one "
            "that was cut short has none."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not valid JSON ({error}); evaluate again") from error
    RESULTS.check(results, path)
    missing = [key for key in ("spec", "models", "reward_funcs", "oracles", "data_name") if key not in results]
    if missing:
        raise DataError(f"{str(path)!r} has no {', '.join(missing)}, which an evaluation writes. Evaluate again.")
    rows = results["rows"]
    found = {
        name: ModelStatistics(entry["path"], [{}] * rows, {strategy: [{}] * rows for strategy in entry["strategies"]})
        for name, entry in results["models"].items()
    }
    prompts: list[Prompt] = []
    for (name, row), record in _each_row(path.parent / "per_example.jsonl", found, rows):
        if len(prompts) == row:
            columns: dict[str, Any] = {"references": tuple(record["references"])}
            if "cluster" in record:
                columns[results["spec"]["settings"]["cluster_column"]] = record["cluster"]
            if "groups" in results:
                columns[results["groups"]["column"]] = record["group"]
            prompts.append(Prompt(record["key"], record["prompt"], (), columns))
        elif prompts[row].key != record["key"]:
            raise DataError(f"{path.parent / 'per_example.jsonl'}: row {row} of {name} is not that of the first model")
        found[name].likelihood[row] = _from_json(record["likelihood"], LIKELIHOOD.source)
        for strategy, statistics in found[name].strategies.items():
            statistics[row] = _from_json(record["strategies"][strategy], COMPLETION.source)
    studies = results["spec"]["settings"]["studies"]
    for statistics in found.values():
        statistics.studies = {study: [{}] * rows for study in studies}
    if studies:
        for (name, row), record in _each_row(path.parent / "studies.jsonl", found, rows):
            for study, statistics in found[name].studies.items():
                statistics[row] = _from_json(record["studies"][study], study)
    for record in _read_lines(path.parent / "samples.jsonl"):
        found[record["model"]].samples.append(record)
    _check_samples(path.parent / "samples.jsonl", found)
    for name, entry in results.get("documents", {}).get("models", {}).items():
        coding = Coding(entry["context"], entry["stride"], None, entry["vocabulary"])
        found[name].documents = DocumentStatistics(coding, entry["start"], [])
    if "documents" in results:
        file = path.parent / "documents.jsonl"
        coded = {name: found[name] for name in results["documents"]["models"]}
        for (name, _), record in _each_row(file, coded, results["documents"]["documents"]):
            row = {text: value for text, value in record.items() if text not in ("model", "document")}
            found[name].documents.rows.append(_from_json(row, DOCUMENT.source))
    return Evaluation(path, results, prompts, found)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"there is no {str(path)!r}, which belongs to the results.json beside it; evaluate again")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is truncated: {error}. Evaluate again.") from error


def _each_row(
    path: Path, found: Mapping[str, ModelStatistics], rows: int
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """(model, row) and the record of each, which stand in that order."""
    expected = [(name, row) for name in found for row in range(rows)]
    records = list(_read_lines(path))
    if [record.get("model") for record in records] != [name for name, _ in expected]:
        raise DataError(
            f"{path} has {len(records)} lines of {', '.join(dict.fromkeys(str(r.get('model')) for r in records))}; "
            f"expected {rows} of each of {', '.join(found)}, as the results.json beside it says. Evaluate again."
        )
    return zip(expected, records, strict=True)


def _check_samples(path: Path, found: Mapping[str, ModelStatistics]) -> None:
    for name, statistics in found.items():
        on_file = Counter(record["strategy"] for record in statistics.samples)
        for strategy, rows in statistics.strategies.items():
            counted = int(sum(row.get(COMPLETION("samples"), 0) for row in rows))
            if on_file[strategy] != counted:
                raise DataError(
                    f"{path} has {on_file[strategy]} completions of {name} under {strategy}; expected {counted}. It is "
                    "truncated, or of another evaluation: evaluate again."
                )


def _as_json(row: RowStatistics, source: str) -> dict[str, Any]:
    return rows_as_json([row], source)[0]


def _from_json(row: Mapping[str, Any], source: str) -> RowStatistics:
    return rows_from_json([row], source)[0]


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(_json(record) + "\n")


def _json(value: Any, **options: Any) -> str:
    return visible(json.dumps(finite_or_null(value), ensure_ascii=False, allow_nan=False, **options))
