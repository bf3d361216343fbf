"""Records of a run on disk: JSON written whole, lines appended, and lines trimmed when a run is continued."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.training.run.faults import writing


def trim_jsonl(path: Path, step: int) -> None:
    """Keep the records whose "step" is at most `step`.

    Later ones, summaries (`"summary": true`) and lines cut short by a crash go. A file without a record left
    is removed; one without a record to drop is not touched. A record without a step is somebody's own, and stays.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = list(file)  # not str.splitlines, which also splits at line separators inside of texts
    kept = [line for line in lines if _is_kept(line, step)]
    if not kept:
        path.unlink()
    elif len(kept) < len(lines):
        _replace_text(path, "".join(kept))


def first_record(path: Path) -> Any:
    """The first line of a file of JSON lines, None where there is no whole one."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            return json.loads(file.readline())
        except json.JSONDecodeError:
            return None


def _is_kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return True
    return line.endswith("\n") and record["step"] <= step and not record.get("summary", False)


def json_ready(value: Any) -> Any:
    """Return the value in JSON's types: NaN and infinities as null, NumPy and torch scalars as numbers.

    Raises:
        TypeError: for an object that has no such form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(element) for element in value]
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return json_ready(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) has no form in JSON.")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one whole."""
    text = visible(json.dumps(json_ready(value), ensure_ascii=False, indent=2, allow_nan=False))
    _replace_text(Path(path), text + "\n")


def append_jsonl(path: str | os.PathLike, records: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    """Append one record, or several, one per line, in one write; missing folders are made."""
    if isinstance(records, Mapping):
        records = [records]
    lines = [visible(json.dumps(json_ready(one), ensure_ascii=False, allow_nan=False)) + "\n" for one in records]
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
