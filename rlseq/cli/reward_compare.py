"""`rlseq reward compare A B --rollouts F`: two verifiers on the same rollouts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlseq.cli.score_table import MOMENTS, STATUSES, number, scores
from rlseq.common.escapes import visible
from rlseq.common.tables import render_table
from rlseq.config.commands import CompareArguments, LoggedRowsArguments
from rlseq.config.parsing.yaml_file import bundled_paths
from rlseq.errors import RewardError
from rlseq.evaluation.stats.agreement import Agreement, agreement, is_binary
from rlseq.scoring.check.rows import think_end_of, with_columns
from rlseq.scoring.load import load_rewards
from rlseq.scoring.outcome import json_ready
from rlseq.scoring.replay import Logged, groups_of, read_rollouts, score_by_step
from rlseq.scoring.specs.options import parse_spec
from rlseq.scoring.table import ScoreTable
from rlseq.types import transcript

SIDES = ("A", "B")
LABELS = {
    "equal": "equal verdicts",
    "kappa": "Cohen's kappa",
    "pass_rate_difference": "pass rate, B - A",
    "correlation": "correlation",
    "mean_difference": "mean, B - A",
    "reversed": "advantages that change sign from A to B",
    "gained": "advantages that are 0 under A alone",
    "lost": "advantages that are 0 under B alone",
}
SHARES = ("equal", "reversed", "gained", "lost")


def run_compare(what: CompareArguments, data: LoggedRowsArguments, specs: Sequence[str]) -> int:
    """Print how two rewards compare, and write the numbers if asked to; returns 0, whether they agree or not.

    Raises:
        RewardError: no rollout has a value of both.
    """
    specs = bundled_paths({"spec": list(specs)})["spec"]
    think_end = think_end_of(what.rollouts, data)
    with load_rewards([counting_failures(spec) for spec in specs], max_error_rate=1.0, think_end=think_end) as suite:
        logged = with_columns(suite, read_rollouts(what.rollouts), what.rollouts, data)
        table = score_by_step(suite, logged)
    _print_scores(table)
    a, b = (_floats(table.values[name]) for name in table.names)
    counts = _counts(a, b)
    if not counts["both"]:
        raise RewardError(
            f"A and B both give a value on none of the {len(a):,} rollouts; there is nothing to compare. The table "
            "above counts abstentions and failures; `rlseq reward check SPEC` looks for their cause."
        )
    groups = groups_of(logged)
    _, prompts = np.unique([rollout.prompt_key for rollout in logged.rollouts], return_inverse=True)
    found = agreement(a, b, advantage_signs(a, groups), advantage_signs(b, groups), prompts)
    rows = disagreements(a, b)
    listed = rows[: what.limit or None]
    _print_agreement(found, counts)
    _print_disagreements(logged, a, b, listed, len(rows), found.rollouts)
    if what.output is not None:
        rewards = {
            side.lower(): {"spec": spec, **_reward_numbers(table, name)}
            for side, spec, name in zip(SIDES, specs, table.names, strict=True)
        }
        _write(
            what.output,
            {"rollouts": str(what.rollouts), **rewards, "counts": counts, **_agreement_numbers(found)}
            | {"disagreements": {"count": len(rows), "listed": [_located(logged, row, a, b) for row in listed]}},
        )
    return 0


def counting_failures(spec: Any) -> dict[str, Any]:
    """The spec with failures as what they are: `on_error` is for training, which needs a value or stops."""
    spec = parse_spec(spec)
    return {**(spec if isinstance(spec, dict) else {"func": spec}), "on_error": "abstain"}


def advantage_signs(values: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Signs of the group advantages of N values, (N,); NaN for a rollout that is alone in its group.

    A value that is NaN leaves its group, as an abstention does in training. Advantages that are rounding count as 0.
    """
    import torch

    from rlseq.losses import group_advantages

    by_size: dict[int, list[Sequence[int]]] = defaultdict(list)
    for group in groups:
        by_size[len(group)].append(group)
    signs = np.full(len(values), np.nan)
    for size, rows in by_size.items():
        if size > 1:
            rewards_PG = torch.from_numpy(values[np.array(rows)])  # (P, G)
            advantages_PG = group_advantages(rewards_PG, scale="none")
            rounding_P1 = 1e-9 * rewards_PG.nan_to_num(0).abs().amax(1, keepdim=True)
            signs[np.array(rows)] = torch.where(advantages_PG.abs() <= rounding_P1, 0.0, advantages_PG.sign()).numpy()
    return signs


def disagreements(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Rows to which both give a value and not the same one, the largest difference first; equal ones in order."""
    if is_binary(a[~np.isnan(a)]) and is_binary(b[~np.isnan(b)]):
        a, b = ((values > 0) + 0 * values for values in (a, b))  # the verdicts: -1 and 0 are both a fail
    difference = np.nan_to_num(np.abs(b - a))
    different = difference > 1e-9 * np.nan_to_num(np.maximum(np.abs(a), np.abs(b)))
    return [int(row) for row in np.argsort(-difference, kind="stable") if different[row]]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _counts(a: np.ndarray, b: np.ndarray) -> dict[str, int]:
    """Rollouts by which of the two gave them a value."""
    in_a, in_b = ~np.isnan(a), ~np.isnan(b)
    parts = {"both": in_a & in_b, "a_alone": in_a & ~in_b, "b_alone": ~in_a & in_b, "neither": ~in_a & ~in_b}
    return {name: int(rows.sum()) for name, rows in parts.items()}


def _print_scores(table: ScoreTable) -> None:
    rows = [(side, name, *scores(table, name)) for side, name in zip(SIDES, table.names, strict=True)]
    print(render_table(rows, ("", "reward", *MOMENTS, *STATUSES), right=range(2, 11), keys=2))
    for name in table.names:
        for message in list(table.messages[name].values())[:1]:
            print(visible(f"The first failure of {name}: {message}"))


def _print_agreement(found: Agreement, counts: dict[str, int]) -> None:
    print(
        f"\n{counts['both']:,} rollouts of {found.prompts:,} prompts have a value of both; "
        f"{counts['a_alone']:,} of A alone, {counts['b_alone']:,} of B alone, {counts['neither']:,} of neither.\n"
    )
    rows = []
    for name, statistic in found.statistics.items():
        value, low, high = (_shown(name, x) for x in (statistic.value, *statistic.ci95))
        rows.append((LABELS[name], value, "-" if low == "-" else f"{low} to {high}"))
    print(render_table(rows, ("agreement", "", "95% interval"), right=(1, 2)))
    if found.table is not None:
        both, a_alone, b_alone, neither = (f"{count:,}" for count in found.table)
        print()
        print(
            render_table(
                [("A passes", both, a_alone), ("A fails", b_alone, neither)], ("", "B passes", "B fails"), (1, 2)
            )
        )


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name in SHARES and not math.isnan(value) else number(value)


def _print_disagreements(
    logged: Logged, a: np.ndarray, b: np.ndarray, listed: Sequence[int], count: int, compared: int
) -> None:
    print(
        f"\nA and B differ on {count:,} of {compared:,} rollouts{', the largest differences first:' if listed else '.'}"
    )
    for row in listed:
        record = logged.records[row]
        where = ", ".join(f"{name} {record[name]}" for name in ("step", "sample") if record.get(name) is not None)
        print(visible(f"\nA {number(a[row])}, B {number(b[row])}{f'  ({where})' if where else ''}"))
        texts = [("prompt", transcript(record["prompt"])), ("completion", record["completion"] or "(empty)")]
        texts += [("reference", str(reference)) for reference in _references(record)]
        for name, text in texts:
            indented = text.replace("\n", "\n" + " " * 12)
            print(visible(f"{name:<12}{indented}"))
    if len(listed) < count:
        print(f"\n{count - len(listed):,} more: --limit 0 shows all.")


def _references(record: Mapping[str, Any]) -> list[Any]:
    references = record.get("references") or []
    return references if isinstance(references, list) else [references]


def _reward_numbers(table: ScoreTable, name: str) -> dict[str, Any]:
    present = [value for value in table.values[name] if value is not None]
    mean = math.fsum(present) / len(present) if present else None
    return {"name": name, "n": len(present), "mean": mean, **table.failure_counts[name]}


def _agreement_numbers(found: Agreement) -> dict[str, Any]:
    cells = ("both_pass", "a_alone_passes", "b_alone_passes", "both_fail")
    return {
        "prompts": found.prompts,
        "statistics": {name: {"value": x.value, "ci95": x.ci95} for name, x in found.statistics.items()},
        "table": None if found.table is None else dict(zip(cells, found.table, strict=True)),
    }


def _located(logged: Logged, row: int, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    record = {name: logged.records[row].get(name) for name in ("step", "sample")}
    return {"row": row, "prompt_key": logged.rollouts[row].prompt_key, **record, "a": a[row], "b": b[row]}


def _write(path: Path, numbers: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json_ready(numbers), ensure_ascii=False, allow_nan=False, indent=1)
    path.write_text(visible(text) + "\n", encoding="utf-8")
