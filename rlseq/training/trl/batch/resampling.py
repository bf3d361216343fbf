"""Dynamic sampling: groups whose rewards are all equal give way to other prompts' before the update."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlseq.errors import ConfigError
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.selection.curriculum import OnlineCurriculum
from rlseq.training.selection.resampling import SparePrompts, equal_groups
from rlseq.training.trl.batch.rollouts import RolloutSampler
from rlseq.training.trl.batch.scoring import RewardScorer
from rlseq.training.trl.logging.metrics import TrainingMetrics

OF_ROLLOUTS = ("rows", "asked", "prompt_ids", "rollouts", "completions", "logprobs", "scored", "told")


def prompts_of_groups(batch: RolloutBatch) -> list[int]:
    """The prompt of each group of all processes."""
    return [index for indices in gather_object([batch.indices]) for index in indices][:: batch.group_size]


class DynamicSampling:
    """Samples other prompts in place of those whose samples earned the same (DAPO, Yu et al. 2025, section 3.2).

    Which prompts are asked depends on the rewards of all processes' groups alone, not on how many processes there are.

    Args:
        trainer: TRL's, with the rows of the data set.
        rounds: the most times that the places of a batch are filled again.
        sampler, scorer: of the batch itself.
        spare: the prompts that take others' places.
        metrics: what is logged goes there.
        curriculum: hears of the rewards, and says which prompts take no place; None: all do.

    Raises:
        ConfigError: a process would hold parts of groups.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        rounds: int,
        sampler: RolloutSampler,
        scorer: RewardScorer,
        spare: SparePrompts,
        metrics: TrainingMetrics,
        curriculum: OnlineCurriculum | None = None,
    ):
        args = trainer.args
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % trainer.num_generations:
            raise ConfigError(
                f"resample_equal_groups asks for whole groups on each process, which samples {rows} completions at a "
                f"time, {trainer.num_generations} a prompt: make per_device_train_batch_size × steps_per_generation a "
                "multiple of num_generations"
            )
        self.trainer = trainer
        self.rounds = rounds
        self.sampler = sampler
        self.scorer = scorer
        self.spare = spare
        self.metrics = metrics
        self.curriculum = curriculum

    def fill(self, batch: RolloutBatch, values: Tensor) -> Tensor:
        """Let equal groups of a scored batch give way; returns `values` with those of the groups in their places.

        A group whose place is filled `rounds` times with equal ones stays as it is then.

        Args:
            batch: sampled and scored; changed.
            values: (N·B, rewards) of all processes.
        """
        first, discarded = batch.totals.nanmean().item(), 0
        asked = set(prompts_of_groups(batch))
        unwanted = self.curriculum.outside() if self.curriculum is not None else set()
        replaced: set[int] = set()
        for _ in range(self.rounds):
            slots = torch.nonzero(equal_groups(batch.groups)).flatten().tolist()
            prompts = self.spare.take(len(slots), besides=asked | unwanted)
            if not prompts:  # no group is equal, or no prompt is left
                break
            asked |= set(prompts)
            slots = slots[: len(prompts)]
            values = self._fill(batch, values, dict(zip(slots, prompts, strict=True)))
            replaced |= set(slots)
            discarded += len(slots) * batch.group_size
        series = self.metrics.series
        series["reward_first_round"].append(first)
        series["frac_groups_resampled"].append(len(replaced) / len(batch.groups))
        series["discarded_rollouts"].append(discarded)
        return values

    def _fill(self, batch: RolloutBatch, values: Tensor, prompts: dict[int, int]) -> Tensor:
        """Sample and score a prompt for each group, by the places of groups among all processes', and put it there."""
        accelerator, G = self.trainer.accelerator, batch.group_size
        groups_here = len(batch.rows) // G
        of_process: list[list[int]] = [[] for _ in range(accelerator.num_processes)]
        for slot in prompts:
            of_process[slot // groups_here].append(slot)
        most = max(map(len, of_process))
        mine = of_process[accelerator.process_index]
        # All processes score equally many: one with fewer places asks the first prompt too, and drops the answers.
        indices = [prompts[slot] for slot in mine] + [next(iter(prompts.values()))] * (most - len(mine))
        rows = [dict(self.trainer.train_dataset[index]) for index in indices for _ in range(G)]
        other = RolloutBatch(rows, accelerator.process_index * len(rows), G)
        other.asked = self.sampler.ask(rows)
        self.sampler.complete(other)
        extra = self.trainer._pending_extra_logs  # what rewards log of each rollout, as `log_extra` appends it
        before = {name: len(of) for name, of in extra.items()}
        found = self.scorer.score(other)
        if self.curriculum is not None:
            self.curriculum.record(prompts_of_groups(other), other.groups)
        columns = [(getattr(batch, name), getattr(other, name)) for name in OF_ROLLOUTS]
        for name, of in extra.items():
            kept, new = of[: before.get(name, 0)], of[before.get(name, 0) :]
            extra[name] = kept or [None] * len(batch.rows)
            columns.append((extra[name], new or [None] * len(rows)))
        for name, count in other.failures.items():
            batch.failures[name] = batch.failures.get(name, 0.0) + count
        first = accelerator.process_index * groups_here
        for number, slot in enumerate(mine):
            for sample in range(G):
                for of_batch, of_other in columns:
                    of_batch[(slot - first) * G + sample] = of_other[number * G + sample]
        values = values.clone()
        for process, slots in enumerate(of_process):
            for number, slot in enumerate(slots):
                to = slice(slot * G, slot * G + G)
                of = slice((process * most + number) * G, (process * most + number + 1) * G)
                values[to], batch.totals[to] = found[of], other.totals[of]
        return values
