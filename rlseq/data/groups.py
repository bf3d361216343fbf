"""Groups of rows by the value of a column (`--group_column`): tasks, languages, levels of difficulty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlseq.errors import ConfigError, did_you_mean
from rlseq.types import Prompt, column_names

MOST_GROUPS = 50


def group_of(prompt: Prompt, column: str) -> Any:
    """The group of a prompt: its value in the column; None where it has none."""
    return prompt.columns.get(column)


def rows_by_group(prompts: Sequence[Prompt], column: str) -> list[tuple[Any, list[int]]]:
    """(value, places of the prompts that have it) of each group, in the order in which they come."""
    found: dict[str, tuple[Any, list[int]]] = {}
    for place, prompt in enumerate(prompts):
        value = group_of(prompt, column)
        found.setdefault(_text(value), (value, []))[1].append(place)
    return list(found.values())


def group_name(value: Any) -> str:
    """The group in names of metrics, `group/NAME/...`: a text as it is, anything else as JSON; no two are equal."""
    plain = isinstance(value, str) and value and "/" not in value and _text(value) == f'"{value}"'
    return value if plain and not _is_json(value) else _text(value)


def check_groups(prompts: Sequence[Prompt], column: str, what: str = "the data") -> None:
    """Refuse a column that does not make groups.

    Raises:
        ConfigError: no prompt has the column, or it has too many values.
    """
    names = column_names(prompts)
    if all(column not in prompt.columns for prompt in prompts):
        raise ConfigError(
            f"--group_column {column!r} is no column of {what}; there are {', '.join(names)}."
            + did_you_mean(column, names)
        )
    count = len(rows_by_group(prompts, column))
    if count > MOST_GROUPS:
        raise ConfigError(
            f"--group_column {column!r} has {count:,} values in {what}; expected at most {MOST_GROUPS}, a group each"
        )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
