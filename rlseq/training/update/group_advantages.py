"""Advantages of rollouts against the others of their prompt, the batch, or the prompt's greedy completion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlseq.errors import TrainingError
from rlseq.losses import group_advantages, max_rl_advantages, normalize_then_sum
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.update.own_functions import OwnAdvantage

NAN = float("nan")
SCALES = {"group": "std", "batch": "batch", "mean": "mean", "none": "none"}


class GroupAdvantages:
    """Of the total that is optimised; an abstention has none, and counts in no baseline.

    Args:
        trainer: with the settings: baseline, scale, and how several rewards become one, or a function of the user's.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.own = None if trainer.args.advantage is None else OwnAdvantage(trainer.args.advantage)

    def of(self, batch: RolloutBatch, values: Tensor) -> dict[str, Tensor]:
        """One per rollout; arguments as `rlseq.training.trl.batch.batches.Advantages` says."""
        trainer, groups = self.trainer, batch.groups  # (P, G)
        if self.own is not None:
            advantages = self.own.of(groups)
        elif trainer.multi_objective_aggregation == "normalize_then_sum":
            advantages = normalize_then_sum(values.view(*groups.shape, -1), trainer.reward_weights)
        else:
            if trainer.scale_rewards == "mean" and (groups < 0).any():
                raise TrainingError(
                    f"a rollout has reward {groups[groups < 0].min():g}, but scale_rewards mean divides by the mean of "
                    "rewards from 0 up. Give rewards of at least 0, or --scale_rewards group, batch or none.",
                    on_every_rank=True,
                )
            if (order := trainer.args.max_rl_order) is not None:
                return {"advantages": batch.local(self._max_rl(groups, order).flatten())}
            baseline: Any = trainer.args.advantage_baseline
            if baseline == "greedy":
                baseline = batch.greedy_totals.view(groups.shape)[:, 0]
            elif baseline == "batch":
                present = groups[~groups.isnan()]
                baseline = (present.mean() if len(present) else groups.new_tensor(NAN)).expand(len(groups))
            advantages = group_advantages(groups, baseline=baseline, scale=SCALES[trainer.scale_rewards])
        return {"advantages": batch.local(advantages.flatten())}

    def _max_rl(self, groups: Tensor, order: int) -> Tensor:
        other = groups[~groups.isnan() & (groups != 0) & (groups != 1)]
        if len(other):
            raise TrainingError(
                f"a rollout has reward {other[0]:g}, but max_rl_order counts successes, rewards of 0 or 1. Give such "
                "rewards, or leave max_rl_order out (scale_rewards mean alone takes rewards from 0 up).",
                on_every_rank=True,
            )
        return max_rl_advantages(groups, order=order)
