"""The rollouts of one batch on their way from the sampler to the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlseq.scoring.suite import PendingScores
from rlseq.types import Rollout, ScoredRollout


@dataclass
class RolloutBatch:
    """The B rollouts that this process samples at a time, filled in stage by stage.

    "All processes" have N·B rollouts, process 0's first; the groups of a prompt are contiguous there.

    Attributes:
        rows: B rows of the data set, one per rollout: `index` of the prompt, and `prompt` as the user wrote it.
        asked: B prompts as the model was asked them: an environment may have added to the row's.
        rollouts: B, from rlseq's sampler; None where TRL generated.
        tool_mask: of B completions, 1 per token that the model sampled and 0 per token of a tool; None without tools.
        pending: rewards that score in other processes while log-probs are computed; None where none does.
        scored: B rollouts with values, statuses and totals.
        told: of B rollouts, the columns that a `rollout_func` or an environment adds, for rewards and log.
        totals: (N·B,) rewards of all processes, NaN where every reward abstained.
        greedy: prompt index -> its greedy completion, where its reward is the baseline.
        greedy_totals: (N·B,) reward of each rollout's greedy completion, likewise; None without that baseline.
        inputs: what is trained on, by name, B rows each; the masks and log-probs are padded to (B, T).
        reference_rewards: prompt index -> the reward of each of its references, NaN where every reward abstained.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    rollouts: list[Rollout] | None = None
    tool_mask: list[list[int]] | None = None
    pending: PendingScores | None = None
    scored: list[ScoredRollout] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.empty(0))
    greedy: dict[int, Rollout] = field(default_factory=dict)
    greedy_totals: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    reference_rewards: dict[int, list[float]] = field(default_factory=dict)

    @property
    def indices(self) -> list[int]:
        """Of each rollout, the index of its prompt."""
        return [row["index"] for row in self.rows]
