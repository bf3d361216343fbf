"""Data files: their rows as written, and the place of each row.

A json, jsonl or csv file may be compressed by gzip (`train.jsonl.gz`).

json and csv are read here and not by `datasets`, which keeps rows as Arrow columns of one type each: there 5 beside 0.5
is 5.0, a date is not text, and a key that a row lacks is None.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlseq.data.parse import (
    FORMATS,
    csv_records,
    csv_rows,
    encoding_fault,
    format_of,
    json_rows,
    numbers_as_written,
    text_of,
)
from rlseq.errors import DataError

OTHER_COMPRESSIONS = (".bz2", ".lz4", ".xz", ".zip", ".zst")


def seems_data(file: Path) -> bool:
    """Whether a file in a folder counts as data: its format is read, or it is compressed in a way that is not read."""
    packed = file.suffix in (*OTHER_COMPRESSIONS, ".gz")
    return format_of(file) is not None or (packed and Path(file.stem).suffix in FORMATS)


class Row(dict):
    """A row that knows its place: the files of its split, and its number in all of them, from 0."""

    __slots__ = ("files", "number")

    def __init__(self, columns: dict[str, Any], files: Sequence[Path], number: int):
        super().__init__(columns)
        self.files = files
        self.number = number


def copied_with(row: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """A copy of a row with further columns, which knows its place if the row does."""
    columns = {**row, **columns}
    return Row(columns, row.files, row.number) if isinstance(row, Row) else columns


def rows_of(columns: Iterable[dict[str, Any]], files: Sequence[Path]) -> list[Row]:
    """Give each row its place in the files that were read, in their order, to the end."""
    return [Row(row, files, number) for number, row in enumerate(columns)]


def place_of(row: Any, number: int) -> str:
    """Say where a row is: `"FILE, line 3"`, or `"row 2"` (from 0) of the rows at hand where no file is known."""
    if isinstance(row, Row):
        before = 0
        for file in row.files:
            places = _places(file)
            if places is None:
                break
            if row.number - before < len(places):
                return f"{file}, {places[row.number - before]}"
            before += len(places)
    return f"row {number}"


def _places(file: Path) -> list[str] | None:
    """The place of each row of a file, in words; None if it is not known."""
    try:
        if format_of(file) == ".parquet":
            import pyarrow.parquet

            return [f"row {n + 1}" for n in range(pyarrow.parquet.read_metadata(file).num_rows)]
        if format_of(file) == ".csv":
            return [f"line {line}" for line, _ in csv_records(file, strict=False)][1:]
        text = text_of(file)
        if text.lstrip().startswith("["):
            return [f"row {n + 1}" for n in range(len(json.loads(text)))]
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [f"line {number}" for number, line in lines if isinstance(json.loads(line), dict)]
    except (OSError, ValueError, RecursionError, csv.Error):
        return None  # its format is read, but not as one row per line


def read_rows(files: Sequence[Path]) -> list[Row]:
    """Return the rows of json, jsonl or csv files with the values and keys as written.

    A row has the keys that its line has, in their order: null is None, and a key left out is left out.

    Raises:
        DataError: a file cannot be read; names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += csv_rows(file) if format_of(file) == ".csv" else [row for _, row in json_rows(file)]
        except UnicodeDecodeError:
            raise DataError(encoding_fault(file) or f"{file}: not UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{str(file)!r} is not a complete gzip file ({error}); it may be truncated") from None
    return rows_of(numbers_as_written(rows) if format_of(files[0]) == ".csv" else rows, files)


def rows_of_dataset(rows: Any) -> list[dict[str, Any]]:
    """Return rows as a list; those of a data set of `datasets` without the keys that a row lacks.

    Arrow keeps a column, and a field of a struct, for every row, and null where a row has none.
    """
    if hasattr(rows, "features") and hasattr(rows, "to_list"):
        return [_present(row) for row in rows.to_list()]
    return list(rows)


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
