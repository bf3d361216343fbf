"""What numbers are called in results and logs. No two can share a name.

The metrics of rlseq itself have the names in `BUILT_IN`. A reward or corpus metric goes by the name that its user gave
it, unless another number has that one: then it is `reward/NAME` or `corpus/NAME`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.metrics import BUILT_IN, PASS_AT_K
from rlseq.scoring import RewardSuite

TOTAL = "reward"  # the mean total of the optimised rewards, in evaluations during training
_OF_RESULTS = ("oracle",)  # what else stands among a strategy's metrics in results.json


@dataclass(frozen=True)
class Names:
    """By reward, and by corpus metric of a suite, what its number is called."""

    rewards: dict[str, str]
    corpus: dict[str, str]

    @classmethod
    def of(cls, suite: RewardSuite) -> Names:
        counts = Counter([*suite.names, *suite.corpus])

        def name(kind: str, given: str) -> str:
            taken = given in {*BUILT_IN, PASS_AT_K, TOTAL, *_OF_RESULTS}
            return f"{kind}/{given}" if taken or counts[given] > 1 or "/" in given else given

        return cls(
            {reward: name("reward", reward) for reward in suite.names},
            {metric: name("corpus", metric) for metric in suite.corpus},
        )

    def find(self, given: str, others: Collection[str], flag: str) -> str:
        """The name of the number that a user means: its name, the same with its kind in front, or its last part.

        Args:
            given: what the user wrote.
            others: names of the metrics of rlseq itself that may be meant.
            flag: where it was written, for the message.

        Raises:
            ConfigError: there is no such number, or there are two.
        """
        known = [*self.rewards.values(), *self.corpus.values(), *others]
        if given in known:
            return given
        kinds = {"reward": self.rewards, "corpus": self.corpus}
        named = [(f"{kind}/{own}", own, name) for kind, names in kinds.items() for own, name in names.items()]
        meant = [name for whole, _, name in named if whole == given] or [name for _, own, name in named if own == given]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise ConfigError(f"--{flag} names {given!r}, which may be {' or '.join(meant)}; write one of these")
        raise ConfigError(
            f"--{flag} names no metric of this evaluation: {given!r}; there are {', '.join(known)}."
            + did_you_mean(given, known)
        )
