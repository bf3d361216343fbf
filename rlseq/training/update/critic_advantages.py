"""Advantages of tokens against a critic: rewards a token, minus the KL penalty, through GAE."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlseq.losses import error_by_position, explained_variance, gae, kl_estimate, last_token_rewards, whiten
from rlseq.scoring.outcome import TOKEN_REWARDS
from rlseq.training.rollouts import MicroBatch, RolloutBatch
from rlseq.types import ScoredRollout


class CriticAdvantages:
    """Asks the critic before each token, and compares what follows with what it said.

    Args:
        trainer: PPO's, with the critic, the rewards and the coefficient of the KL.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def of(self, batch: RolloutBatch, values: Tensor) -> dict[str, Tensor]:
        """One per token, with the critic's values and the returns that it learns from.

        Arguments are as `rlseq.training.trl.batch.batches.Advantages` says.
        """
        trainer, args, trained = self.trainer, self.trainer.args, batch.trained
        if trainer.model.training and trainer.critic.is_new and not batch.totals.isnan().all():
            trainer.critic.begin_at(batch.totals.nanmean().item())
        state_values, after, logprobs = self.ask_critic(trained)
        totals = batch.local(batch.totals)
        mask = trained.mask & ~totals.isnan()[:, None]  # abstained: nothing for the critic to learn
        truncated = torch.tensor([s.rollout.finish_reason == "length" for s in batch.scored], device=totals.device)
        per_token, at_end = self._token_rewards(batch, totals, mask)
        bootstrap = None
        if args.truncated_completions == "penalty":
            at_end = at_end - truncated * args.truncation_penalty
        elif args.truncated_completions == "bootstrap":
            at_end = torch.where(truncated, 0.0, at_end)  # it was not finished: what would follow stands for this
            bootstrap = torch.where(truncated, after, 0.0)
        rewards = per_token + last_token_rewards(at_end, mask)
        if args.kl_in_reward and trainer.beta:
            kl = self._kl_penalty(logprobs, trained.ref_logprobs, trained.mask)
            rewards = rewards - trainer.beta * kl
        advantages, returns = gae(rewards, state_values, mask, gamma=args.gamma, lam=args.lam, bootstrap_B=bootstrap)
        everywhere = (self._gather_tokens(x) for x in (advantages, returns, state_values, mask))
        all_advantages, all_returns, all_values, counted = everywhere
        if counted.any():
            spread = all_advantages[counted]
            mean, std = spread.mean(), spread.std(correction=0)
            if args.whiten_advantages:
                advantages = whiten(advantages, mask, mean=mean, std=std)
            trainer.metrics.series["advantages/std"].append(std.item())
            self._log_critic(all_values, all_returns, counted)
        return {"advantages": advantages, "values": state_values, "returns": returns, "value_mask": mask}

    def _log_critic(self, values: Tensor, returns: Tensor, counted: Tensor) -> None:
        """How well the critic knew the returns of the batch, on all ranks, before it learns from them."""
        metrics = self.trainer.metrics.series
        metrics["returns/mean"].append(returns[counted].mean().item())
        metrics["returns/std"].append(returns[counted].std(correction=0).item())
        metrics["critic/explained_variance"].append(explained_variance(values, returns, counted).item())
        for part, error in enumerate(error_by_position(values, returns, counted).tolist(), start=1):
            metrics[f"critic/error_quarter_{part}"].append(error)

    def ask_critic(self, trained: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, T) before each token, (B,) after the last, and log-probs (B, T), by the weights that sampled."""
        parts = self.trainer.forward.scores_in_parts(self.trainer.model, trained, values=True)
        return (
            torch.cat([part.values for part in parts]),
            torch.cat([part.last_values for part in parts]),
            torch.cat([part.logprobs for part in parts]),
        )

    def _token_rewards(self, batch: RolloutBatch, totals: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) what rewards gave token by token, where they gave it, and (B,) the rest of the totals, for the end."""
        per_token = torch.zeros(mask.shape, device=totals.device)
        for row, one in enumerate(batch.scored):
            if one.total is not None and one.rollout.completion_ids:
                values = self.trainer.suite.token_rewards(_token_part(one))
                per_token[row, : len(values)] = torch.tensor(values, device=totals.device)
        per_token = torch.where(mask, per_token, 0.0)
        return per_token, totals - per_token.sum(1)

    def _kl_penalty(self, logprobs: Tensor, ref_logprobs: Tensor, trained: Tensor) -> Tensor:
        """k1 a token, whose sum over a sequence is its log-ratio to the start; adapts its coefficient afterwards."""
        trainer, metrics = self.trainer, self.trainer.metrics.series
        kl = torch.where(trained, kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
        sums = torch.stack([kl.sum(), trained.sum().to(kl), kl.new_tensor(len(kl))])
        total, tokens, sequences = trainer.accelerator.reduce(sums).tolist()
        metrics["kl"].append(total / max(tokens, 1.0))
        metrics["kl_penalty"].append(trainer.beta * total / sequences)
        metrics["kl_coefficient"].append(trainer.beta)
        trainer.kl_coefficient.adapt(total / sequences)
        return kl

    def _gather_tokens(self, x_BT: Tensor) -> Tensor:
        """The rows of all ranks, padded to the longest."""
        x = x_BT.to(torch.int8) if x_BT.dtype == torch.bool else x_BT  # padding is no boolean operation
        accelerator = self.trainer.accelerator
        return accelerator.gather(accelerator.pad_across_processes(x, dim=1)).to(x_BT.dtype)


def _token_part(one: ScoredRollout) -> ScoredRollout:
    """A scored rollout in which only the rewards that gave one value a token count."""
    values = {
        name: value if value is None or TOKEN_REWARDS in one.details.get(name, {}) else 0.0
        for name, value in one.values.items()
    }
    return dataclasses.replace(one, values=values)
