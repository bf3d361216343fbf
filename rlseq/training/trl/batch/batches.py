"""How a batch of rollouts is made, in place of TRL's `_generate_and_score_completions`.

Rows become a `RolloutBatch`: sample, old and reference log-probs, score, advantages, log. Token ids stay as they were
sampled, ragged, up to the packed forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import nanstd, use_adapter

from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.losses import importance_ratio, leave_one_prompt_out_baseline
from rlseq.training.rollouts import MicroBatch, RolloutBatch, group_rewards
from rlseq.training.run.rollout_log import RolloutLog, rollout_records
from rlseq.training.selection.curriculum import OnlineCurriculum
from rlseq.training.selection.resampling import equal_groups
from rlseq.training.trl.batch.packed_forward import PackedForward
from rlseq.training.trl.batch.resampling import DynamicSampling, prompts_of_groups
from rlseq.training.trl.batch.rollouts import RolloutSampler
from rlseq.training.trl.batch.scoring import RewardScorer
from rlseq.training.trl.logging.metrics import TrainingMetrics
from rlseq.training.trl.logging.trackers import Completions, Tracking

NAN = float("nan")


class Advantages(Protocol):
    """What turns rewards into advantages."""

    def of(self, batch: RolloutBatch, values: Tensor) -> dict[str, Tensor]:
        """The advantages of a batch, (B,) or (B, T), and what comes with them, as fields of a `MicroBatch`.

        Args:
            batch: sampled and scored.
            values: (N·B, rewards) of all processes, NaN where abstained.
        """


class BatchMaker:
    """Makes batches of rollouts, and cuts them into minibatches.

    Args:
        trainer: TRL's, with the models and the settings.
        sampler, scorer, advantages: what each stage is left to.
        forward: gives log-probs.
        metrics: what is logged goes there.
        tracking: shows completions.
        log: where rollouts are written; None writes nothing.
        resampling: lets groups give way that teach nothing; None: none does.
        curriculum: lets prompts give way before they are sampled; None: none does.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        sampler: RolloutSampler,
        scorer: RewardScorer,
        advantages: Advantages,
        forward: PackedForward,
        metrics: TrainingMetrics,
        tracking: Tracking,
        log: RolloutLog | None,
        resampling: DynamicSampling | None = None,
        curriculum: OnlineCurriculum | None = None,
    ):
        self.trainer = trainer
        self.sampler = sampler
        self.scorer = scorer
        self.advantages = advantages
        self.forward = forward
        self.metrics = metrics
        self.tracking = tracking
        self.log = log
        self.resampling = resampling
        self.curriculum = curriculum

    def make(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample, score and log the rollouts of B rows of the data set."""
        trainer, args = self.trainer, self.trainer.args
        batch = RolloutBatch(rows, trainer.accelerator.process_index * len(rows), self.sampler.group_size)
        if args.objective in EXACT_OBJECTIVES:  # no rollouts
            prompt_ids = tuple(self.scorer.prompts[index].prompt_ids for index in batch.indices)
            batch.trained = MicroBatch(tuple(batch.indices), prompt_ids)
            return batch
        if self.curriculum is not None:
            self._choose_prompts(batch)
        batch.asked = self.sampler.ask(batch.rows)
        self.sampler.complete(batch)
        values = None
        if not self.sampler.renders:  # else TRL logs, and what it or an environment tells of a rollout is a column
            self.scorer.submit(batch)
            if self.resampling is not None:
                values = self.resampling.fill(batch, self._score(batch))
            self.sampler.log_lengths(batch)
        if trainer.think_end:
            self.sampler.log_thoughts(batch)
        batch.trained = self._trained_rows(batch)
        self._add_logprobs(batch)
        values = self._score(batch) if values is None else values
        self._log_rewards(batch, values)
        fields = self.advantages.of(batch, values) | self._objective_fields(batch)
        batch.trained = replace(batch.trained, **fields)
        advantages = batch.trained.advantages
        if advantages.ndim > 1:  # one per token: their mean
            advantages = advantages.sum(1) / batch.trained.mask.sum(1).clamp(min=1)
        if args.log_completions:
            self.tracking.completions = self._completions(batch, values, advantages)
        trainer._pending_extra_logs.clear()
        if self.log is not None and trainer.model.training:
            self._log_rollouts(batch, advantages)
        return batch

    def _choose_prompts(self, batch: RolloutBatch) -> None:
        """Put other rows of the data set in the places of prompts that give way, on all processes alike."""
        prompts, G = prompts_of_groups(batch), batch.group_size
        chosen = self.curriculum.choose(prompts)
        for i, row in enumerate(batch.rows):
            place = (batch.first + i) // G
            if chosen[place] != row["index"]:
                batch.rows[i] = dict(self.trainer.train_dataset[chosen[place]])
        replaced = sum(one != other for one, other in zip(prompts, chosen, strict=True))
        self.metrics.series["frac_prompts_replaced"].append(replaced / len(prompts))

    def _score(self, batch: RolloutBatch) -> Tensor:
        values = self.scorer.score(batch)
        if self.curriculum is not None:
            self.curriculum.record(prompts_of_groups(batch), batch.groups)
        return values

    # -- micro-batches -------------------------------------------------------------------------------------------

    def minibatches(self, trained: MicroBatch) -> list[MicroBatch]:
        """The rows of a batch, group by group, in the parts that updates take in turn."""
        rows, K = self.shuffled(trained.prompt_index), self.trainer.args.steps_per_generation
        size = len(rows) // K
        return [trained.select(rows[start : start + size]) for start in range(0, size * K, size)]

    def _trained_rows(self, batch: RolloutBatch) -> MicroBatch:
        """All rows of the batch as updates read them, as far as sampling has told it."""
        trainer, device = self.trainer, self.trainer.accelerator.device

        def by_token(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:  # (B, T), 0 after the end
            tensors = [torch.tensor(row, dtype=dtype) for row in rows]
            return pad_sequence(tensors, batch_first=True).to(device)

        completion_ids = tuple(rollout.completion_ids for rollout in batch.rollouts)
        mask = by_token([rollout.loss_mask for rollout in batch.rollouts], torch.bool)
        if trainer.mask_truncated_completions:
            mask &= torch.tensor(self.sampler.ended(batch), device=device)[:, None]
        logprobs = None
        if batch.logprobs is not None:  # vLLM gives None for a NaN
            logprobs = by_token([[NAN if x is None else x for x in of] for of in batch.logprobs], torch.float32)
        return MicroBatch(
            prompt_index=tuple(batch.indices),
            prompt_ids=tuple(map(tuple, batch.prompt_ids)),
            completion_ids=completion_ids,
            mask=mask,
            sampled_logprobs=logprobs,
            trained_tokens=trainer.accelerator.gather(mask.sum()).sum(),
        )

    def shuffled(self, prompt_index: Sequence[int]) -> list[int]:
        """Deal the groups of a batch to its K minibatches: of every K that follow each other, each gets one, at random.

        So which groups share a minibatch, over all processes, does not depend on how many of those there are. Where
        groups do not come out even, this process's are shuffled.

        Args:
            prompt_index: of each row, the prompt that its group has.

        Returns:
            The rows in their new order, minibatch after minibatch.
        """
        groups_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompt_index):
            groups_of.setdefault(prompt, []).append(row)
        groups, args = list(groups_of.values()), self.trainer.args
        K = args.steps_per_generation
        if K == 1:
            return list(range(len(prompt_index)))

        def permutation(size: int, *name: int) -> list[int]:
            generator = torch.Generator().manual_seed(hash((args.seed, self.sampler.stream, *name)) % 2**63)
            return torch.randperm(size, generator=generator).tolist()

        if len(groups) % K or len({len(group) for group in groups}) > 1:
            order = [groups[g] for g in permutation(len(groups))]
        else:
            blocks = len(groups) // K
            first = self.trainer.accelerator.process_index * blocks  # of the blocks of all processes
            dealt = [permutation(K, first + block) for block in range(blocks)]
            order = [groups[block * K + dealt[block][minibatch]] for minibatch in range(K) for block in range(blocks)]
        return [row for group in order for row in group]

    # -- log-probs -----------------------------------------------------------------------------------------------

    def _add_logprobs(self, batch: RolloutBatch) -> None:
        """Log-probs of the policy that sampled, where the update will have left it, and of the reference."""
        trainer, args, trained = self.trainer, self.trainer.args, batch.trained
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        if corrects or args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations):
            exact = trainer.model.dtype == torch.float32 and trainer.accelerator.mixed_precision == "no"
            if self.sampler.records_logprobs and exact:
                # The sampler recorded them: the same numbers as a fresh forward, to rounding. bfloat16's,
                # under autocast, would leave GSPO's narrow clip: there they are those of a forward like the update's.
                old = trained.sampled_logprobs
            else:
                old = self.forward.logprobs(trainer.model, trained)
            trained = replace(trained, old_logprobs=old)
        if corrects:
            trained = replace(trained, importance_ratio=self.importance_ratio(trained))
        if trainer.beta:
            trained = replace(trained, ref_logprobs=self._reference_logprobs(trained))
        if trainer.teacher is not None:
            trained = replace(trained, teacher_states=trainer.teacher.states(trained))
        batch.trained = trained

    def _reference_logprobs(self, trained: MicroBatch) -> Tensor:
        trainer = self.trainer
        if trainer.ref_model is not None:
            return self.forward.logprobs(trainer.ref_model, trained)
        # an adapter: the base without it, or with the copy of the one that trains on
        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.forward.logprobs(trainer.model, trained)

    def importance_ratio(self, trained: MicroBatch) -> Tensor:
        """Policy over vLLM, (B, T), or (B, 1) of whole sequences, clipped as `vllm_importance_sampling_mode` says."""
        trainer = self.trainer
        level, _, how = trainer.vllm_importance_sampling_mode.partition("_")
        mask, old, sampled = trained.mask, trained.old_logprobs, trained.sampled_logprobs
        ratio = importance_ratio(
            old,
            sampled,
            mask,
            level=level,
            how=how,
            low=trainer.vllm_importance_sampling_clip_min,
            high=trainer.vllm_importance_sampling_clip_max,
        )
        apart = (old - sampled).abs()[mask & ~sampled.isnan()]
        of = ratio.flatten() if level == "sequence" else ratio[mask]
        if not len(apart):
            apart = apart.new_zeros(1)
        if not len(of):
            of = of.new_zeros(1)
        metrics, gather = self.metrics.series, trainer.accelerator.gather
        difference, ratios = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        metrics[f"{difference}/mean"].append(gather(apart.mean()).mean().item())
        metrics[f"{difference}/max"].append(gather(apart.max()).max().item())
        metrics[f"{ratios}/min"].append(gather(of.min()).min().item())
        metrics[f"{ratios}/mean"].append(gather(of.mean()).mean().item())
        metrics[f"{ratios}/max"].append(gather(of.max()).max().item())
        return ratio

    # -- objectives ----------------------------------------------------------------------------------------------

    def _objective_fields(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """What rlseq's objectives read: the totals, and of those with references which rollouts are one."""
        args = self.trainer.args
        if args.objective == "policy_gradient":
            return {}
        found = {"totals": batch.local(batch.totals)}
        if args.objective != "reference_exact":
            return found
        known = {index: set(self.scorer.references_of(index)) for index in dict.fromkeys(batch.indices)}
        is_reference = torch.tensor(
            [one.completion_ids in known[index] for one, index in zip(batch.rollouts, batch.indices, strict=True)],
            device=batch.totals.device,
        )
        rejected = self.trainer.accelerator.gather(is_reference)  # (N·B,), all processes
        rest = ~rejected & ~batch.totals.isnan()
        groups = batch.groups
        elsewhere, counts = leave_one_prompt_out_baseline(groups, rest.view(groups.shape))  # (P,) each
        self.metrics.series["frac_reference"].append(rejected.float().mean().item())
        return found | {
            "is_reference": is_reference,
            "num_rest": batch.local(counts.repeat_interleave(batch.group_size)),
            "rest_reward": batch.local(elsewhere.repeat_interleave(batch.group_size)),
        }

    # -- logs ----------------------------------------------------------------------------------------------------

    def _log_rollouts(self, batch: RolloutBatch, advantages: Tensor) -> None:
        """Write the rollouts of all processes, with their advantages (B,)."""
        step = self.trainer.state.global_step + 1  # the first step they train
        prompts = [self.scorer.prompts[index] for index in batch.indices]
        if self.trainer.environments:  # what `reset` told the model belongs to the prompt
            asked = zip(prompts, batch.asked, strict=True)
            prompts = [replace(prompt, prompt=messages) for prompt, messages in asked]
        records = gather_object(rollout_records(step, prompts, batch.scored, advantages.tolist(), batch.told))
        if self.trainer.accelerator.is_main_process:
            self.log.write(step, records)

    def _log_rewards(self, batch: RolloutBatch, values: Tensor) -> None:
        """Means and deviations over the batch of all processes, of what did not abstain."""
        trainer, metrics = self.trainer, self.metrics.series
        for name, of in zip(self.scorer.suite.names, values.unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"].append(of.nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(of).item())
        for name, count in batch.failures.items():
            metrics[name].append(count)
        if self.scorer.suite.names:
            present = batch.totals[~batch.totals.isnan()]
            metrics["reward"].append(present.mean().item() if len(present) else NAN)
            metrics["reward_std"].append(present.std().item() if len(present) > 1 else 0.0)
        if trainer.args.counts_equal_groups:  # else they teach too, compared with something else than each other
            metrics["frac_reward_zero_std"].append(equal_groups(batch.groups).float().mean().item())
        column = trainer.args.group_column
        if column is not None:
            indices = gather_object(batch.indices)
            for name, value in group_rewards(self.scorer.prompts, indices, batch.totals, column).items():
                metrics[name].append(value)
        if batch.greedy_totals is not None:
            metrics["greedy_reward"].append(batch.greedy_totals.nanmean().item())
        # What rewards logged by `log_metric`; sorted, so that all processes gather in one order.
        for name in sorted(set(gather_object(list(trainer._pending_metrics)))):
            mine = trainer._pending_metrics.get(name, [])
            sums = torch.tensor([sum(mine), len(mine)], dtype=torch.float32, device=trainer.accelerator.device)
            total, count = trainer.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            metrics[name].append(total / count)
        trainer._pending_metrics.clear()

    def _completions(self, batch: RolloutBatch, values: Tensor, advantages: Tensor) -> Completions:
        """The batch of all processes, as it is shown; called on all of them."""
        mine, size = self.trainer._pending_extra_logs, len(batch.rows)
        names = sorted(set(gather_object(list(mine))))
        extra = {name: gather_object(mine.get(name, [None] * size)[-size:]) for name in names}
        return Completions(
            prompts=gather_object(batch.asked),
            completions=gather_object(batch.completions),
            rewards=dict(zip(self.scorer.suite.names, values.t().tolist(), strict=True)),
            advantages=self.trainer.accelerator.gather(advantages).tolist(),
            extra=extra | {"total": batch.totals.tolist()},
        )
