"""Rows of several data sets as one: all of them, or mixed by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.data.files import copied_with
from rlseq.errors import DataError

COLUMN = "dataset"  # of a row, the name of its data set


def joined(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """All rows, one data set after the other, with the column `dataset`."""
    return [row for name, mine in rows.items() for row in _named(name, mine)]


def mixed(rows: Mapping[str, Sequence[Mapping[str, Any]]], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """As many rows as there are, of which each data set has its share by weight, with the column `dataset`.

    Of a data set of n rows that is to have m, row floor(k n / m) is taken for k = 0 .. m − 1. So each row comes
    floor(m / n) or ceil(m / n) times, and of too many rows those at equal distances are taken. The data sets
    alternate as evenly as their shares allow, so that the first rows are a mixture too.
    """
    total = sum(map(len, rows.values()))
    places = []
    for number, (name, mine) in enumerate(rows.items()):
        named, count = _named(name, mine), max(1, round(weights[name] * total))
        places += [((k + 0.5) / count, number, named[k * len(named) // count]) for k in range(count)]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]


def _named(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if any(COLUMN in row for row in rows):
        raise DataError(
            f"the data set {name!r} has a column {COLUMN!r}, where a mixture keeps each row's data set; rename it"
        )
    return [copied_with(row, {COLUMN: name}) for row in rows]
