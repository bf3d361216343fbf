"""Rollouts read from logs, and their rewards under other reward functions."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlseq.common.formats import ROLLOUTS
from rlseq.errors import RewardError, RunDirectoryError
from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.table import ScoreTable
from rlseq.types import ABSENT, Rollout, ScoredRollout

# what a run logs of a rollout; any other key of a record is a column
LOGGED = frozenset(
    (
        *("step", "prompt_key", "key", "sample", "model", "strategy", "finish_reason", "length"),
        *("completion", "completion_ids", "raw_completion", "messages", "logprobs", "logprob"),
        *("values", "status", "details", "total", "advantage"),
        *("rollout_columns", "unlogged_columns", "column_hashes", ROLLOUTS.key),
    )
)

OPTIONAL = ("completion_ids", "raw_completion", "logprobs", "finish_reason")


@dataclass(frozen=True)
class Logged:
    """Rollouts of a log with their columns and the records they were read from; equal lengths, same order.

    `absent` names the fields of a rollout that some record lacks: their stand-ins in the rollouts are not values.
    """

    rollouts: list[Rollout]
    columns: dict[str, list[Any]]
    records: list[dict[str, Any]]
    absent: frozenset[str] = frozenset()


def read_rollouts(path: Path) -> Logged:
    """Read rollouts from a jsonl file, or from all of a run's `rollouts/`.

    A record needs `prompt` and `completion`. Token ids, log-probs, the raw text and the finish reason may be absent, as
    where the completions were written by hand; a reward that asks for them then raises RewardError.

    Raises:
        RunDirectoryError: there are none.
        RewardError: a line is not a record of a rollout.
        FormatError: the log is of a version that cannot be read.
    """
    path = Path(path)
    if path.is_file():
        files = [path]
    else:
        folder = path / "rollouts" if (path / "rollouts").is_dir() else path
        files = sorted(folder.glob("**/*.jsonl")) if folder.is_dir() else []
    if not files:
        raise RunDirectoryError(f"{path} has no rollouts; expected a jsonl file, or a run directory with rollouts/.")
    found = [pair for file in files for pair in _records(file)]
    if not found:
        raise RunDirectoryError(f"{path} has no rollouts: {len(files)} files, all empty.")
    records, rollouts = [record for record, _ in found], [rollout for _, rollout in found]
    names = dict.fromkeys(name for record in records for name in record if name not in LOGGED)
    columns = {name: [record.get(name, ABSENT) for record in records] for name in names}
    extra = dict.fromkeys(name for record in records for name in record.get("rollout_columns", {}))
    columns |= {name: [record.get("rollout_columns", {}).get(name, ABSENT) for record in records] for name in extra}
    absent = frozenset(name for name in OPTIONAL if any(record.get(name) is None for record in records))
    return Logged(rollouts, columns, records, absent)


def _records(file: Path) -> Iterable[tuple[dict[str, Any], Rollout]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise RewardError(f"{file}, line {number} is not valid JSON: {error}.") from error
            ROLLOUTS.check(record, file)
            if not isinstance(record, dict) or not {"prompt", "completion"} <= record.keys():
                given = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise RewardError(f"{file}, line {number} has {given}; expected prompt and completion among its keys.")
            if not isinstance(record["completion"], str):
                raise RewardError(f"{file}, line {number}: the completion is {record['completion']!r}; expected text.")
            if not isinstance(columns := record.get("rollout_columns", {}), dict):
                raise RewardError(f"{file}, line {number}: rollout_columns is {columns!r}; expected values by column.")
            try:
                rollout = _rollout(record)
            except (TypeError, ValueError) as error:
                raise RewardError(f"{file}, line {number} is not a rollout: {error}; mend or remove it.") from error
            yield record, rollout


def _rollout(record: Mapping[str, Any]) -> Rollout:
    text, prompt = record["completion"], record["prompt"]
    ids, logprobs = record.get("completion_ids"), record.get("logprobs") or ()
    if ids is None:  # their number is known if the log has a length or log-probs
        length = record.get("length")
        ids = [0] * ((len(logprobs) or len(text.split())) if length is None else length)
    elif not all(isinstance(token, int) for token in ids):
        raise ValueError(f"completion_ids is {ids!r}; expected a list of token ids")
    return Rollout.from_ids(
        str(record.get("prompt_key", record.get("key", prompt))),
        ids,
        text,
        sample=record.get("sample", 0),
        logprobs=logprobs,
        text_with_special_tokens=record.get("raw_completion") or text,
        messages=record.get("messages"),
        chat=not isinstance(prompt, str) and "messages" not in record,
        finish_reason=record.get("finish_reason") or "stop",
        strategy=str(record.get("strategy", "logged")),
    )


def check_log(suite: RewardSuite, logged: Logged) -> None:
    """Raise RewardError for rewards that ask by name for what the log lacks and no data set has.

    Raises:
        RewardError: names the reward and what it asks for.
    """
    unlogged = {name for record in logged.records for name in record.get("unlogged_columns", ())}
    for reward in suite.rewards:
        reward.check_logged({*logged.absent, *unlogged})


def score_by_step(suite: RewardSuite, logged: Logged) -> ScoreTable:
    """Score rollouts step by step, as training did: a prompt's group is that of one step.

    Raises:
        RewardError: a reward asks by name for what the log lacks.
    """
    check_log(suite, logged)
    steps: dict[Hashable, list[int]] = defaultdict(list)
    for row, record in enumerate(logged.records):
        steps[record.get("step"), record.get("model"), record.get("strategy")].append(row)
    scored: dict[int, ScoredRollout] = {}
    messages: dict[str, dict[int, str]] = {name: {} for name in suite.names}
    for rows in steps.values():
        columns = {name: [values[row] for row in rows] for name, values in logged.columns.items()}
        table = suite.score([logged.rollouts[row] for row in rows], columns, absent=logged.absent)
        scored |= zip(rows, table.scored, strict=True)
        for name, said in table.messages.items():
            messages[name] |= {rows[i]: message for i, message in said.items()}
    ordered = {name: dict(sorted(said.items())) for name, said in messages.items()}
    return ScoreTable(suite.names, [scored[row] for row in range(len(logged.rollouts))], ordered)


def groups_of(logged: Logged) -> list[list[int]]:
    """Rows of the log by group: the rollouts of one prompt in one step, of one model under one strategy."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, (record, rollout) in enumerate(zip(logged.records, logged.rollouts, strict=True)):
        groups[record.get("step"), record.get("model"), record.get("strategy"), rollout.prompt_key].append(row)
    return list(groups.values())


@dataclass(frozen=True)
class Comparison:
    """How the rewards of another suite compare with those that were optimised.

    Attributes:
        rollouts, groups: how many have both rewards, and how many groups of two or more they form.
        rank_correlation: Spearman's ρ over all rollouts; NaN if either side is constant.
        group_correlation: its mean over the groups in which both sides vary; `varying` counts those.
        reversed: share of rollouts whose advantage has the opposite sign.
        gained, lost: share whose advantage is nonzero now and was zero, or was nonzero and is zero now.
    """

    rollouts: int
    groups: int
    rank_correlation: float
    group_correlation: float
    varying: int
    reversed: float
    gained: float
    lost: float


def compare(logged: Logged, totals: Sequence[float | None]) -> Comparison:
    """Compare new rewards (`table.totals`) with the logged ones.

    An advantage is a reward minus its group's mean; its sign is all that is read, so no scale matters.

    Raises:
        RewardError: no rollout has both rewards.
    """
    both = [record.get("total") is not None and totals[row] is not None for row, record in enumerate(logged.records)]
    groups = [rows for group in groups_of(logged) if (rows := [row for row in group if both[row]])]
    rows = [row for group in groups for row in group]
    if not rows:
        raise RewardError(_nothing_to_compare(logged, totals))
    old = {row: float(logged.records[row]["total"]) for row in rows}
    new = {row: float(total) for row in rows if (total := totals[row]) is not None}
    signs = [
        pair
        for group in groups
        for pair in zip(_signs([old[r] for r in group]), _signs([new[r] for r in group]), strict=True)
    ]
    within = [
        rho for group in groups if not math.isnan(rho := spearman([old[r] for r in group], [new[r] for r in group]))
    ]
    return Comparison(
        rollouts=len(rows),
        groups=sum(len(group) > 1 for group in groups),
        rank_correlation=spearman([old[r] for r in rows], [new[r] for r in rows]),
        group_correlation=sum(within) / len(within) if within else math.nan,
        varying=len(within),
        reversed=sum(a * b < 0 for a, b in signs) / len(rows),
        gained=sum(a == 0 != b for a, b in signs) / len(rows),
        lost=sum(b == 0 != a for a, b in signs) / len(rows),
    )


def _nothing_to_compare(logged: Logged, totals: Sequence[float | None]) -> str:
    count = len(totals)
    if all(record.get("total") is None for record in logged.records):
        return (
            f"none of the {count} rollouts has a reward ('total') in the log; expected one that a training run wrote. "
            "`rlseq reward score` scores completions of any origin."
        )
    if all(total is None for total in totals):
        return f"the rewards abstained or failed on all {count} rollouts; there is nothing to compare."
    return f"none of the {count} rollouts has a reward both in the log and now; there is nothing to compare."


def _signs(values: Sequence[float]) -> list[int]:
    """Signs of the values minus their mean; differences that are rounding count as none."""
    mean = math.fsum(values) / len(values)
    small = 1e-9 * max(1.0, *map(abs, values))
    return [0 if abs(value - mean) <= small else int(math.copysign(1, value - mean)) for value in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where a side is constant or shorter than 2."""
    import numpy as np
    from scipy.stats import rankdata

    x, y = (ranks - ranks.mean() for ranks in (rankdata(a), rankdata(b)))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale else math.nan
