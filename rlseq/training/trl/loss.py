"""The loss of a micro-batch: one packed forward, then policy gradient or another objective, and what is added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlseq.config.inherited import EXACT_OBJECTIVES
from rlseq.losses import kl_estimate
from rlseq.training.forward import Ids, Scores
from rlseq.training.objectives import (
    expected_accuracy_loss,
    minimum_risk_loss,
    reference_exact_loss,
    reference_loss,
)
from rlseq.training.rollouts import MicroBatch
from rlseq.training.trl.policy_gradient import PolicyGradientMixin


class LossMixin(PolicyGradientMixin):
    """Turns a micro-batch, as `make_batch` laid it out, into a loss."""

    _sums: dict[str, Tensor]  # Σ and count of what is logged, of the optimizer step under way

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.micro_batch_loss(model, inputs)

    def micro_batch_loss(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, by one call of the model; divided by those that make up an optimizer step."""
        references = self._references_of_rows(batch) if self.args.uses_references else []
        scores = self.token_scores(
            model,
            batch,
            references,
            self.rows_that_teach(batch),
            values=self.asks_values,
            router_loss=self.aux_loss_enabled,
        )
        if self.args.objective == "policy_gradient":
            loss = self.policy_gradient(scores, batch)
            if self.kl_loss_coef and self.args.kl_estimator is not None:
                loss = loss + self._kl_loss(scores, batch)
        else:
            loss = self._own_objective(scores, batch, references) / self._accumulation
        return loss + self.additional_loss(scores, batch, references)

    def additional_loss(self, scores: Scores, batch: MicroBatch, references: Sequence[Sequence[Ids]]) -> Tensor | float:
        """What is added to the objective, from the same forward: a router's loss, or that of the references."""
        if scores.router_loss is not None:
            self._log_mean("aux_loss", scores.router_loss)
            return self.router_aux_loss_coef * scores.router_loss / self._accumulation
        if not self.args.reference_loss_coef:
            return 0.0
        # Every row has the same weight, shared among its references, so no split of the batch changes the sum.
        total = reference_loss(scores.references)
        if total is None:
            total = torch.zeros((), device=self.accelerator.device)
        with_references = [bool(found) for found in references]
        self._log_sums("reference_nll", total, torch.tensor(sum(with_references), device=total.device))
        return self.args.reference_loss_coef * total / len(batch) / self._accumulation

    def _kl_loss(self, scores: Scores, batch: MicroBatch) -> Tensor:
        """β times the estimated KL to the start: its mean over the tokens of the whole step."""
        kl = kl_estimate(scores.logprobs, batch.ref_logprobs, kind=self.args.kl_estimator or "k3")
        mask = batch.mask
        self._log_masked_mean("kl", kl, mask)
        return self.kl_loss_coef * self._step_mean(kl, mask, batch)

    def _own_objective(self, scores: Scores, batch: MicroBatch, references: Sequence[Sequence[Ids]]) -> Tensor:
        """rlseq's objectives: the mean over the micro-batch's rows."""
        args, G = self.args, self.num_generations
        if args.objective in EXACT_OBJECTIVES:
            if scores.references.logprobs:
                loss, P = expected_accuracy_loss(scores.references, args.max_rl_order)
            else:
                loss = scores.logprobs.sum()  # 0, and a backward on this rank as on the others
                P = torch.zeros(1, device=loss.device)
            self._log_mean("expected_accuracy", P.mean())
            return loss / len(batch)
        mask = batch.mask
        rewards = [self._rewards_of_references(i) for i in batch.prompt_index] if args.scores_references else []
        if args.objective == "minimum_risk":
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
                clip_low=self.epsilon_low,
                clip_high=self.epsilon_high,
                reference_rewards=rewards,
            )
            self._log_mean("expected_accuracy", P.mean())
        self._log_masked_mean("entropy", scores.entropies, mask)
        loss = loss / len(batch)
        return loss + self._kl_loss(scores, batch) * self._accumulation if self.kl_loss_coef else loss

    def _references_of_rows(self, batch: MicroBatch) -> list[list[Ids]]:
        known = {i: self._references_of(self.prompts[i]) for i in dict.fromkeys(batch.prompt_index)}
        return [known[i] for i in batch.prompt_index]

    def _step_mean(self, x_BT: Tensor, mask: Tensor, batch: MicroBatch) -> Tensor:
        """This micro-batch's part of the mean over all counted tokens of the optimizer step, on all ranks."""
        return torch.where(mask, x_BT, 0.0).sum() / self._step_tokens(batch)

    # -- logs ----------------------------------------------------------------------------------------------------

    def _log_masked_mean(self, name: str, x_BT: Tensor, mask: Tensor) -> None:
        """The mean over the counted tokens of an optimizer step: of all its micro-batches, on all ranks."""
        self._log_sums(name, torch.where(mask, x_BT, 0.0).sum(), mask.sum())

    def _log_sums(self, name: str, total: Tensor, count: Tensor) -> None:
        """Σ total / Σ count over the micro-batches of an optimizer step and all ranks."""
        sums = torch.stack([total.detach(), count.to(total.dtype)])
        self._sums[name] = self._sums.get(name, 0.0) + sums
        if self.accelerator.sync_gradients:
            total, count = self.accelerator.reduce(self._sums.pop(name), reduction="sum").tolist()
            self._metrics[self._mode][name].append(total / max(count, 1.0))
