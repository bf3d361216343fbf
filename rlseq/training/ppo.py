"""PPO on whole-sequence rewards: `GRPOTrainer` with a critic in place of the group (Schulman et al. 2017).

What differs from a step of GRPO:

    advantages_of        rewards a token (the reward on the last, minus the KL penalty) -> GAE against the critic
    asks_values          the one wrapped forward of a micro-batch asks the critic, too
    additional_loss      adds the value loss
    training_step        holds the policy still while the critic warms up, and leaves out the rest of a batch once
                         the policy is too far from its rollouts

The policy's loss is TRL's on advantages (B, T), so its loss types, entropy bonus and clips work as in GRPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlseq.config.training import PPOConfig
from rlseq.engine.model.info import base_of
from rlseq.errors import ConfigError, ModelError
from rlseq.losses import (
    adapt_kl_coefficient,
    error_by_position,
    explained_variance,
    gae,
    kl_estimate,
    last_token_rewards,
    value_loss,
    whiten,
)
from rlseq.scoring.outcome import TOKEN_REWARDS
from rlseq.training.critic import FOLDER, NAME, attach, build_critic, critic_folder, is_critic, split_weights
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import disable_dropout
from rlseq.training.rollouts import MicroBatch, RolloutBatch
from rlseq.types import ScoredRollout


class KLCoefficient:
    """The coefficient of the KL to the start, which may adapt from batch to batch.

    Attributes:
        value, of_next: of the batch under way, and of the next one.
    """

    def __init__(self, value: float, *, target: float | None):
        self.value = self.of_next = value
        self.target = target

    def begin_batch(self) -> None:
        self.value = self.of_next

    def adapt(self, kl: float) -> None:
        """Choose the next batch's by the KL of this one's sequences, where there is a target."""
        if self.target is not None:
            self.of_next = adapt_kl_coefficient(self.value, kl, target=self.target)

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.value, "next_beta": self.of_next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.of_next = state["beta"], state["next_beta"]


class TargetKL:
    """Whether the policy has moved so far from the rollouts of a batch that the other updates on it are left out.

    Attributes:
        is_passed: the mean KL of an optimizer step of this batch was above the limit.
    """

    def __init__(self, limit: float | None):
        self.limit = limit
        self.is_passed = False
        self.sums = torch.zeros(2)  # Σ KL and tokens, of the optimizer step under way

    def begin_batch(self) -> None:
        self.is_passed = False

    def add(self, kl: Tensor, tokens: Tensor) -> None:
        """Count a micro-batch: the sum of its tokens' KL, and how many they are."""
        self.sums = self.sums.to(kl) + torch.stack([kl, tokens])

    def end_step(self, accelerator: Accelerator) -> None:
        """Compare the mean over the step's micro-batches on all processes with the limit."""
        total, tokens = accelerator.reduce(self.sums.to(accelerator.device)).tolist()
        self.sums = torch.zeros(2)
        self.is_passed = self.is_passed or total / max(tokens, 1.0) > self.limit

    def state_dict(self) -> dict[str, bool]:
        return {"batch_is_over": self.is_passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.is_passed = state["batch_is_over"]


class PPOTrainer(GRPOTrainer):
    """PPO; arguments as `GRPOTrainer` takes them, with an `rlseq.PPOConfig` as `args`.

    The critic is the submodule `rlseq_critic` of the policy. It is saved to `checkpoint-N/critic/`, apart from the
    policy's weights.
    """

    settings = PPOConfig
    asks_values = True

    def _build_critic(self, model: PreTrainedModel, args: PPOConfig) -> torch.nn.Module:
        critic = build_critic(model, args.critic, args.critic_name_or_path, trunk_gradient=args.critic_trunk_gradient)
        if args.disable_dropout:
            disable_dropout(critic)
        return critic

    def _add_critic(self, critic: torch.nn.Module) -> None:
        args = self.args
        if args.gradient_checkpointing and critic.backbone is not None:
            critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if self.is_deepspeed_enabled and (args.critic_warmup_steps or args.target_kl is not None):
            raise ConfigError(
                "critic_warmup_steps and target_kl hold parameters still by dropping their gradients, which "
                "DeepSpeed's step does not see. Leave them out, or use another accelerate config."
            )
        self.kl_coefficient = KLCoefficient(self.beta, target=args.kl_target)
        self.target_kl = TargetKL(args.target_kl)
        self.resume_state.shared.append(self.kl_coefficient)
        self.resume_state.parts.append(self.target_kl)
        attach(self.accelerator.unwrap_model(self.model), critic)
        if self.packs:
            self.packs, reason = critic.supports_packing(self._longest())
            if not self.packs and self.accelerator.is_main_process:
                print(f"rlseq: updates are not packed, because of the critic: {reason}", flush=True)

    def _causal_model(self) -> PreTrainedModel:
        return base_of(self.accelerator.unwrap_model(self.model))

    @property
    def critic(self) -> torch.nn.Module:
        """The critic, inside the policy."""
        return getattr(self._causal_model(), NAME)

    # -- advantages ----------------------------------------------------------------------------------------------

    def advantages_of(self, batch: RolloutBatch, values: Tensor) -> dict[str, Tensor]:
        """Per token, against the critic; with its values and the returns that it learns from."""
        metrics, args, trained = self._metrics[self._mode], self.args, batch.trained
        if self.model.training and self.critic.is_new and not batch.totals.isnan().all():
            self.critic.begin_at(batch.totals.nanmean().item())
        state_values, after, logprobs = self._ask_critic(trained)
        totals = self._local(batch, batch.totals)
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
        if args.kl_in_reward and self.beta:
            kl = self._kl_penalty(logprobs, trained.ref_logprobs, trained.mask)
            rewards = rewards - self.beta * kl
        advantages, returns = gae(rewards, state_values, mask, gamma=args.gamma, lam=args.lam, bootstrap_B=bootstrap)
        everywhere = (self._gather_tokens(x) for x in (advantages, returns, state_values, mask))
        all_advantages, all_returns, all_values, counted = everywhere
        if counted.any():
            spread = all_advantages[counted]
            mean, std = spread.mean(), spread.std(correction=0)
            if args.whiten_advantages:
                advantages = whiten(advantages, mask, mean=mean, std=std)
            metrics["advantages/std"].append(std.item())
            self._log_critic(all_values, all_returns, counted)
        return {"advantages": advantages, "values": state_values, "returns": returns, "value_mask": mask}

    def _log_critic(self, values: Tensor, returns: Tensor, counted: Tensor) -> None:
        """How well the critic knew the returns of the batch, on all ranks, before it learns from them."""
        metrics = self._metrics[self._mode]
        metrics["returns/mean"].append(returns[counted].mean().item())
        metrics["returns/std"].append(returns[counted].std(correction=0).item())
        metrics["critic/explained_variance"].append(explained_variance(values, returns, counted).item())
        for part, error in enumerate(error_by_position(values, returns, counted).tolist(), start=1):
            metrics[f"critic/error_quarter_{part}"].append(error)

    def _ask_critic(self, trained: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, T) before each token, (B,) after the last, and log-probs (B, T), by the weights that sampled."""
        parts = self.scores_in_parts(self.model, trained, values=True)
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
                values = self.suite.token_rewards(_token_part(one))
                per_token[row, : len(values)] = torch.tensor(values, device=totals.device)
        per_token = torch.where(mask, per_token, 0.0)
        return per_token, totals - per_token.sum(1)

    def _kl_penalty(self, logprobs: Tensor, ref_logprobs: Tensor, trained: Tensor) -> Tensor:
        """k1 a token, whose sum over a sequence is its log-ratio to the start; adapts its coefficient afterwards."""
        kl = torch.where(trained, kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
        sums = torch.stack([kl.sum(), trained.sum().to(kl), kl.new_tensor(len(kl))])
        total, tokens, sequences = self.accelerator.reduce(sums).tolist()
        metrics = self._metrics[self._mode]
        metrics["kl"].append(total / max(tokens, 1.0))
        metrics["kl_penalty"].append(self.beta * total / sequences)
        metrics["kl_coefficient"].append(self.beta)
        self.kl_coefficient.adapt(total / sequences)
        return kl

    def _gather_tokens(self, x_BT: Tensor) -> Tensor:
        """The rows of all ranks, padded to the longest."""
        x = x_BT.to(torch.int8) if x_BT.dtype == torch.bool else x_BT  # padding is no boolean operation
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1)).to(x_BT.dtype)

    # -- update --------------------------------------------------------------------------------------------------

    @property
    def kl_loss_coef(self) -> float:
        """0 where the reward holds the KL already."""
        return 0.0 if self.args.kl_in_reward else self.beta

    def additional_loss(self, scores, batch, references) -> Tensor | float:
        """The value loss, beside what GRPO adds; and how far the policy is from its rollouts."""
        args, mask = self.args, batch.value_mask
        values, old = scores.values, batch.values
        loss = value_loss(values, old, batch.returns, mask, clip=args.value_clip)
        self._log_masked_mean("critic/value_loss", loss, mask)
        if args.value_clip is not None:
            clipped = (values - old).abs() > args.value_clip
            self._log_masked_mean("critic/clip_fraction", clipped.to(loss.dtype), mask)
        if batch.old_logprobs is not None:
            trained = batch.mask
            # k3 of KL(rollout policy ‖ policy), from the rollout policy's samples
            drift = torch.where(trained, kl_estimate(batch.old_logprobs, scores.logprobs.detach(), "k3"), 0.0)
            self._log_masked_mean("approx_kl", drift, trained)
            self.target_kl.add(drift.sum(), trained.sum())
        return super().additional_loss(scores, batch, references) + args.vf_coef * self._step_mean(loss, mask, batch)

    def training_step(self, model, inputs, num_items_in_batch):
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self.kl_coefficient.begin_batch()
            self.target_kl.begin_batch()
        self.beta = self.kl_coefficient.value
        if self.target_kl.is_passed:
            self._step += 1  # no forward, no gradient: the optimizer finds nothing to do
            loss = torch.zeros((), device=self.accelerator.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._choose_what_moves()
        return loss

    def _choose_what_moves(self) -> None:
        """Before the optimizer steps: what has no gradient is left alone by it, and by the clip of the norm."""
        if self.args.target_kl is not None:
            self.target_kl.end_step(self.accelerator)
            self._metrics["train"]["updates_left_out"].append(float(self.target_kl.is_passed))
        for name, parameter in self.model.named_parameters():
            warming_up = self.state.global_step < self.args.critic_warmup_steps and not is_critic(name)
            if self.target_kl.is_passed or warming_up:
                parameter.grad = None

    # -- optimizer, checkpoints ----------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if rate is None or any(group.get("is_critic") for group in optimizer.param_groups):
            return optimizer
        of_critic = {id(p) for name, p in (model or self.model).named_parameters() if is_critic(name)}
        for group in list(optimizer.param_groups):
            critics = [p for p in group["params"] if id(p) in of_critic]
            if critics:
                group["params"] = [p for p in group["params"] if id(p) not in of_critic]
                optimizer.add_param_group({**group, "params": critics, "lr": rate, "is_critic": True})
        return optimizer

    def _save(self, output_dir=None, state_dict=None):
        weights = self.model.state_dict() if state_dict is None else state_dict
        policy, critic = split_weights(weights)
        super()._save(output_dir, policy)
        if self.args.should_save:
            self.critic.save(Path(output_dir or self.args.output_dir) / FOLDER, critic)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        self._load_critic(Path(self.state.best_model_checkpoint))

    def _load_critic(self, checkpoint: Path) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # it is part of the one sharded state
        folder = critic_folder(str(checkpoint))
        if folder is None:
            raise ModelError(f"{checkpoint} holds no critic ({FOLDER}/); PPO resumes from checkpoints of PPO")
        self.critic.load(folder)


def _token_part(one: ScoredRollout) -> ScoredRollout:
    """A scored rollout in which only the rewards that gave one value a token count."""
    values = {
        name: value if value is None or TOKEN_REWARDS in one.details.get(name, {}) else 0.0
        for name, value in one.values.items()
    }
    return dataclasses.replace(one, values=values)
