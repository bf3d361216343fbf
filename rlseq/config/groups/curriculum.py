"""The data of training: of which difficulty its prompts are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlseq.config.arguments import DataArguments
from rlseq.config.fields import Need, setting
from rlseq.errors import ConfigError

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"


@dataclass
class TrainingDataArguments(DataArguments):
    """Data of the recipes that train."""

    curriculum: str | None = setting(
        None,
        "Train only on rows whose --curriculum_column lies in this range, ends included: 0.1-0.9. `rlseq difficulty` "
        "writes the column.",
        metavar="LOW-HIGH",
    )
    curriculum_column: str = setting(
        "pass_rate", "Column that --curriculum reads.", needs=Need("--curriculum", lambda config: config.curriculum)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curriculum_range()

    def curriculum_range(self) -> tuple[float, float] | None:
        """The ends of the range; None without one.

        Raises:
            ConfigError: it is none.
        """
        return None if self.curriculum is None else parse_range("--curriculum", self.curriculum)


def parse_range(name: str, text: str) -> tuple[float, float]:
    """The ends of a range as the setting `name` gives it: 0.1-0.9.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(f"({_NUMBER})-({_NUMBER})", text.strip())
    low, high = map(float, found.groups()) if found else (1.0, 0.0)
    if low > high:
        raise ConfigError(f"{name} is {text!r}; expected two numbers, the smaller first, as 0.1-0.9")
    return low, high


def validate_online_curriculum(config: Any) -> None:
    """Refuse an `online_curriculum` that is no range.

    Raises:
        ConfigError: says what is expected.
    """
    if config.online_curriculum is not None:
        parse_range("online_curriculum", config.online_curriculum)
