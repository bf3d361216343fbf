"""Completions -> values and a total per rollout, by the reward suite; TRL's list of reward functions is not called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_ids
from rlseq.engine.strategies import Sample
from rlseq.scoring import RewardSuite
from rlseq.training.environment import environment_rewards
from rlseq.training.forward import Ids
from rlseq.training.rollouts import RolloutBatch
from rlseq.types import ABSENT, Prompt, Rollout, column_names

NAN = float("nan")


class ScoringMixin(trl.GRPOTrainer):
    """Scores the completions of a batch, and the references where an objective asks for that.

    Attributes:
        prompts, suite: what was continued, and what scores it.
        batch: the last one that was made.
    """

    prompts: list[Prompt]
    suite: RewardSuite
    batch: RolloutBatch

    def _leave_rewards_to_suite(self) -> None:
        """Take an environment's own reward off TRL's list again: the suite names and weighs it (environment.py)."""
        count = len(self.suite.names)
        self.reward_funcs, self.reward_func_names = self.reward_funcs[:count], self.reward_func_names[:count]
        self.reward_processing_classes = self.reward_processing_classes[:count]
        self.reward_weights = self.reward_weights[:count]

    def _submit_rewards(self, batch: RolloutBatch, rollouts: list[Rollout]) -> None:
        """Let the rewards in processes of their own score the rollouts while log-probs are computed."""
        columns = self._columns(batch.indices) | {"prompt": [row["prompt"] for row in batch.rows]}
        batch.pending = self.suite.submit(rollouts, columns, context=_RewardContext(self))

    def _score(self, batch: RolloutBatch, completions: list[Any], completion_ids: list[list[int]]) -> Tensor:
        """Score the rollouts into `batch`; returns the values of all processes, (N·B, rewards), NaN where abstained."""
        rollouts = batch.rollouts or self._as_rollouts(batch, completions, completion_ids)
        pending, batch.pending = batch.pending, None
        told = {name: [one[name] for one in batch.told] for name in batch.told[0]}
        with raise_on_all_ranks():
            told |= environment_rewards(self.environments, rollouts, getattr(self, "async_loop", None))
            table = self.suite.score(
                rollouts,
                self._columns(batch.indices) | told | {"prompt": batch.asked},
                context=_RewardContext(self),
                gather=lambda mine: gather_object([mine]),
                pending=pending,
            )
            greedy = self._score_alone(list(batch.greedy.items()))
            if self.args.scores_references:
                self._score_references(batch, batch.indices)
        batch.scored = table.scored
        batch.told = [{name: values[i] for name, values in told.items()} for i in range(len(rollouts))]
        device = self.accelerator.device
        values = torch.tensor(
            [[NAN if v is None else v for v in s.values.values()] for s in table.scored], device=device
        )  # (B, rewards), local
        totals = torch.tensor([NAN if t is None else t for t in table.totals], device=device)
        for name, counts in table.failure_counts.items():
            for kind, count in counts.items():
                total = self.accelerator.reduce(torch.tensor(float(count), device=device)).item()
                if total or kind == "error":
                    self._metrics[self._mode][f"rewards/{name}/{kind}"].append(total)
        batch.totals = self.accelerator.gather(totals)
        if batch.greedy:
            of_prompt = dict(zip(batch.greedy, greedy, strict=True))
            batch.greedy_totals = self.accelerator.gather(
                torch.tensor([of_prompt[index] for index in batch.indices], device=device)
            )
        return self.accelerator.gather(values)

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

    def _references_of(self, prompt: Prompt) -> list[Ids]:
        found = reference_ids(prompt, self.processing_class, self.eos_token_ids)
        # One longer than a completion may be, or with a stop string, has no chance to be sampled: an exact objective
        # leaves it out, and so does the reference loss beside one.
        if self.args.objective == "policy_gradient":
            return found
        return [ids for ids in found if len(ids) <= self.max_completion_length and not self.stop_strings.cuts(ids)]

    def _rewards_of_references(self, index: int) -> list[float]:
        """What a prompt's references would earn as completions, in the order of `_references_of`."""
        if index not in self.batch.reference_rewards:  # a run that is resumed by another number of processes
            self._score_references(self.batch, [index])
        return self.batch.reference_rewards[index]

    def _score_references(self, batch: RolloutBatch, indices: Sequence[int]) -> None:
        """Score the references of several prompts in one call, and keep what they earn in the batch."""
        wanted = [index for index in dict.fromkeys(indices) if index not in batch.reference_rewards]
        rollouts = [
            (index, self._as_rollout(self.prompts[index], i, ids, "reference"))
            for index in wanted
            for i, ids in enumerate(self._references_of(self.prompts[index]))
        ]
        found: dict[int, list[float]] = {index: [] for index in wanted}
        for (index, _), total in zip(rollouts, self._score_alone(rollouts), strict=True):
            found[index].append(total)
        batch.reference_rewards |= found

    def _as_rollouts(
        self, batch: RolloutBatch, completions: list[Any], completion_ids: list[list[int]]
    ) -> list[Rollout]:
        """Give what TRL's own paths generated (vLLM, continuous batching, tools) the shape of rollouts."""
        rollouts = []
        sampled = self._rollouts_of_ids(batch, completion_ids)
        for rollout, completion in zip(sampled, completions, strict=True):
            if isinstance(completion, str):
                rollouts.append(dataclasses.replace(rollout, text=completion))
            else:
                answers = [message.get("content") for message in completion if message["role"] == "assistant"]
                text = str(answers[-1] or "") if answers else ""  # a turn that only calls a tool says nothing
                rollouts.append(dataclasses.replace(rollout, text=text, messages=tuple(completion)))
        if batch.tool_mask is not None:
            pairs = zip(rollouts, batch.tool_mask, strict=True)
            rollouts = [dataclasses.replace(r, loss_mask=tuple(map(bool, mask))) for r, mask in pairs]
        return rollouts

    def _rollouts_of_ids(self, batch: RolloutBatch, completion_ids: list[list[int]]) -> list[Rollout]:
        first = self.accelerator.process_index * len(batch.rows)
        strategy = Sample(temperature=self.temperature).spec
        return [
            self._as_rollout(self.prompts[index], (first + i) % self.num_generations, tuple(ids), strategy)
            for i, (index, ids) in enumerate(zip(batch.indices, completion_ids, strict=True))
        ]

    def _as_rollout(self, prompt: Prompt, sample_index: int, ids: Ids, strategy: str) -> Rollout:
        """Token ids that rlseq's sampler did not generate, as a rollout without log-probs."""
        text = self.processing_class.decode(ids, skip_special_tokens=True)
        ended = (ids and ids[-1] in self.eos_token_ids) or self.stop_strings.cuts(ids)
        return Rollout.from_ids(
            prompt.key,
            ids,
            self.stop_strings.text(ids, text),
            sample=sample_index,
            text_with_special_tokens=self.processing_class.decode(ids, skip_special_tokens=False),
            chat=not isinstance(prompt.prompt, str),
            finish_reason="stop" if ended else "length",
            strategy=strategy,
        )


class _RewardContext:
    """What TRL's batch signature of a reward may ask the trainer for."""

    def __init__(self, trainer: ScoringMixin):
        self.trainer_state = trainer.state
        self.log_extra = trainer._log_completion_extra
        self.log_metric = trainer._log_metric
