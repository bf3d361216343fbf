"""Rewards that only a whole completion can have: its length within a budget, and no value given twice.

No token earns them alone, and no reference contains them: `data.py` spells its references with spaces, which the budget
has no room for.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rlseq.scoring import Ratio, reward

ROOM = 10  # characters beyond the budget at which nothing is left of the reward
TEXT = re.compile(r':\s*"((?:[^"\\]|\\.)*)"')


def _share(numerator: str, description: str) -> Ratio:
    return Ratio(numerator, "completions", higher_is_better=True, description=description)


@reward(range=(0, 1), corpus={"within_budget": _share("within", "share of completions within the budget")})
def short(completion: str, record: dict[str, Any]) -> tuple[float, dict]:
    """1 if the completion has no more characters than the object without spaces; 0 from 10 characters more.

    The budget is of each row: the record as JSON without a space after commas and colons. `json.dumps` writes a space
    there, as the references do, so that they are 7 to 9 characters too long.
    """
    budget = len(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
    over = max(0, len(completion) - budget)
    return max(0.0, 1.0 - over / ROOM), {"within": int(over == 0), "completions": 1}


@reward(range=(0, 1), corpus={"distinct_values": _share("distinct", "share of completions that give no text twice")})
def distinct(completion: str) -> tuple[float, dict]:
    """1 if the completion gives at least two texts as values of its keys, and none of them twice; else 0."""
    texts = TEXT.findall(completion)
    value = int(len(texts) > 1 and len(set(texts)) == len(texts))
    return float(value), {"distinct": value, "completions": 1}
