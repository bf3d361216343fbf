"""Rows chosen by a column that says how hard they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.common.escapes import shortened
from rlseq.data.files import place_of
from rlseq.data.prompts import columns_of_rows
from rlseq.errors import DataError, did_you_mean


def rows_in_range(
    rows: Sequence[dict[str, Any]], column: str, low: float, high: float
) -> tuple[list[dict[str, Any]], str]:
    """The rows whose number in a column lies in [low, high], and a sentence on how many were dropped.

    Raises:
        DataError: there is no such column, a value in it is not a number, or no row is left.
    """
    columns = columns_of_rows(rows)
    if column not in columns:
        raise DataError(
            f"--curriculum reads the column {column!r}, which the data does not have; its columns are "
            f"{', '.join(columns)}.{did_you_mean(column, columns)} "
            "Write it by `rlseq difficulty DATA --model MODEL`, and give the folder that this makes as --dataset_name."
        )
    values = [_value(row, number, column) for number, row in enumerate(rows)]
    kept = [row for row, value in zip(rows, values, strict=True) if value is not None and low <= value <= high]
    present = [value for value in values if value is not None]
    dropped = {
        f"{sum(value < low for value in present):,} below {low:g}": any(value < low for value in present),
        f"{sum(value > high for value in present):,} above {high:g}": any(value > high for value in present),
        f"{len(values) - len(present):,} without a value": len(present) < len(values),
    }
    why = ", ".join(text for text, there in dropped.items() if there)
    said = f"--curriculum keeps {len(kept):,} of {len(rows):,} rows by {column}{f': {why}' if why else ''}"
    if not kept:
        raise DataError(f"{said}. Give a wider range, or measure again from the checkpoint that is trained.")
    return kept, said


def _value(row: Mapping[str, Any], number: int, column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise DataError(f"{place_of(row, number)}: the column {column!r} is {shortened(value)}; expected a number")
    return value
