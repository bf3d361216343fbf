"""Data files: their rows as written, where a row is, and what makes a file unreadable.

A json, jsonl or csv file may be compressed by gzip (`train.jsonl.gz`).

json and csv are read here and not by `datasets`, which keeps rows as Arrow columns of one type each: there 5 beside 0.5
is 5.0, a date is no text, and a key that a row lacks is None.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rlseq.errors import DataError

FORMATS = (".json", ".jsonl", ".csv", ".parquet")
OTHER_COMPRESSIONS = (".bz2", ".lz4", ".xz", ".zip", ".zst")


def format_of(file: Path) -> str | None:
    """Return the suffix in FORMATS that a file's name ends in, before `.gz` of what gzip compresses; None for others.

    Parquet compresses its own columns: with `.gz` it is none of the formats.
    """
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    return suffix if suffix in FORMATS and not (suffix == ".parquet" and file.suffix == ".gz") else None


def seems_data(file: Path) -> bool:
    """Whether a file in a folder is taken for data: of a format that is read, or compressed in a way that is not."""
    packed = file.suffix in (*OTHER_COMPRESSIONS, ".gz")
    return format_of(file) is not None or (packed and Path(file.stem).suffix in FORMATS)


def _open(file: Path, mode: str = "rt", **options: Any) -> IO[Any]:
    return gzip.open(file, mode, **options) if file.suffix == ".gz" else file.open(mode, **options)


def _text_of(file: Path) -> str:
    with _open(file, encoding="utf-8-sig") as lines:
        return lines.read()


class Row(dict):
    """A row that knows where it came from: the files of its split, and its number in them together, from 0."""

    __slots__ = ("files", "number")

    def __init__(self, columns: dict[str, Any], files: Sequence[Path], number: int):
        super().__init__(columns)
        self.files = files
        self.number = number


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
    """Where each row of a file stands, in words; None where that cannot be told."""
    try:
        if format_of(file) == ".parquet":
            import pyarrow.parquet

            return [f"row {n + 1}" for n in range(pyarrow.parquet.read_metadata(file).num_rows)]
        if format_of(file) == ".csv":
            return [f"line {line}" for line, _ in _csv_records(file, strict=False)][1:]
        text = _text_of(file)
        if text.lstrip().startswith("["):
            return [f"row {n + 1}" for n in range(len(json.loads(text)))]
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [f"line {number}" for number, line in lines if isinstance(json.loads(line), dict)]
    except (OSError, ValueError, RecursionError, csv.Error):
        return None  # of a format that is read, but not one row per line


def read_rows(files: Sequence[Path]) -> list[Row]:
    """Return the rows of json, jsonl or csv files with the values and keys as written.

    A row has the keys that its line has, in their order: null is None, and a key left out is left out.

    Raises:
        DataError: a file cannot be read; names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += _csv_rows(file) if format_of(file) == ".csv" else [row for _, row in _json_rows(file)]
        except UnicodeDecodeError:
            raise DataError(_encoding_fault(file) or f"{file}: not UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{str(file)!r} is not a whole gzip file ({error}); it may have been cut short") from None
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


def _encoding_fault(file: Path) -> str | None:
    with _open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"{file}, line {number}: byte 0x{byte:02x} is not UTF-8; expected text in UTF-8"
    return None


def _json_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a list, or of mappings one after the other, each with its place in words."""
    text = _text_of(file)
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
            raise DataError(f"{file}, {place}: {_shown(row)} is no row; expected a mapping of column to value")
        if not row:
            raise DataError(f"{file}, {place}: the row has no columns; expected a mapping of column to value")
    return found


def _one_mapping(text: str) -> dict[str, Any] | None:
    """The one mapping that a text of several lines is, or None."""
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _csv_records(file: Path, *, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record of a csv file begins (from 1) and its fields; blank lines are left out."""
    csv.field_size_limit(sys.maxsize)
    with _open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=strict)
        begins = 1
        for fields in reader:
            if fields:
                yield begins, fields
            begins = reader.line_num + 1


def _csv_rows(file: Path) -> list[dict[str, str]]:
    """The fields of a csv file by column, as text; a row with fewer or more fields than there are columns is refused,
    as a file cut short has, and so is a quote that is never closed."""
    fault = _csv_fault(file, strict=False)
    if fault is None and (found := _csv_fault(file, strict=True)) and "unexpected end of data" in found:
        fault = found
    if fault is not None:
        raise DataError(fault)
    (_, header), *records = _csv_records(file, strict=False)
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    return [dict(zip(names, fields, strict=True)) for _, fields in records]


def _csv_fault(file: Path, *, strict: bool) -> str | None:
    header: list[str] | None = None
    last = 1
    try:
        for line, fields in _csv_records(file, strict=strict):
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
        return _encoding_fault(file)
    except csv.Error as error:
        return f"{file}, after line {last}: not valid csv ({error}); expected quotes that are closed"
    if header is None:
        return f"{str(file)!r} is empty; expected a line of column names, and rows"
    if last == 1:
        return f"{str(file)!r} has a line of column names and no rows"
    return None


def parquet_fault(file: Path) -> str | None:
    """What is wrong with a parquet file that is not whole, with its rows; None where nothing is found."""
    import pyarrow
    import pyarrow.parquet

    if file.stat().st_size == 0:
        return f"{str(file)!r} is empty; expected rows"
    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        return f"{str(file)!r} is no whole parquet file ({_first_line(error)}); it may have been cut short"
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
