"""Per-row statistics: typed keys, their one text form on file, and rows of them as arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Parameter = str | int | None


@dataclass(frozen=True)
class Statistic:
    """The key of a number that is kept for each row, to be summed over rows.

    Attributes:
        source: what measures it: likelihood, completion, thought, chance, agreement, reward, corpus, document, or a
            study's name.
        name: what is counted or summed; like `source` it is one of rlseq's own words.
        params: what it is of: a reward's name as its user wrote it, a strategy, a number of samples.
    """

    source: str
    name: str
    params: tuple[Parameter, ...] = ()

    def text(self, source: str) -> str:
        """Its form on file: `nll`, `pass_at[4]`, `reward/sum["wer"]`. Only another source than the block's is told."""
        params = json.dumps(self.params, ensure_ascii=False) if self.params else ""
        return ("" if self.source == source else f"{self.source}/") + self.name + params


RowStatistics = dict[Statistic, Any]  # a row's finite numbers (sums over its references or samples), or lists of them


class Pair(NamedTuple):
    """What a ratio of sums is of."""

    numerator: Statistic
    denominator: Statistic


@dataclass(frozen=True)
class Source:
    """Makes the statistics of one source: `Source("reward")("sum", "wer")`."""

    source: str

    def __call__(self, name: str, *params: Parameter) -> Statistic:
        return Statistic(self.source, name, params)


LIKELIHOOD = Source("likelihood")  # of the references, by teacher forcing
COMPLETION = Source("completion")  # of what a strategy generates
THOUGHT = Source("thought")  # of what a strategy generates before an answer
CHANCE = Source("chance")  # of what a strategy may generate, without sampling
REWARD = Source("reward")  # ("sum", reward), ("count", reward), ("failed", reward)
CORPUS = Source("corpus")  # ("sum", metric, statistic), ("count", metric)


def rows_as_json(rows: Sequence[RowStatistics], source: str) -> list[dict[str, Any]]:
    """Rows as JSON holds them, in a block for statistics of this source; `rows_from_json` gives them back."""
    texts = {statistic: statistic.text(source) for row in rows for statistic in row}
    return [{texts[statistic]: value for statistic, value in row.items()} for row in rows]


def rows_from_json(rows: Sequence[Mapping[str, Any]], source: str) -> list[RowStatistics]:
    """The rows that `rows_as_json` was given."""
    return [{_read(text, source): value for text, value in row.items()} for row in rows]


@cache
def _read(text: str, source: str) -> Statistic:
    match = re.fullmatch(r"(?:(\w+)/)?(\w+)(\[.*\])?", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{text!r} is no statistic")
    return Statistic(match[1] or source, match[2], tuple(json.loads(match[3] or "[]")))


def rows_matrix(rows: Sequence[RowStatistics], statistics: Sequence[Statistic]) -> np.ndarray:
    """Statistics of R rows as (R, K), 0 where a row has none."""
    return np.array([[row.get(key, 0.0) for key in statistics] for row in rows]).reshape(len(rows), len(statistics))
