"""Whether a row's references are all its right answers, measured by the rewards.

A reward that reads the row's columns and declares its range judges answers: a completion with the top of the range is
right. Where such completions are not among the references, the chance that a sample is a reference is not the chance
that it is right, and no report should offer it as that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rlseq.evaluation.measure.decode import reads
from rlseq.evaluation.statistics import RowStatistics, Source
from rlseq.scoring import RewardSuite

JUDGED = Source("judged")  # ("right", reward), ("unlisted", reward): of a row, 1 or absent; 1 or 0
UNLISTED_SHARE = 0.05  # of the rows with a right completion, from which references do not list the right answers


def judges_of(suite: RewardSuite, columns: Collection[str]) -> dict[str, float]:
    """By reward that judges answers its highest value.

    Args:
        columns: those of the rows, `references` included.
    """
    return {
        name: float(reward.info.range[1])
        for name, reward in zip(suite.names, suite.rewards, strict=True)
        if reward.info.range is not None and reads(reward, columns)
    }


def right_answers(rows: Iterable[RowStatistics], setting: str) -> dict[str, Any]:
    """Whether the references list the right answers, as results.json has it.

    Args:
        rows: with references, of all checkpoints under all strategies.
        setting: `auto`, or what the user says.

    Returns:
        {"listed", "by": setting or measured, "rewards": {reward: {"rows", "unlisted"}}}: rows with a right completion,
        and those of them with one that is not a reference. Without any such row the references count as listed.
    """
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        for statistic, value in row.items():
            if statistic.source == JUDGED.source:
                (reward,) = statistic.params
                mine = counts.setdefault(str(reward), {"rows": 0, "unlisted": 0})
                mine["rows" if statistic.name == "right" else "unlisted"] += int(value)
    listed = all(n["unlisted"] <= UNLISTED_SHARE * n["rows"] for n in counts.values())
    if setting == "auto":
        return {"listed": listed, "by": "measured", "rewards": counts}
    return {"listed": setting == "listed", "by": "setting", "rewards": counts}


def answers_note(found: Mapping[str, Any]) -> str | None:
    """What a report says where references do not list the right answers; None where they do."""
    if found["listed"]:
        return None
    left_out = (
        "The chance that a sample is a reference, exact match and pass@k are left out here; they are in results.json."
    )
    if found["by"] == "setting":
        return f"The references are some of the right answers (right_answers: open). {left_out}"
    reward, n = max(found["rewards"].items(), key=lambda item: item[1]["unlisted"] / item[1]["rows"])
    return (
        f"The references do not list all right answers: in {n['unlisted']:,} of the {n['rows']:,} rows (of all models "
        f"and strategies) with a completion that has the full reward by {reward}, such a completion is none of the "
        f"references. {left_out} right_answers: listed shows them."
    )
