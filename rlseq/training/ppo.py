"""PPO on whole-sequence rewards: `GRPOTrainer` with a critic in place of the group (Schulman et al. 2017).

What differs from a step of GRPO:

    _set_advantages      rewards a token (the reward on the last, minus the KL penalty) -> GAE against the critic
    _forward             asks the critic too, in the one wrapped forward of a micro-batch
    _additional_loss     adds the value loss
    training_step        leaves out the rest of a round once the policy is too far from its rollouts

The policy's loss is TRL's on advantages (B, T), so its loss types, entropy bonus and clips work as in GRPO.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import disable_dropout_in_model

from rlseq.errors import RewardError
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
from rlseq.scoring import RewardSuite
from rlseq.training.config import PPOConfig
from rlseq.training.critic import FOLDER, NAME, attach, build_critic, critic_folder, is_critic, split_weights
from rlseq.training.grpo import GRPOTrainer
from rlseq.types import Prompt

KL_FILE = "kl_coefficient.json"


class PPOTrainer(GRPOTrainer):
    """PPO on `Prompt`s, `Rollout`s and a `RewardSuite`; arguments as `GRPOTrainer` takes them.

    The critic is the submodule `rlseq_critic` of the policy. It is saved to `checkpoint-N/critic/`, apart from the
    policy's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PPOConfig,
        prompts: list[Prompt],
        suite: RewardSuite,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        critic = build_critic(model, args.critic, args.critic_name_or_path, trunk_gradient=args.critic_trunk_gradient)
        if args.disable_dropout:
            disable_dropout_in_model(critic)
        self._asks_values = False
        self._approx_kl = torch.zeros(2)  # Σ and tokens of the optimizer step under way
        self._round_is_over = False  # target_kl was passed: the other updates on these rollouts are left out
        super().__init__(model, args, prompts, suite, tokenizer, **kwargs)
        if args.gradient_checkpointing and critic.backbone is not None:
            critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self._next_beta = self.beta  # of the next round, where it adapts
        attach(self._causal_model(), critic)
        self.add_callback(_CriticWarmup(self))

    def _causal_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def critic(self) -> torch.nn.Module:
        """The critic, inside the policy."""
        return getattr(self._causal_model(), NAME)

    # -- advantages ----------------------------------------------------------------------------------------------

    def _set_advantages(self, output: dict[str, Tensor]) -> None:
        super()._set_advantages(output)  # logs the reward
        metrics, args = self._metrics[self._mode], self.args
        if self.num_generations == 1:
            metrics.pop("frac_reward_zero_std", None)  # of a group of one it says nothing
        mask = self._mask(output)
        values, after, logprobs = self._ask_critic(output)
        totals = self._local(self._totals)
        mask = mask & ~totals.isnan()[:, None]  # abstained: no advantage, and nothing for the critic to learn
        rewards = self._token_rewards(totals, mask)
        bootstrap = None
        truncated = torch.tensor([s.rollout.finish_reason == "length" for s in self._scored], device=totals.device)
        if args.truncated_completions == "penalty":
            rewards = rewards - last_token_rewards(truncated * args.truncation_penalty, mask)
        elif args.truncated_completions == "bootstrap":
            rewards = torch.where(truncated[:, None], 0.0, rewards)  # it has earned none: it was not finished
            bootstrap = torch.where(truncated, after, 0.0)
        if args.kl_in_reward and self.beta:
            rewards = rewards - self.beta * self._kl_penalty(logprobs, output["ref_per_token_logps"], mask)
        advantages, returns = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam, bootstrap_B=bootstrap)
        everywhere = [self._gather_tokens(x) for x in (advantages, returns, values, mask)]
        all_advantages, all_returns, all_values, counted = (*everywhere[:3], everywhere[3].bool())
        spread = all_advantages[counted] if counted.any() else all_advantages.new_zeros(1)
        mean, std = spread.mean(), spread.std(correction=0)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, mean=mean, std=std)
        output |= {"advantages": advantages, "values": values, "returns": returns, "value_mask": mask}
        metrics["advantages/std"].append(std.item())
        metrics["returns/mean"].append(all_returns[counted].mean().item())
        metrics["returns/std"].append(all_returns[counted].std(correction=0).item())
        metrics["critic/explained_variance"].append(explained_variance(all_values, all_returns, counted).item())
        for part, error in enumerate(error_by_position(all_values, all_returns, counted).tolist(), start=1):
            metrics[f"critic/error_quarter_{part}"].append(error)

    def _ask_critic(self, output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, T) before each token, (B,) after the last, and log-probs (B, T), by the weights that sampled."""
        prompts = [self.prompts[row["index"]].prompt_ids for row in self._rows]
        completions = [one.rollout.completion_ids for one in self._scored]
        width = output["completion_ids"].shape[1]
        chunk = self.args.per_device_train_batch_size
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            parts = [
                self._forward(self.model, prompts[i : i + chunk], completions[i : i + chunk], width, values=True)
                for i in range(0, len(prompts), chunk)
            ]
        return (
            torch.cat([part.values for part in parts]),
            torch.cat([part.last_values for part in parts]),
            torch.cat([part.logprobs for part in parts]),
        )

    def _token_rewards(self, totals: Tensor, mask: Tensor) -> Tensor:
        """(B, T): a reward that gave one value a token stands where it gave it, the rest on the last token."""
        weights = dict(zip(self.suite.names, self.suite.weights, strict=True))
        dense = torch.zeros(mask.shape, device=totals.device)
        for row, one in enumerate(self._scored):
            for name, details in one.details.items():
                tokens = details.get("token_rewards")
                if tokens is None or one.values[name] is None:
                    continue
                if len(tokens) != len(one.rollout.completion_ids):
                    raise RewardError(
                        f"reward {name!r} gave {len(tokens)} token rewards for {len(one.rollout.completion_ids)} "
                        f"tokens on prompt {one.rollout.prompt_key!r}"
                    )
                dense[row, : len(tokens)] += weights[name] * torch.tensor(tokens, device=totals.device)
        dense = torch.where(mask, dense, 0.0)
        return dense + last_token_rewards(totals - dense.sum(1), mask)

    def _kl_penalty(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        """k1 a token, whose sum over a sequence is its log-ratio to the start; adapts its coefficient afterwards."""
        kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
        per_sequence = self.accelerator.gather(kl.sum(1)).mean().item()
        metrics = self._metrics[self._mode]
        self._log_masked_mean("kl", kl, mask)
        metrics["kl_penalty"].append(self.beta * per_sequence)
        metrics["kl_coefficient"].append(self.beta)
        if self.args.kl_target is not None and self.model.training:
            self._next_beta = adapt_kl_coefficient(self.beta, per_sequence, target=self.args.kl_target)
        return kl

    def _gather_tokens(self, x_BT: Tensor) -> Tensor:
        """The rows of all ranks, padded to the longest."""
        x = x_BT.to(torch.int8) if x_BT.dtype == torch.bool else x_BT
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    # -- update --------------------------------------------------------------------------------------------------

    def _forward(self, model, prompts, completions, width, **more):
        if self._asks_values:
            more["values"] = True
        return super()._forward(model, prompts, completions, width, **more)

    def _compute_loss(self, model, inputs):
        self._asks_values = True
        beta = self.beta
        if self.args.kl_in_reward:
            self.beta = 0.0  # the reward holds it already
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._asks_values = False
            self.beta = beta

    def _additional_loss(self, inputs: Mapping[str, Tensor]) -> Tensor | float:
        """The value loss, beside what GRPO adds; and how far the policy is from its rollouts."""
        args, mask = self.args, inputs["value_mask"]
        values, old = self._scores.values, inputs["values"]
        loss = value_loss(values, old, inputs["returns"], mask, clip=args.value_clip)
        self._log_masked_mean("critic/value_loss", loss, mask)
        if args.value_clip is not None:
            clipped = (values - old).abs() > args.value_clip
            self._log_masked_mean("critic/clip_fraction", clipped.to(loss.dtype), mask)
        old_logprobs = inputs.get("old_per_token_logps")
        if old_logprobs is not None:
            trained = self._mask(inputs)
            # k3 of KL(rollout policy ‖ policy), from the rollout policy's samples
            drift = torch.where(trained, kl_estimate(old_logprobs, self._scores.logprobs.detach(), "k3"), 0.0)
            self._log_masked_mean("approx_kl", drift, trained)
            self._approx_kl = self._approx_kl.to(drift) + torch.stack([drift.sum(), trained.sum()])
        return super()._additional_loss(inputs) + args.vf_coef * self._step_mean(loss, mask, inputs)

    def training_step(self, model, inputs, num_items_in_batch):
        self._begin_micro_batch()
        if not self._round_is_over:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step += 1  # no forward, no gradient: the optimizer finds nothing to do
        return torch.zeros((), device=self.accelerator.device)

    def _begin_micro_batch(self) -> None:
        """At the start of a round take the next β; between optimizer steps, see whether the round is over."""
        round_begins = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if round_begins:
            self._round_is_over = False
            self.beta = self._next_beta
        if self._step % self.current_gradient_accumulation_steps:
            return
        if self.args.target_kl is not None and not round_begins and not self._round_is_over:
            total, count = self.accelerator.reduce(self._approx_kl.to(self.accelerator.device)).tolist()
            self._round_is_over = total / max(count, 1.0) > self.args.target_kl
        if self.args.target_kl is not None:
            self._metrics["train"]["updates_left_out"].append(float(self._round_is_over))
        self._approx_kl = torch.zeros(2)

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

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.kl_target is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            state = {"beta": self.beta, "next_beta": self._next_beta}
            (folder / KL_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(Path(resume_from_checkpoint))
        if (Path(resume_from_checkpoint) / KL_FILE).is_file():
            state = json.loads((Path(resume_from_checkpoint) / KL_FILE).read_text(encoding="utf-8"))
            self.beta, self._next_beta = state["beta"], state["next_beta"]

    def _load_best_model(self):
        super()._load_best_model()
        self._load_critic(Path(self.state.best_model_checkpoint))

    def _load_critic(self, checkpoint: Path) -> None:
        folder = critic_folder(str(checkpoint))
        if folder is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self.critic.load(folder)

    def _issue_warnings_after_load(self, load_result):
        kept = [name for name in load_result.missing_keys if not is_critic(name)]  # it is loaded from its own folder
        super()._issue_warnings_after_load(type(load_result)(kept, load_result.unexpected_keys))


class _CriticWarmup(TrainerCallback):
    """Holds the policy still for the first steps: a parameter without a gradient is left alone by the optimizer."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step < args.critic_warmup_steps:
            for name, parameter in self.trainer.model.named_parameters():
                if not is_critic(name):
                    parameter.grad = None
