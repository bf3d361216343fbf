"""`rlseq show RUN`: the rollouts of a training run in the terminal, as they were scored."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.rollout_files import no_rollouts, read_records, rollout_files
from rlseq.common.tables import render_table, table_width
from rlseq.errors import ConfigError, RunDirectoryError
from rlseq.types import transcript

COMPLETION_AND_TOTALS = 60  # columns: 22 of text, then reward, advantage, log-prob and tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq show`."""
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="Run directory.")
    parser.add_argument("--step", type=int, metavar="S", help="Step to show (default: the last).")
    parser.add_argument("--prompt", metavar="TEXT", help="Show only prompts that contain this text.")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="Show N prompts; 0: all (default: 8).")


def run(args: argparse.Namespace) -> int:
    """Print what the flags ask for; returns the exit status 0.

    Raises:
        ConfigError: `--limit` is below 0.
        RunDirectoryError: the run, its rollouts, the step or a prompt with that text does not exist.
    """
    if args.limit < 0:
        raise ConfigError(f"--limit is {args.limit}; expected a number of prompts, or 0 for all")
    rollouts = load_step(args.run_directory, args.step)
    groups = by_prompt(rollouts)
    if args.prompt is not None:
        groups = {key: group for key, group in groups.items() if args.prompt in transcript(group[0]["prompt"])}
        if not groups:
            raise RunDirectoryError(
                f"no prompt of step {rollouts[0]['step']} contains {args.prompt!r}; "
                "try a shorter text or another --step"
            )
    _print(rollouts[0]["step"], groups, args.limit)
    return 0


def load_step(run_directory: str | Path, step: int | None = None) -> list[dict[str, Any]]:
    """The rollouts of one step, by default the last, in the order they were logged.

    Raises:
        RunDirectoryError: naming the steps that exist where this one does not.
        FormatError: the log is of a version that cannot be read.
    """
    run_directory = Path(run_directory)
    files = rollout_files(run_directory)
    found: list[dict[str, Any]] = []
    steps: set[int] = set()
    for rollout in read_records(files):
        steps.add(rollout["step"])
        if step is None and found and rollout["step"] > found[0]["step"]:
            found = []
        wanted = step if step is not None else max(steps)
        if rollout["step"] == wanted:
            found.append(rollout)
    if not steps:
        raise no_rollouts(run_directory)
    if not found:
        raise RunDirectoryError(
            f"step {step} has no rollouts in {run_directory}; steps with rollouts: {_ranges(steps)}"
        )
    return found


def by_prompt(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rollouts by prompt key, prompts as first met, samples in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for rollout in rollouts:
        groups.setdefault(str(rollout["prompt_key"]), []).append(rollout)
    return {key: sorted(group, key=lambda r: r["sample"]) for key, group in groups.items()}


def _print(step: int, groups: Mapping[str, Sequence[Mapping[str, Any]]], limit: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = list(groups.values())[: limit or None]
    rollouts = [rollout for group in groups.values() for rollout in group]
    console.print(
        f"Step {step}: {len(rollouts):,} rollouts of {len(groups):,} prompts, "
        f"mean reward {_number(_mean(r.get('total') for r in rollouts))}",
        style="bold",
        highlight=False,
    )
    for group in shown:
        first = group[0]
        console.print()
        console.print(Text(visible(transcript(first["prompt"])), style="bold cyan"))
        for reference in first.get("references") or ():
            console.print(Text(f"reference  {visible(str(reference))}", style="dim"))
        names = list(dict.fromkeys(name for rollout in group for name in rollout.get("values") or ()))
        numbers = [[str(r["sample"]), *(_reward(r, name) for name in names)] for r in group]
        beside = table_width(numbers, ["#", *map(visible, names)]) <= console.width - COMPLETION_AND_TOTALS
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("#", justify="right")
        table.add_column("completion", ratio=1, overflow="fold")
        for name in [*(names if beside else ()), "reward", "advantage", "log-prob", "tokens"]:
            table.add_column(Text(visible(name)), justify="right", no_wrap=True)
        for rollout, (_, *rewards) in zip(group, numbers, strict=True):
            completion = Text(
                visible(rollout["completion"] or "") or "(empty)", style="" if rollout["completion"] else "dim"
            )
            if rollout.get("finish_reason") == "length":
                completion.append(" (cut)", style="yellow")
            advantage = rollout.get("advantage")
            table.add_row(
                str(rollout["sample"]),
                completion,
                *(rewards if beside else ()),
                _number(rollout.get("total")),
                Text(_number(advantage, signed=True), style=_color(advantage)),
                _number(rollout.get("logprob"), decimals=2),
                str(rollout.get("length", "")),
            )
        console.print(table)
        if not beside:
            console.print()
            console.print(render_table(numbers, ["#", *names], right=range(len(names) + 1)), markup=False)
    if len(groups) > len(shown):
        console.print(f"\n{len(groups) - len(shown):,} more prompts: --limit 0 shows all", style="dim")


def _reward(rollout: Mapping[str, Any], name: str) -> str:
    value = (rollout.get("values") or {}).get(name)
    return _number(value) if value is not None else (rollout.get("status") or {}).get(name) or "none"


def _number(value: float | None, *, decimals: int = 3, signed: bool = False) -> str:
    if value is None:
        return "none"
    return f"{value:{'+' if signed else ''}.{decimals}f}"


def _color(advantage: float | None) -> str:
    if not advantage:
        return "dim"
    return "green" if advantage > 0 else "red"


def _mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _ranges(steps: set[int]) -> str:
    """Sorted steps, at most a dozen: all of them, or the first and last ones."""
    ordered = [str(step) for step in sorted(steps)]
    if len(ordered) <= 12:
        return ", ".join(ordered)
    return f"{', '.join(ordered[:6])}, …, {', '.join(ordered[-3:])}"
