"""json, jsonl, csv and parquet files as they are written, and what makes one unreadable."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rlseq.common.escapes import shortened
from rlseq.errors import DataError

FORMATS = (".json", ".jsonl", ".csv", ".parquet")


def format_of(file: Path) -> str | None:
    """Return the suffix in FORMATS that a file's name ends in, before `.gz` of what gzip compresses; None for others.

    Parquet compresses its own columns: with `.gz` it is none of the formats.
    """
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    return suffix if suffix in FORMATS and not (suffix == ".parquet" and file.suffix == ".gz") else None


def open_file(file: Path, mode: str = "rt", **options: Any) -> IO[Any]:
    return gzip.open(file, mode, **options) if file.suffix == ".gz" else file.open(mode, **options)


def text_of(file: Path) -> str:
    with open_file(file, encoding="utf-8-sig") as lines:
        return lines.read()


def numbers_as_written(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Type the columns of a csv file, whose fields are text, so that `str` of every value is what stands in the file.

    A column is numbers where each is written as Python writes it, so 007, 1.50 and 1e5 stay text; likewise True and
    False. An empty field is None in every column.
    """
    readers = {}
    for column in dict.fromkeys(name for row in rows for name in row):
        fields = {row[column] for row in rows if column in row} - {""}
        readers[column] = next((read for read in (_number, _truth) if all(read(f) is not None for f in fields)), str)
    return [{name: readers[name](field) if field else None for name, field in row.items()} for row in rows]


def _number(field: str) -> int | float | None:
    for read in (int, float):
        try:
            value = read(field)
        except ValueError:
            continue
        if str(value) == field and math.isfinite(value):
            return value
    return None


def _truth(field: str) -> bool | None:
    return {"True": True, "False": False}.get(field)


def encoding_fault(file: Path) -> str | None:
    with open_file(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"{file}, line {number}: byte 0x{byte:02x} is not UTF-8; expected text in UTF-8"
    return None


def json_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a list, or of mappings one after the other, each with its place in words."""
    text = text_of(file)
    begins = text.lstrip()[:1]
    if not begins:
        raise DataError(f"{str(file)!r} is empty; expected rows")
    found: list[tuple[str, Any]] = []
    if begins == "[" or (format_of(file) == ".json" and begins != "{"):
        try:
            whole = _parse(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {error.lineno}: {_not_json(error)}; expected a list of mappings of column to value"
            ) from None
        found = [(f"row {number}", row) for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1)]
        if not found:
            raise DataError(f"{str(file)!r} is an empty list; expected rows")
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append((f"line {number}", _parse(line)))
            except json.JSONDecodeError as error:
                if format_of(file) == ".json" and not found and (row := _one_mapping(text)) is not None:
                    return [("row 1", row)]
                raise DataError(
                    f"{file}, line {number}: {_not_json(error)}; expected one mapping of column to value per line"
                ) from None
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, {place}: {shortened(row, 60)} is not a row; expected a mapping of column to value"
            )
        if not row:
            raise DataError(f"{file}, {place}: the row has no columns; expected a mapping of column to value")
    return found


def _one_mapping(text: str) -> dict[str, Any] | None:
    """The mapping that a text of several lines holds, or None."""
    try:
        return _parse(text) or None
    except json.JSONDecodeError:
        return None


def _parse(text: str) -> Any:
    """Read JSON strictly: no key twice in a mapping, no half of a surrogate pair in a text."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise json.JSONDecodeError(f"{name!r} is given twice", text, 0)
        return found

    try:
        value = json.loads(text, object_pairs_hook=distinct)
        if "\\u" in text:  # nothing else makes half a pair of a text in UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError("half of a surrogate pair", text, 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a whole number with more digits than Python reads
        raise json.JSONDecodeError(str(error).split(";")[0], text, 0) from None
    return value


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg}{f', at character {error.colno}' if error.pos else ''})"


def csv_records(file: Path, *, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record of a csv file begins (from 1) and its fields; blank lines are left out."""
    csv.field_size_limit(sys.maxsize)
    with open_file(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=strict)
        begins = 1
        for fields in reader:
            if fields:
                yield begins, fields
            begins = reader.line_num + 1


def csv_rows(file: Path) -> list[dict[str, str]]:
    """The fields of a csv file by column, as text; a row with fewer or more fields than columns is refused (a truncated
    file has one), and so is a quote that is never closed."""
    fault = _csv_fault(file, strict=False)
    if fault is None and (found := _csv_fault(file, strict=True)) and "unexpected end of data" in found:
        fault = found
    if fault is not None:
        raise DataError(fault)
    (_, header), *records = csv_records(file, strict=False)
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    return [dict(zip(names, fields, strict=True)) for _, fields in records]


def _csv_fault(file: Path, *, strict: bool) -> str | None:
    header: list[str] | None = None
    last = 1
    try:
        for line, fields in csv_records(file, strict=strict):
            last = line
            if header is None:
                header = fields
                if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                    return f"{file}, line {line}: the one column {header[0]!r}; expected commas between columns"
                twice = next((name for name in header if name and header.count(name) > 1), None)
                if twice is not None:
                    return f"{file}, line {line}: {twice!r} names two columns; expected a name for each, once"
            elif len(fields) != len(header):
                columns = ", ".join(header)
                return (
                    f"{file}, line {line}: {len(fields)} field{'s' * (len(fields) != 1)}; expected {len(header)} "
                    f"({columns if len(columns) <= 200 else columns[:200] + '...'})"
                )
    except UnicodeDecodeError:
        return encoding_fault(file)
    except csv.Error as error:
        return f"{file}, after line {last}: not valid csv ({error}); expected quotes that are closed"
    if header is None:
        return f"{str(file)!r} is empty; expected a line of column names, and rows"
    if last == 1:
        return f"{str(file)!r} has a line of column names and no rows"
    return None


def parquet_fault(file: Path) -> str | None:
    """What is wrong with a truncated or damaged parquet file, and in which rows; None if nothing is."""
    import pyarrow
    import pyarrow.parquet

    if file.stat().st_size == 0:
        return f"{str(file)!r} is empty; expected rows"
    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        return f"{str(file)!r} is not a complete parquet file ({_first_line(error)}); it may be truncated"
    with opened:
        begins = 1
        for group in range(opened.num_row_groups):
            ends = begins + opened.metadata.row_group(group).num_rows - 1
            for column in opened.schema_arrow.names:
                try:
                    opened.read_row_group(group, columns=[column]).to_pylist()
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    return (
                        f"{file}, rows {begins} to {ends}: the column {column!r} cannot be read ({_first_line(error)})"
                    )
            begins = ends + 1
    return None if begins > 1 else f"{str(file)!r} has no rows"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
