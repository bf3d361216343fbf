"""A mixture of data sets as it is written: `math.jsonl:0.7 code.jsonl:0.3`."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlseq.errors import ConfigError

_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>\d+\.?\d*|\.\d+)")


def parse_mixture(text: str | None) -> dict[str, float] | None:
    """By name of a data set its weight, which sum to 1; None for the name of one data set.

    Raises:
        ConfigError: some parts have no weight, a weight is 0, or a name is given twice.
    """
    parts = (text or "").split()
    found = [_WEIGHTED.fullmatch(part) for part in parts]
    if len(parts) < 2 or not any(found):
        return None
    example = "name each as NAME:WEIGHT, as in math.jsonl:0.7 code.jsonl:0.3"
    for part, match in zip(parts, found, strict=True):
        if match is None or float(match["weight"]) == 0:
            raise ConfigError(f"--dataset_name: {part!r} has {'no weight' if match is None else 'weight 0'}; {example}")
    names = [match["name"] for match in found if match]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--dataset_name names {twice[0]!r} twice; give it one weight")
    weights = [float(match["weight"]) for match in found if match]
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


class Joined(argparse.Action):
    """Takes several words as one text."""

    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[str], option_string: Any = None) -> None:
        setattr(namespace, self.dest, values if isinstance(values, str) else " ".join(values))
