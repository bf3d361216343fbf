"""An audit in words and tables, for the terminal and for the report of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.evaluation.audit.audit import LENGTH, OPTIMISED, REPETITION, audit, weights_of
from rlseq.evaluation.results.files import finite_or_null
from rlseq.evaluation.studies.study import Section, Table
from rlseq.scoring.replay import read_rollouts

FILE_NAME = "audit.json"
Numbers = Mapping[str, Any]  # of Audit.as_json


def conclusion(numbers: Numbers) -> str:
    """The verdict in a sentence or two."""
    if not numbers["held_out"]:
        return (
            "No held-out reward: nothing was tested. Name some with --held_out_rewards, or log a reward with weight 0 "
            "in training."
        )
    alarms = [verdict for verdict in numbers["verdicts"] if verdict["alarm"]]
    tests = f"{len(numbers['verdicts'])} test{'s' * (len(numbers['verdicts']) != 1)}"
    if not alarms:
        return (
            f"No alarm: in no pair of thirds did the optimised reward rise and a held-out reward fall (level "
            f"{numbers['level']:.0%} over {tests}, Holm)."
        )
    said = []
    for name in dict.fromkeys(verdict["held_out"] for verdict in alarms):
        pairs = [f"{v['from']} third (adjusted p {_p(v['adjusted_p'])})" for v in alarms if v["held_out"] == name]
        since = " and the ".join(pairs)
        said.append(f"{name} fell while the optimised reward rose, to the last third of the steps from the {since}")
    return f"ALARM: {'; '.join(said)}. Level {numbers['level']:.0%} over {tests}, Holm."


def tables(numbers: Numbers) -> list[Table]:
    """Changes, means over steps, and shares of the advantages."""
    thirds = [_range(steps) for steps in numbers["thirds"]]
    names = list(numbers["by_step"])
    changes = [
        [
            _title(numbers, name),
            *(_cell(mean) for mean in numbers["by_third"][name]),
            *map(_change, numbers["changes"][name]),
        ]
        for name in names
    ]
    header = ["", *(f"steps {steps}" for steps in thirds), "first to last third", "middle to last"]
    found = [Table(header, changes, "Thirds of the run, with 95% intervals")]
    header = ["steps", *(_title(numbers, name) for name in names)]
    rows = [
        [_range(steps), *(_cell(numbers["by_step"][name][i]) for name in names)]
        for i, steps in enumerate(numbers["steps"])
    ]
    found.append(Table(header, rows, "Means over steps, with 95% intervals"))
    if len(numbers["shares_of_advantages"]) > 1:
        shares = [
            [name, *("none" if share is None else f"{share:.1%}" for share in by_third)]
            for name, by_third in numbers["shares_of_advantages"].items()
        ]
        found.append(Table(["", *(f"steps {steps}" for steps in thirds)], shares, "Share of the advantages"))
    return found


def write_audit(run: Path) -> None:
    """Write RUN/audit.json from the rollout log and the logged rewards; nothing for a run of fewer than three steps."""
    logged = read_rollouts(run)
    if len({record.get("step") for record in logged.records if record.get("total") is not None}) < 3:
        return
    numbers = finite_or_null(audit(logged.records, weights_of(run, logged.records)).as_json())
    text = json.dumps(numbers, ensure_ascii=False, allow_nan=False, indent=1)
    (run / FILE_NAME).write_text(visible(text) + "\n", encoding="utf-8")


def section(folder: Path) -> list[Section]:
    """The section of a run's report, from the audit in its folder; nothing where there is none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    numbers = json.loads(path.read_text(encoding="utf-8"))
    found = tables(numbers)
    for name, examples in numbers["examples"].items():
        if examples and any(v["alarm"] for v in numbers["verdicts"] if v["held_out"] == name):
            rows = [[f"{e['reward']:.3f}", f"{e['held_out']:.3f}", str(e["step"]), e["completion"]] for e in examples]
            header = ["reward", name, "step", "completion"]
            found.append(Table(header, rows, f"Gained most while {name} fell"))
    return [
        Section(
            "audit",
            "Was the reward hacked?",
            f"{conclusion(numbers)} Over {numbers['rollouts']:,} logged rollouts of {numbers['prompts']:,} "
            "prompts, which are resampled whole.",
            "a held-out reward that was not thought of cannot fall. A rise and a fall that are both real may also be a "
            "trade that was wanted.",
            found,
        )
    ]


def _title(numbers: Numbers, name: str) -> str:
    if name == OPTIMISED:
        only = numbers["components"]
        return f"{name} ({only[0]})" if len(only) == 1 else name
    if name in (LENGTH, REPETITION):
        return name
    if name.endswith("(held out)"):
        return name
    return f"{name} ({'held out' if name in numbers['held_out'] else 'optimised'})"


def _range(steps: list[int]) -> str:
    return f"{steps[0]}" if steps[0] == steps[1] else f"{steps[0]} to {steps[1]}"


def _cell(mean: Numbers) -> str:
    if mean["value"] is None:
        return "none"
    return f"{mean['value']:.3f} ({_interval(mean['ci95'])})"


def _change(change: Numbers) -> str:
    if change["difference"] is None:
        return "none"
    return f"{change['difference']:+.3f} ({_interval(change['ci95'])})"


def _interval(ci95: list[float | None]) -> str:
    low, high = ci95
    return "no interval" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
