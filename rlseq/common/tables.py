"""Tables as text for the terminal and for log files, laid out by rich."""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Sequence
from typing import Any

from rlseq.common.escapes import visible


def terminal_width() -> int:
    """Columns of the terminal, at least 60; 110 in a log file, which has no width of its own."""
    return max(60, shutil.get_terminal_size((110, 24)).columns)


def render_table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), right: Collection[int] = ()) -> str:
    """Return rows as aligned columns; text that is wider than the terminal is wrapped within its column.

    Args:
        rows: cells, shown by their `str`.
        header: a name per column; with none there is no header line.
        right: indices of columns that are aligned to the right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=bool(header))
    for column in range(len(header or rows[0])):
        name = Text(visible(header[column])) if header else ""
        first = bool(header) and column == 0  # names, which are searched for and copied
        table.add_column(name, justify="right" if column in right else "left", overflow="fold", no_wrap=first)
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    text = io.StringIO()
    Console(file=text, width=terminal_width(), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
