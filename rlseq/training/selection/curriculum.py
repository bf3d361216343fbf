"""Prompts whose running mean reward lies between bounds are preferred: the others give way in most epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlseq.training.selection.resampling import SparePrompts

NEWEST = 0.5  # weight of a prompt's newest mean reward in its running mean, which follows the policy
SKIPS = 3  # times in a row that a prompt gives way before it is sampled again: the policy may have changed


class OnlineCurriculum:
    """Knows the running mean reward of each prompt, and which prompts of a batch give way because of it.

    A prompt that was never sampled, or whose rewards all abstained, is unknown, and treated as one between the bounds.
    Everything follows from the rewards of all processes, so that it is equal on each of them.

    Args:
        keys: of the run's prompts.
        low, high: bounds of the mean reward, ends included.
        spare: the prompts that take others' places.

    Attributes:
        means: prompt key -> its running mean reward.
        skips: prompt key -> how often it has given way since it was sampled.
    """

    def __init__(self, keys: Sequence[str], low: float, high: float, spare: SparePrompts):
        self.keys = keys
        self.low, self.high = low, high
        self.spare = spare
        self.means: dict[str, float] = {}
        self.skips: dict[str, int] = {}

    def outside(self) -> set[int]:
        """The prompts whose running means are known to lie outside the bounds."""
        means = [self.means.get(key) for key in self.keys]
        return {i for i, mean in enumerate(means) if mean is not None and not self.low <= mean <= self.high}

    def choose(self, prompts: Sequence[int]) -> list[int]:
        """The prompts of a batch, those outside the bounds replaced by spare ones as far as there are any.

        Args:
            prompts: of all processes, each once.
        """
        outside = self.outside()
        slots = [i for i, prompt in enumerate(prompts) if prompt in outside and self._skips(prompt) < SKIPS]
        chosen = list(prompts)
        for slot, prompt in zip(slots, self.spare.take(len(slots), besides={*prompts, *outside}), strict=False):
            self.skips[self.keys[chosen[slot]]] = self._skips(chosen[slot]) + 1
            chosen[slot] = prompt
        return chosen

    def _skips(self, prompt: int) -> int:
        return self.skips.get(self.keys[prompt], 0)

    def record(self, prompts: Sequence[int], rewards_PG: Tensor) -> None:
        """Take the rewards of groups, (P, G), NaN where abstained, into the running means of their prompts."""
        newest = dict(zip(prompts, rewards_PG.nanmean(1).tolist(), strict=True))  # a prompt asked twice counts once
        for prompt, mean in newest.items():
            key = self.keys[prompt]
            self.skips.pop(key, None)
            if mean == mean:  # not NaN: every reward abstained
                before = self.means.get(key, mean)
                self.means[key] = before + NEWEST * (mean - before)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_rewards": dict(self.means), "prompts_skipped": dict(self.skips)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # of a run that had no curriculum until now: nothing is known
        self.means, self.skips = dict(state.get("mean_rewards", {})), dict(state.get("prompts_skipped", {}))
