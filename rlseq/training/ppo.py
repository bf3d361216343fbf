"""PPO on whole-sequence rewards: `GRPOTrainer` with a critic in place of the group (Schulman et al. 2017).

What differs from a step of GRPO:

    CriticAdvantages     rewards a token (the reward on the last, minus the KL penalty) -> GAE against the critic, in
                         rlseq/training/update/critic_advantages.py
    CriticLoss           the one wrapped forward of a micro-batch asks the critic, too; the value loss is added
    training_step        holds the policy still while the critic warms up, and leaves out the rest of a batch once
                         the policy is too far from its rollouts

The policy's loss is TRL's on advantages (B, T), so its loss types, entropy bonus and clips work as in GRPO.
"""

from __future__ import annotations

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
from rlseq.losses import adapt_kl_coefficient, kl_estimate, value_loss
from rlseq.training.critic import FOLDER, NAME, attach, build_critic, critic_folder, is_critic, split_weights
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import disable_dropout
from rlseq.training.trl.loss.micro_batch import MicroBatchLoss
from rlseq.training.update.critic_advantages import CriticAdvantages


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


class CriticLoss(MicroBatchLoss):
    """The loss of PPO: GRPO's and the value loss; `target_kl` hears how far the policy is from its rollouts."""

    asks_values = True

    @property
    def kl_coef(self) -> float:
        """0 where the reward holds the KL already."""
        return 0.0 if self.trainer.args.kl_in_reward else self.trainer.beta

    def additional_loss(self, scores, batch, references) -> Tensor | float:
        """The value loss, beside what GRPO adds; and how far the policy is from its rollouts."""
        args, metrics, mask = self.trainer.args, self.metrics, batch.value_mask
        values, old = scores.values, batch.values
        loss = value_loss(values, old, batch.returns, mask, clip=args.value_clip)
        metrics.masked_step_mean("critic/value_loss", loss, mask)
        if args.value_clip is not None:
            clipped = (values - old).abs() > args.value_clip
            metrics.masked_step_mean("critic/clip_fraction", clipped.to(loss.dtype), mask)
        if batch.old_logprobs is not None:
            trained = batch.mask
            # k3 of KL(rollout policy ‖ policy), from the rollout policy's samples
            drift = torch.where(trained, kl_estimate(batch.old_logprobs, scores.logprobs.detach(), "k3"), 0.0)
            metrics.masked_step_mean("approx_kl", drift, trained)
            self.trainer.target_kl.add(drift.sum(), trained.sum())
        return super().additional_loss(scores, batch, references) + args.vf_coef * self.step_mean(loss, mask, batch)


class PPOTrainer(GRPOTrainer):
    """PPO; arguments as `GRPOTrainer` takes them, with an `rlseq.PPOConfig` as `args`.

    The critic is the submodule `rlseq_critic` of the policy. It is saved to `checkpoint-N/critic/`, apart from the
    policy's weights.
    """

    settings = PPOConfig
    advantage_class = CriticAdvantages
    loss_class = CriticLoss

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
        if self.forward.packs:
            self.forward.pack_if(critic.supports_packing(self.forward.longest), ", because of the critic")

    def _causal_model(self) -> PreTrainedModel:
        return base_of(self.accelerator.unwrap_model(self.model))

    @property
    def critic(self) -> torch.nn.Module:
        """The critic, inside the policy."""
        return getattr(self._causal_model(), NAME)

    # -- update --------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch):
        if self.starts_batch:
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
