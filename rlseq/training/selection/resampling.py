"""Dynamic sampling: which groups teach nothing, and which prompts take their places."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-6  # of the largest reward, or of 1: what sums of equal rewards differ by, as 0.1 + 0.2 and 0.3


def equal_groups(rewards_PG: Tensor) -> Tensor:
    """Whether the rewards of each group are all equal, abstentions aside, so that samples cannot be compared.

    Args:
        rewards_PG: (P, G), NaN where every reward abstained.

    Returns:
        (P,) bool.
    """
    absent = rewards_PG.isnan()
    most = rewards_PG.masked_fill(absent, -torch.inf).amax(1)
    least = rewards_PG.masked_fill(absent, torch.inf).amin(1)
    largest = rewards_PG.nan_to_num(0.0).abs().amax(1)
    return most - least <= TOLERANCE * largest.clamp(min=1.0)


class SparePrompts:
    """The order in which prompts take others' places: pass after pass over all of them, each in a random order.

    It has nothing to do with the order of the epochs, and is the same on every process.

    Args:
        count: of the prompts.
        seed: of the run.

    Attributes:
        taken: how many places of the order have been looked at.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.taken = 0
        self._order = -1, torch.empty(0, dtype=torch.long)  # of which pass

    def take(self, number: int, *, besides: Collection[int]) -> list[int]:
        """The next prompts that are none of `besides`, at most `number`; fewer where a whole pass has no others."""
        found: list[int] = []
        for _ in range(self.count):
            if len(found) == number:
                break
            index = self._at(self.taken)
            self.taken += 1
            if index not in besides and index not in found:
                found.append(index)
        return found

    def _at(self, place: int) -> int:
        number, place = divmod(place, self.count)
        if self._order[0] != number:
            generator = torch.Generator().manual_seed(hash((self.seed, number, self.count)) % 2**63)
            self._order = number, torch.randperm(self.count, generator=generator)
        return int(self._order[1][place])

    def state_dict(self) -> dict[str, Any]:
        return {"spare_prompts_taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state.get("spare_prompts_taken", 0)  # none, of a run whose prompts kept their places until now
