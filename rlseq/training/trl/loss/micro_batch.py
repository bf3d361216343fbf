"""The loss of a micro-batch: one packed forward, then policy gradient or another objective, and what is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.losses import kl_estimate
from rlseq.training.rollouts import MicroBatch
from rlseq.training.trl.batch.packed_forward import PackedForward
from rlseq.training.trl.batch.scoring import RewardScorer
from rlseq.training.trl.logging.metrics import TrainingMetrics
from rlseq.training.trl.loss.policy_gradient import PolicyGradient, accumulation, step_tokens
from rlseq.training.update.forward import Ids, Scores
from rlseq.training.update.objectives import (
    expected_accuracy_loss,
    minimum_risk_loss,
    reference_exact_loss,
    reference_loss,
)
from rlseq.training.update.teacher_targets import sequence_divergence_loss


class MicroBatchLoss:
    """Turns a micro-batch into a loss.

    Args:
        trainer: TRL's, with the settings and the reference's coefficient.
        forward: scores the micro-batch's tokens.
        scorer: knows the references of the rows' prompts, and what they earn.
        metrics: what is logged goes there.
    """

    asks_values = False  # whether the forward asks a critic, too

    def __init__(self, trainer: Any, forward: PackedForward, scorer: RewardScorer, metrics: TrainingMetrics):
        self.trainer = trainer
        self.forward = forward
        self.scorer = scorer
        self.metrics = metrics
        self.policy_gradient = PolicyGradient(trainer, metrics)

    @property
    def kl_coef(self) -> float:
        """What multiplies the KL to the start in the loss."""
        return self.trainer.beta

    def of(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, by one call of the model; divided by those that make up an optimizer step."""
        trainer, args = self.trainer, self.trainer.args
        references = self._references_of_rows(batch) if args.uses_references else []
        more = {"values": self.asks_values, "router_loss": trainer.aux_loss_enabled}
        if trainer.teacher is not None:
            more["teacher"] = trainer.teacher.targets(batch.teacher_states)
        scores = self.forward.scores(model, batch, references, self.rows_that_teach(batch), **more)
        if args.objective == "policy_gradient":
            loss = self.policy_gradient.loss(scores, batch, kl_coef=self.kl_coef)
            if self.kl_coef and args.kl_estimator is not None:
                loss = loss + self._kl_loss(scores, batch)
        else:
            loss = self._own_objective(scores, batch, references) / accumulation(trainer)
        return loss + self.additional_loss(scores, batch, references)

    def rows_that_teach(self, batch: MicroBatch) -> list[int] | None:
        """The rows of which the loss or its gradient needs a forward; None: all.

        A row without an advantage has none where the policy gradient is the whole loss, so that the update of a batch
        whose groups earned the same is cheap. One row stays, for a backward on this process as on the others.
        """
        trainer, args = self.trainer, self.trainer.args
        more = (self.kl_coef, trainer._entropy_bonus_enabled, trainer.aux_loss_enabled, self.asks_values)
        if args.objective != "policy_gradient" or args.uses_references or any(more) or trainer.teacher is not None:
            return None
        if trainer.top_entropy_quantile < 1.0 or args.policy_loss is not None or not trainer.model.training:
            return None
        teaches = batch.advantages != 0
        teaches = teaches if teaches.ndim == 1 else teaches.any(1)
        return torch.nonzero(teaches).flatten().tolist() or [0]

    def additional_loss(self, scores: Scores, batch: MicroBatch, references: Sequence[Sequence[Ids]]) -> Tensor | float:
        """What is added to the objective, from the same forward: the loss of a router, a teacher or the references."""
        trainer, coef = self.trainer, self.trainer.args.reference_loss_coef
        if scores.router_loss is not None:
            self.metrics.mean("aux_loss", scores.router_loss)
            return trainer.router_aux_loss_coef * scores.router_loss / accumulation(trainer)
        teacher_loss = 0.0 if scores.divergences is None else self._teacher_loss(scores, batch)
        if not coef:
            return teacher_loss
        # Every row has the same weight, shared among its references, so no split of the batch changes the sum.
        total = reference_loss(scores.references)
        if total is None:
            total = torch.zeros((), device=trainer.accelerator.device)
        with_references = [bool(found) for found in references]
        self.metrics.step_mean("reference_nll", total, torch.tensor(sum(with_references), device=total.device))
        return teacher_loss + coef * total / len(batch) / accumulation(trainer)

    def _teacher_loss(self, scores: Scores, batch: MicroBatch) -> Tensor:
        """The teacher's divergence: its mean over the step's tokens, or that of whole sequences over its rows."""
        trainer, args, mask = self.trainer, self.trainer.args, batch.mask
        self.metrics.masked_step_mean("teacher_divergence", scores.divergences, mask)
        if args.teacher_signal == "loss":
            return args.teacher_coef * self.step_mean(scores.divergences, mask, batch)
        clips = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high}
        losses = sequence_divergence_loss(scores.divergences, scores.logprobs, batch.old_logprobs, mask, **clips)
        return args.teacher_coef * losses.sum() / len(batch) / accumulation(trainer)

    def _kl_loss(self, scores: Scores, batch: MicroBatch) -> Tensor:
        """β times the estimated KL to the start: its mean over the tokens of the whole step."""
        kl = kl_estimate(scores.logprobs, batch.ref_logprobs, kind=self.trainer.args.kl_estimator or "k3")
        mask = batch.mask
        self.metrics.masked_step_mean("kl", kl, mask)
        return self.kl_coef * self.step_mean(kl, mask, batch)

    def _own_objective(self, scores: Scores, batch: MicroBatch, references: Sequence[Sequence[Ids]]) -> Tensor:
        """rlseq's objectives: the mean over the micro-batch's rows."""
        trainer, args, G = self.trainer, self.trainer.args, self.trainer.num_generations
        if args.objective in EXACT_OBJECTIVES:
            if scores.references.logprobs:
                loss, P = expected_accuracy_loss(scores.references, args.max_rl_order)
            else:
                loss = scores.logprobs.sum()  # 0, and a backward on this rank as on the others
                P = torch.zeros(1, device=loss.device)
            self.metrics.mean("expected_accuracy", P.mean())
            return loss / len(batch)
        mask = batch.mask
        rewards = batch.reference_rewards or ()
        if args.objective == "distillation":
            loss = torch.zeros((), device=mask.device)  # the teacher's divergence is added
        elif args.objective == "minimum_risk":
            loss = minimum_risk_loss(
                scores,
                batch.totals,
                batch.completion_ids,
                mask,
                num_generations=G,
                sharpness=args.minimum_risk_sharpness,
                reference_ids=references if args.minimum_risk_references else [],
                reference_rewards=rewards,
            )
        else:
            loss, P = reference_exact_loss(
                scores,
                batch,
                num_generations=G,
                clip_low=trainer.epsilon_low,
                clip_high=trainer.epsilon_high,
                reference_rewards=rewards,
            )
            self.metrics.mean("expected_accuracy", P.mean())
        self.metrics.masked_step_mean("entropy", scores.entropies, mask)
        loss = loss / len(batch)
        return loss + self._kl_loss(scores, batch) * accumulation(trainer) if self.kl_coef else loss

    def _references_of_rows(self, batch: MicroBatch) -> list[list[Ids]]:
        known = {i: self.scorer.references_of(i) for i in dict.fromkeys(batch.prompt_index)}
        return [known[i] for i in batch.prompt_index]

    def step_mean(self, x_BT: Tensor, mask: Tensor, batch: MicroBatch) -> Tensor:
        """This micro-batch's part of the mean over all counted tokens of the optimizer step, on all ranks."""
        return torch.where(mask, x_BT, 0.0).sum() / step_tokens(self.trainer, batch)
