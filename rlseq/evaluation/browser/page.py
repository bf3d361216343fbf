"""Writes the browser page: numbers of every rollout in one compressed block, texts in blocks that are read when shown.

The page opens from disk and loads nothing. Its data are gzip in base64, which holds no character that HTML or a script
could read as markup; browse.js shows every text as text. Numbers are columns, so that filtering 200,000 rollouts
touches typed arrays alone; the texts of `BLOCK` rollouts are decompressed when one of them is shown or searched.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.rollout_files import no_rollouts, read_records, rollout_files
from rlseq.evaluation.browser.token_lengths import TokenLengths
from rlseq.types import transcript

FILE_NAME = "rollouts.html"
SMALL = 20_000  # rollouts of which a training run writes the page unasked
BLOCK = 1_000  # texts decompressed together
HERE = Path(__file__).parent
NOTHING = math.nan
FIRST = 35  # small numbers are written as characters from this code point on, past the quotation mark
LEAST = 92  # log-probs of -9.2 and less are not told apart: one character of ASCII
LONGEST = 0xD7FF - FIRST  # the last code point before the surrogates


class Codes:
    """Names as numbers in the order in which they are first met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


def write_page(runs: Sequence[str | Path], output: Path) -> int:
    """Write the page of one run or two; returns the number of rollouts.

    Raises:
        RunDirectoryError: a run does not exist, or has no rollouts.
        FormatError: a log is of a version that cannot be read.
    """
    runs = [Path(run) for run in runs]
    files = [rollout_files(run) for run in runs]
    table = _Table()
    for number, (run, found) in enumerate(zip(runs, files, strict=True)):
        before = table.count
        table.add(number, read_records(found), TokenLengths.of(run))
        if table.count == before:
            raise no_rollouts(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as page:
        title = " and ".join(_names(runs))
        head, tail = (HERE / "template.html").read_text(encoding="utf-8").split("<!-- data -->")
        page.write(head.replace("TITLE", escape(visible(title))))
        for name, block in table.blocks(_names(runs)):
            page.write(f'<script type="text/plain" id="{name}">{base64.b64encode(block).decode()}</script>\n')
        page.write(tail.replace("SCRIPT", (HERE / "browse.js").read_text(encoding="utf-8")))
    partial.replace(output)
    return table.count


def rollouts_at_most(run: str | Path, limit: int) -> bool:
    """Whether the log of a run has this many rollouts or fewer; False for a run without any."""
    files = sorted((Path(run) / "rollouts").glob("*.jsonl"))
    count = 0
    for path in files:
        with path.open("rb") as lines:
            count += sum(1 for _ in lines)
        if count > limit:
            return False
    return count > 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The folder names, or the whole paths where those are equal."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


class _Table:
    """Rollouts as columns and compressed blocks, filled one record at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.numbers = {name: array("i") for name in ("step", "prompt", "sample", "length")}
        self.numbers |= {name: array("f") for name in ("total", "advantage", "logprob")}
        self.small = {name: array("B") for name in ("run", "finish", "status")}
        self.rewards: dict[str, array] = {}
        self.prompt_codes, self.finish, self.status = Codes(), Codes(), Codes()
        self._prompts, self._texts, self._details = _Blocks("p"), _Blocks("t"), _Blocks("d")

    def add(self, run: int, records: Iterable[Mapping[str, Any]], tokens: TokenLengths | None) -> None:
        for record in records:
            prompt = self.prompt_codes(str(record.get("prompt_key", record["prompt"])))
            if prompt == self._prompts.count:
                references = record.get("references") or []
                references = references if isinstance(references, list) else [references]
                self._prompts.add([transcript(record["prompt"]), list(map(str, references))])
            for name in ("step", "sample", "length"):
                self.numbers[name].append(int(record.get(name) or 0))
            self.numbers["prompt"].append(prompt)
            for name in ("total", "advantage", "logprob"):
                self.numbers[name].append(_number(record.get(name)))
            values, status = record.get("values") or {}, record.get("status") or {}
            for name in values:
                if name not in self.rewards:
                    self.rewards[name] = array("f", [NOTHING]) * self.count
            for name, column in self.rewards.items():
                column.append(_number(values.get(name)))
            self.small["run"].append(run)
            self.small["finish"].append(self.finish(str(record.get("finish_reason") or "not logged")))
            self.small["status"].append(sum({1 << self.status(said) for said in status.values()}))
            self._add_texts(record, status, tokens)
            self.count += 1

    def _add_texts(self, record: Mapping[str, Any], status: Mapping[str, str], tokens: TokenLengths | None) -> None:
        """Add what is listed and searched to one block, and what is read of a chosen rollout alone to another."""
        completion = record.get("completion") or ""
        raw = record.get("raw_completion")
        raw = completion if raw is None else raw
        turns = transcript(record["messages"]) if record.get("messages") else None
        self._texts.add([completion, None if raw == completion else raw, turns])
        lengths, logprobs = None, record.get("logprobs") or ()
        if tokens is not None and logprobs and len(logprobs) == len(record.get("completion_ids") or ()):
            lengths = tokens.lengths(record["completion_ids"], raw)
        tenths = [min(LEAST, round(-10 * min(0.0, x))) for x in logprobs]
        details = record.get("details") or {}
        self._details.add(
            [
                _characters(lengths) if lengths else "",
                _characters(tenths) if lengths else "",
                dict(status),
                json.dumps(details, ensure_ascii=False) if any(details.values()) else None,
            ]
        )

    def blocks(self, runs: Sequence[str]) -> Iterable[tuple[str, bytes]]:
        """The id and the compressed bytes of every block; what names the others comes first."""
        columns = [*self.numbers.items(), *((f"reward {name}", column) for name, column in self.rewards.items())]
        columns += self.small.items()
        about = {
            "runs": list(runs),
            "count": self.count,
            "block": BLOCK,
            "prompts": self._prompts.count,
            "rewards": list(self.rewards),
            "finish": list(self.finish.numbers),
            "status": list(self.status.numbers),
            "columns": [[name, column.typecode] for name, column in columns],
        }
        yield "about", _compressed(json.dumps(about, ensure_ascii=False).encode(errors="backslashreplace"))
        yield "numbers", _compressed(b"".join(_little_endian(column) for _, column in columns))
        yield from self._prompts.finished()
        yield from self._texts.finished()
        yield from self._details.finished()


class _Blocks:
    """Records, compressed `BLOCK` at a time as JSON of one list per field."""

    def __init__(self, prefix: str):
        self.prefix, self.count = prefix, 0
        self._open: list[list[Any]] = []
        self._done: list[bytes] = []

    def add(self, record: list[Any]) -> None:
        self._open.append(record)
        self.count += 1
        if len(self._open) == BLOCK:
            self._close()

    def _close(self) -> None:
        fields = list(zip(*self._open, strict=True))
        # a lone surrogate, which UTF-8 cannot hold, stays readable as its escape
        self._done.append(_compressed(json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")))
        self._open = []

    def finished(self) -> Iterable[tuple[str, bytes]]:
        if self._open:
            self._close()
        return ((f"{self.prefix}{number}", block) for number, block in enumerate(self._done))


def _number(value: Any) -> float:
    return NOTHING if value is None else float(value)


def _characters(numbers: Iterable[int]) -> str:
    return "".join(chr(FIRST + min(number, LONGEST)) for number in numbers)


def _compressed(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=6, mtime=0)


def _little_endian(column: array) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()
