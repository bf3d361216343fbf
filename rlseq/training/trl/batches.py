"""How a batch of rollouts is made: one method of the trainer, in place of TRL's, which this states once.

    make_batch         rows -> RolloutBatch: sample, old and reference log-probs, score, advantages, log
    _prepare_inputs    makes one when it is due, and hands out its micro-batches

TRL's own completions (tools, `rollout_func`, vLLM, continuous batching) come by its `_generate` and
`_generate_single_turn`. Token ids stay as they were sampled, ragged, up to the packed forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import nanstd, use_adapter

from rlseq.engine.model.info import attention_of
from rlseq.errors import ConfigError
from rlseq.losses import importance_ratio
from rlseq.training.forward import Ids, Scores, forward
from rlseq.training.rollouts import MicroBatch, RolloutBatch, group_rewards
from rlseq.training.run.faults import memory_for, update_advice
from rlseq.training.trl.rollouts import SamplingMixin
from rlseq.training.trl.scoring import ScoringMixin
from rlseq.training.trl.tracking import Completions, Tracking

NAN = float("nan")


class BatchMixin(SamplingMixin, ScoringMixin):
    """Makes batches of rollouts. A trainer says what their advantages are, and what else its loss reads.

    Attributes:
        packs: whether a forward takes packed rows.
        asks_values: whether the forward of an update asks a critic, too.
        tracking: shows completions.
    """

    packs: bool
    tracking: Tracking
    asks_values = False

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single rows, which would tear prompts from their samples; groups are shuffled whole, by a
        # generator of their own, so that no other random number of the run changes.
        if not self.model.training:
            raise ConfigError(
                "rollouts are not predicted: sample by rlseq.sample, or measure by evaluate or rlseq.contrast"
            )
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            with memory_for("scoring the rollouts (log-probs, the reference, values)", update_advice, self.args):
                trained = self.make_batch(generation_batch).trained
            rows = self._shuffle_groups(trained.prompt_index)
            size = len(rows) // self.args.steps_per_generation
            starts = range(0, size * self.args.steps_per_generation, size)
            self._buffered_inputs = [trained.select(rows[start : start + size]) for start in starts]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def make_batch(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample, score and log the rollouts of B rows of the data set."""
        batch = RolloutBatch(rows)
        if not self.samples:
            prompt_ids = tuple(self.prompts[index].prompt_ids for index in batch.indices)
            batch.trained = MicroBatch(tuple(batch.indices), prompt_ids)
            return batch
        self.batch = batch
        batch.asked = self._ask(rows)
        prompt_ids, completion_ids, batch.tool_mask, completions, logprobs, told, *_ = self._complete(batch)
        batch.told = [
            {name: of[i] if isinstance(of, list) else of for name, of in told.items()} for i in range(len(rows))
        ]
        batch.trained = self._trained_rows(batch, prompt_ids, completion_ids, logprobs)
        self._add_logprobs(batch)
        values = self._score(batch, completions, completion_ids)
        self._log_rewards(batch, values)
        batch.trained = replace(batch.trained, **self.advantages_of(batch, values), **self.objective_fields(batch))
        advantages = batch.trained.advantages
        if advantages.ndim > 1:  # one per token: their mean
            advantages = advantages.sum(1) / batch.trained.mask.sum(1).clamp(min=1)
        if self.args.log_completions:
            self.tracking.completions = self._completions(batch, completions, values, advantages)
        self._pending_extra_logs.clear()
        self.log_rollouts(batch, advantages)
        return batch

    @property
    def samples(self) -> bool:
        """Whether the objective needs rollouts."""
        return True

    def advantages_of(self, batch: RolloutBatch, values: Tensor) -> dict[str, Tensor]:
        """The advantages of a batch, (B,) or (B, T), and what comes with them, as fields of a `MicroBatch`.

        Args:
            batch: sampled and scored.
            values: (N·B, rewards) of all processes, NaN where abstained.
        """
        raise NotImplementedError

    def objective_fields(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """What an objective reads beside that, likewise."""
        return {}

    def log_rollouts(self, batch: RolloutBatch, advantages: Tensor) -> None:
        """Write the rollouts, with their advantages (B,), where they are written."""

    # -- micro-batches -------------------------------------------------------------------------------------------

    def _trained_rows(
        self,
        batch: RolloutBatch,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        logprobs: list[list[float | None]] | None,
    ) -> MicroBatch:
        """All rows of the batch as updates read them, as far as sampling has told it."""
        device = self.accelerator.device

        def by_token(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:  # (B, T), 0 after the end
            tensors = [torch.tensor(row, dtype=dtype) for row in rows]
            return pad_sequence(tensors, batch_first=True).to(device)

        chosen = batch.tool_mask  # which tokens the model chose
        if chosen is None and batch.rollouts is not None:
            chosen = [rollout.loss_mask for rollout in batch.rollouts]
        if chosen is None:
            chosen = [[True] * len(ids) for ids in completion_ids]
        mask = by_token(chosen, torch.bool)
        if self.mask_truncated_completions:
            mask &= torch.tensor(self._ended(batch, completion_ids), device=device)[:, None]
        if logprobs is not None:  # vLLM gives None for a NaN
            logprobs = by_token([[NAN if x is None else x for x in of] for of in logprobs], torch.float32)
        return MicroBatch(
            prompt_index=tuple(batch.indices),
            prompt_ids=tuple(map(tuple, prompt_ids)),
            completion_ids=tuple(map(tuple, completion_ids)),
            mask=mask,
            sampled_logprobs=logprobs,
            trained_tokens=self.accelerator.gather(mask.sum()).sum(),
        )

    def _shuffle_groups(self, prompt_index: Sequence[int]) -> list[int]:
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
        groups, K = list(groups_of.values()), self.args.steps_per_generation
        if K == 1:
            return list(range(len(prompt_index)))

        def permutation(size: int, *name: int) -> list[int]:
            generator = torch.Generator().manual_seed(hash((self.args.seed, self.stream, *name)) % 2**63)
            return torch.randperm(size, generator=generator).tolist()

        if len(groups) % K or len({len(group) for group in groups}) > 1:
            order = [groups[g] for g in permutation(len(groups))]
        else:
            blocks = len(groups) // K
            first = self.accelerator.process_index * blocks  # of the blocks of all processes
            dealt = [permutation(K, first + block) for block in range(blocks)]
            order = [groups[block * K + dealt[block][minibatch]] for minibatch in range(K) for block in range(blocks)]
        return [row for group in order for row in group]

    # -- log-probs -----------------------------------------------------------------------------------------------

    def _add_logprobs(self, batch: RolloutBatch) -> None:
        """Log-probs of the policy that sampled, where the update will have left it, and of the reference."""
        args, trained = self.args, batch.trained
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        if corrects or args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations):
            exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
            if batch.rollouts is not None and exact:
                # The sampler recorded them: the same numbers as a fresh forward, to rounding. bfloat16's,
                # under autocast, would leave GSPO's narrow clip: there they are those of a forward like the update's.
                old = trained.sampled_logprobs
            else:
                old = self._logprobs_by(self.model, trained)
            trained = replace(trained, old_logprobs=old)
        if corrects:
            trained = replace(trained, importance_ratio=self._importance_ratio(trained))
        if self.beta:
            trained = replace(trained, ref_logprobs=self._reference_logprobs(trained))
        batch.trained = trained

    def _reference_logprobs(self, trained: MicroBatch) -> Tensor:
        if self.ref_model is not None:
            return self._logprobs_by(self.ref_model, trained)
        # an adapter: the base without it, or with the copy of the one that trains on
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._logprobs_by(self.model, trained)

    def _logprobs_by(self, model: torch.nn.Module, trained: MicroBatch) -> Tensor:
        return torch.cat([part.logprobs for part in self.scores_in_parts(model, trained)])

    def scores_in_parts(self, model: torch.nn.Module, trained: MicroBatch, **more: Any) -> list[Scores]:
        """What a model says of a batch's completions, without gradient, a micro-batch at a time."""
        size, rows = self.args.per_device_train_batch_size, range(len(trained))
        parts = [trained.select(rows[start : start + size]) for start in rows[::size]]
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return [self.token_scores(model, part, **more) for part in parts]

    def _importance_ratio(self, trained: MicroBatch) -> Tensor:
        """Policy over vLLM, (B, T), or (B, 1) of whole sequences, clipped as `vllm_importance_sampling_mode` says."""
        level, _, how = self.vllm_importance_sampling_mode.partition("_")
        mask, old, sampled = trained.mask, trained.old_logprobs, trained.sampled_logprobs
        ratio = importance_ratio(
            old,
            sampled,
            mask,
            level=level,
            how=how,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
        )
        apart = (old - sampled).abs()[mask & ~sampled.isnan()]
        of = ratio.flatten() if level == "sequence" else ratio[mask]
        if not len(apart):
            apart = apart.new_zeros(1)
        if not len(of):
            of = of.new_zeros(1)
        metrics, gather = self._metrics[self._mode], self.accelerator.gather
        difference, ratios = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        metrics[f"{difference}/mean"].append(gather(apart.mean()).mean().item())
        metrics[f"{difference}/max"].append(gather(apart.max()).max().item())
        metrics[f"{ratios}/min"].append(gather(of.min()).min().item())
        metrics[f"{ratios}/mean"].append(gather(of.mean()).mean().item())
        metrics[f"{ratios}/max"].append(gather(of.max()).max().item())
        return ratio

    def token_scores(
        self,
        model: torch.nn.Module,
        batch: MicroBatch,
        references: Sequence[Sequence[Ids]] = (),
        rows: Sequence[int] | None = None,
        **more: Any,
    ) -> Scores:
        """What one forward of a micro-batch says of its completions, and of the references of its rows.

        Args:
            model: the policy, or the reference.
            batch: the rows; a completion of which no token is trained is not scored.
            references: of each row.
            rows: which alone are scored; None: all. The log-probs of the others are those of the policy that sampled
                (0 where the batch has none), and their entropies NaN.
            more: for `rlseq.training.forward.forward`.
        """
        if rows is not None and len(rows) < len(batch):
            scores = self.token_scores(model, batch.select(rows), **more)
            index = torch.tensor(rows, device=self.accelerator.device)
            others = torch.zeros_like(batch.mask, dtype=scores.logprobs.dtype)
            if batch.old_logprobs is not None:
                others = batch.old_logprobs.to(others)
            return Scores(
                others.index_copy(0, index, scores.logprobs),
                torch.full_like(others, NAN).index_copy(0, index, scores.entropies),
            )
        completions, width = None, 0
        if batch.completion_ids is not None:
            trains, width = batch.mask.any(1).tolist(), batch.mask.shape[1]
            completions = [ids if counts else () for ids, counts in zip(batch.completion_ids, trains, strict=True)]
        with self.accelerator.autocast():
            return forward(
                model,
                batch.prompt_ids,
                completions,
                width,
                references=references,
                packs=self.packs,
                pad_id=self.processing_class.pad_token_id,
                dtype=self.model.dtype,
                device=self.accelerator.device,
                attention=attention_of(self.model),
                temperature=None if self.args.cast_lm_head_to_fp32 else self.temperature,
                **more,
            )

    # -- logs ----------------------------------------------------------------------------------------------------

    def _local(self, batch: RolloutBatch, over_all_processes: Tensor) -> Tensor:
        """This process's rows of a tensor of all processes' rows."""
        first = self.accelerator.process_index * len(batch.rows)
        return over_all_processes[first : first + len(batch.rows)]

    def _groups(self, batch: RolloutBatch) -> Tensor:
        """Totals of all processes as groups, (P, G)."""
        return batch.totals.view(-1, self._group_size)

    def _log_rewards(self, batch: RolloutBatch, values: Tensor) -> None:
        """Means and deviations over the batch of all processes, of what did not abstain."""
        metrics = self._metrics[self._mode]
        for name, of in zip(self.suite.names, values.unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"].append(of.nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(of).item())
        present = batch.totals[~batch.totals.isnan()]
        metrics["reward"].append(present.mean().item() if len(present) else NAN)
        metrics["reward_std"].append(present.std().item() if len(present) > 1 else 0.0)
        if self.args.counts_equal_groups:  # else they teach too: they are compared with something else than each other
            groups = self._groups(batch)
            most = torch.where(groups.isnan(), -torch.inf, groups).amax(1)
            least = torch.where(groups.isnan(), torch.inf, groups).amin(1)
            metrics["frac_reward_zero_std"].append((most <= least).float().mean().item())
        if self.args.group_column is not None:
            indices = gather_object(batch.indices)
            for name, value in group_rewards(self.prompts, indices, batch.totals, self.args.group_column).items():
                metrics[name].append(value)
        if batch.greedy_totals is not None:
            metrics["greedy_reward"].append(batch.greedy_totals.nanmean().item())
        # What rewards logged by `log_metric`; sorted, so that all processes gather in one order.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            mine = self._pending_metrics.get(name, [])
            sums = torch.tensor([sum(mine), len(mine)], dtype=torch.float32, device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            metrics[name].append(total / count)
        self._pending_metrics.clear()

    def _completions(
        self, batch: RolloutBatch, completions: list[Any], values: Tensor, advantages: Tensor
    ) -> Completions:
        """The batch of all processes, as it is shown; called on all of them."""
        mine, size = self._pending_extra_logs, len(batch.rows)
        names = sorted(set(gather_object(list(mine))))
        extra = {name: gather_object(mine.get(name, [None] * size)[-size:]) for name in names}
        return Completions(
            prompts=gather_object(batch.asked),
            completions=gather_object(completions),
            rewards=dict(zip(self.suite.names, values.t().tolist(), strict=True)),
            advantages=self.accelerator.gather(advantages).tolist(),
            extra=extra | {"total": batch.totals.tolist()},
        )
