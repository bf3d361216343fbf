"""Completions -> values and a total per rollout, by the reward suite; TRL's list of reward functions is not called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_ids
from rlseq.scoring import RewardSuite
from rlseq.training.environment import environment_rewards
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.trl.batch.rollouts import rollout_of_ids
from rlseq.training.update.forward import Ids
from rlseq.types import ABSENT, Prompt, Rollout, column_names

NAN = float("nan")


class RewardScorer:
    """Scores the completions of a batch, and the references where an objective asks for that.

    Args:
        trainer: TRL's, with the tokenizer, the environments and what rewards may log.
        prompts: what was continued.
        suite: what scores it.
    """

    def __init__(self, trainer: Any, prompts: list[Prompt], suite: RewardSuite):
        self.trainer = trainer
        self.prompts = prompts
        self.suite = suite

    def submit(self, batch: RolloutBatch) -> None:
        """Let the rewards in processes of their own score the rollouts while log-probs are computed."""
        columns = self._columns(batch.indices) | {"prompt": [row["prompt"] for row in batch.rows]}
        batch.pending = self.suite.submit(batch.rollouts, columns, context=_RewardContext(self.trainer))

    def score(self, batch: RolloutBatch) -> Tensor:
        """Score the rollouts into `batch`; returns the values of all processes, (N·B, rewards), NaN where abstained."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        pending, batch.pending = batch.pending, None
        told = {name: [one[name] for one in batch.told] for name in batch.told[0]}
        with raise_on_all_ranks():
            told |= environment_rewards(trainer.environments, batch.rollouts, getattr(trainer, "async_loop", None))
            table = self.suite.score(
                batch.rollouts,
                self._columns(batch.indices) | told | {"prompt": batch.asked},
                context=_RewardContext(trainer),
                gather=lambda mine: gather_object([mine]),
                pending=pending,
            )
            greedy = self._score_alone(list(batch.greedy.items()))
            if trainer.args.scores_references:
                earned = self._score_references(batch.indices)
                batch.trained = dataclasses.replace(batch.trained, reference_rewards=earned)
        batch.scored = table.scored
        batch.told = [{name: values[i] for name, values in told.items()} for i in range(len(batch.rollouts))]
        device = accelerator.device
        values = torch.tensor(
            [[NAN if v is None else v for v in s.values.values()] for s in table.scored], device=device
        )  # (B, rewards), local
        totals = torch.tensor([NAN if t is None else t for t in table.totals], device=device)
        for name, counts in table.failure_counts.items():
            for kind, count in counts.items():
                total = accelerator.reduce(torch.tensor(float(count), device=device)).item()
                if total or kind == "error":
                    batch.failures[f"rewards/{name}/{kind}"] = total
        batch.totals = accelerator.gather(totals)
        if batch.greedy:
            of_prompt = dict(zip(batch.greedy, greedy, strict=True))
            batch.greedy_totals = accelerator.gather(
                torch.tensor([of_prompt[index] for index in batch.indices], device=device)
            )
        return accelerator.gather(values)

    def _columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        names = self._column_names
        return {name: [self.prompts[index].columns.get(name, ABSENT) for index in indices] for name in names}

    @functools.cached_property
    def _column_names(self) -> list[str]:
        """Of all prompts, as those of a batch may all lack one."""
        return [name for name in column_names(self.prompts) if name != "prompt"]

    def _score_alone(self, rollouts: Sequence[tuple[int, Rollout]]) -> list[float]:
        """Totals of completions beside the groups, (prompt index, rollout) each; NaN where every reward abstained."""
        if not rollouts:
            return []
        indices = [index for index, _ in rollouts]
        columns = self._columns(indices) | {"prompt": [self.prompts[index].prompt for index in indices]}
        table = self.suite.score([rollout for _, rollout in rollouts], columns)
        return [NAN if total is None else total for total in table.totals]

    def references_of(self, index: int) -> list[Ids]:
        """A prompt's references as the update scores them."""
        trainer = self.trainer
        found = reference_ids(self.prompts[index], trainer.processing_class, trainer.eos_token_ids)
        # One longer than a completion may be, or with a stop string, has no chance to be sampled: an exact objective
        # leaves it out, and so does the reference loss beside one.
        if trainer.args.objective == "policy_gradient":
            return found
        longest, stop_strings = trainer.max_completion_length, trainer.stop_strings
        return [ids for ids in found if len(ids) <= longest and not stop_strings.cuts(ids)]

    def _score_references(self, indices: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """Of each rollout, what its prompt's references would earn as completions; scored once per prompt."""
        found: dict[int, list[float]] = {index: [] for index in indices}
        rollouts = [
            (index, rollout_of_ids(self.trainer, self.prompts[index], i, ids, "reference"))
            for index in found
            for i, ids in enumerate(self.references_of(index))
        ]
        for (index, _), total in zip(rollouts, self._score_alone(rollouts), strict=True):
            found[index].append(total)
        return tuple(tuple(found[index]) for index in indices)


def leave_rewards_to(suite: RewardSuite, trainer: Any) -> None:
    """Take an environment's own reward off TRL's list again: the suite names and weighs it (environment.py)."""
    count = len(suite.names)
    trainer.reward_funcs, trainer.reward_func_names = trainer.reward_funcs[:count], trainer.reward_func_names[:count]
    trainer.reward_processing_classes = trainer.reward_processing_classes[:count]
    trainer.reward_weights = torch.tensor(suite.weights)


class _RewardContext:
    """What TRL's batch signature of a reward may ask the trainer for."""

    def __init__(self, trainer: Any):
        self.trainer_state = trainer.state
        self.log_extra = trainer._log_completion_extra
        self.log_metric = trainer._log_metric
