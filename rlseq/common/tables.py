"""Tables as text for the terminal and for log files, laid out by rich."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rlseq.common.escapes import visible

GAP = 2  # between columns


def terminal_width() -> int:
    """Columns of the terminal, at least 60; 120 in a log file, which has no width of its own."""
    return max(60, shutil.get_terminal_size((120, 24)).columns)


def render_table(
    rows: Sequence[Sequence[Any]], header: Sequence[str] = (), right: Collection[int] = (), *, keys: int = 1
) -> str:
    """Return rows as aligned columns that are together no wider than the terminal.

    Text is wrapped within its column. Numbers are not: the headings above them are wrapped, and columns that still
    find no room follow in a second table below, with the first columns again.

    Args:
        rows: cells, shown by their `str`.
        header: a name per column; with none there is no header line.
        right: indices of columns of numbers, which are aligned to the right.
        keys: how many of the first columns say what a row is of.
    """
    cells = [[visible(str(cell)) for cell in row] for row in rows]
    names = [visible(name) for name in header]
    if names and table_width(cells, names) > terminal_width():
        names = [wrap_heading(name, (row[i] for row in cells)) if i in right else name for i, name in enumerate(names)]
    others = range(keys, len(names or cells[0]))
    parts = list(_parts(cells, names, keys)) if set(others) <= set(right) else [others]
    chosen = [[*range(keys), *part] for part in parts]
    return "\n\n".join(
        _render([[row[i] for i in columns] for row in cells], [names[i] for i in columns if names], right, columns)
        for columns in chosen
    )


def wrap_heading(name: str, cells: Iterator[str]) -> str:
    """A heading broken after spaces and underscores, as wide as its longest word and the cells below it."""
    words = re.findall(r"[^ _]*[ _]|[^ _]+", name)
    width = max(len(word.rstrip()) for word in [*words, *cells])
    lines = [""]
    for word in words:
        if len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def table_width(cells: Sequence[Sequence[str]], names: Sequence[str] = ()) -> int:
    """Columns of the terminal that a table takes with nothing wrapped."""
    widths = _widths(cells, names)
    return sum(widths) + GAP * (len(widths) - 1)


def _widths(cells: Sequence[Sequence[str]], names: Sequence[str]) -> list[int]:
    from rich.cells import cell_len

    columns = zip(*cells, *([names] if names else []), strict=True)
    return [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]


def _parts(cells: Sequence[Sequence[str]], names: Sequence[str], keys: int) -> Iterator[list[int]]:
    """Columns after the keys, in tables that are each no wider than the terminal."""
    widths = _widths(cells, names)
    room = terminal_width() - sum(min(width, terminal_width() // 2 // keys) + GAP for width in widths[:keys])
    part: list[int] = []
    for i in range(keys, len(widths)):
        if part and sum(widths[j] + GAP for j in [*part, i]) - GAP > room:
            yield part
            part = []
        part.append(i)
    yield part


def _render(
    cells: Sequence[Sequence[str]], names: Sequence[str], right: Collection[int], columns: Sequence[int]
) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=bool(names))
    widths = _widths(cells, names)
    for i, column in enumerate(columns):
        is_number = column in right
        is_name = bool(names) and i == 0 and widths[0] <= terminal_width() // 2  # searched for and copied: one line
        table.add_column(
            Text(names[i]) if names else "",
            justify="right" if is_number else "left",
            vertical="bottom",
            overflow="fold",
            no_wrap=is_number or is_name,
        )
    for row in cells:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=terminal_width(), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
