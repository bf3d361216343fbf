"""The policy-gradient objective: the losses that TRL names by `loss_type`, with its masks, bonus and series of the log.

The mathematics is `rlseq.losses`. Settings, coefficients and the state of the entropy controller are the attributes in
which TRL's trainer keeps them, so that it saves and restores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import nanmax, nanmin

from rlseq.losses import (
    CLIPPED,
    MEANS_OVER_STEP,
    cispo,
    clipped_surrogate,
    kl_estimate,
    masked_mean,
    on_policy_mask,
    probability_ratio,
    reduce_losses,
    sapo,
    vespo,
    vespo_weight,
)
from rlseq.training.rollouts import MicroBatch
from rlseq.training.trl.logging.metrics import TrainingMetrics
from rlseq.training.update.forward import Scores
from rlseq.training.update.own_functions import OwnPolicyLoss


def accumulation(trainer: Any) -> int:
    """The micro-batches that make up an optimizer step."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def step_tokens(trainer: Any, batch: MicroBatch) -> Tensor:
    """The counted tokens of the optimizer step, on all ranks, over the number of these."""
    tokens = batch.trained_tokens.clamp(min=1.0) / trainer.accelerator.num_processes  # of the whole batch
    if trainer.model.training:
        tokens = tokens * accumulation(trainer) / trainer.args.steps_per_generation
    return tokens


class PolicyGradient:
    """Turns the scores of a micro-batch and its advantages into the loss of `args.loss_type`.

    Args:
        trainer: TRL's, with the settings and the state of the entropy controller.
        metrics: what is logged goes there.
    """

    def __init__(self, trainer: Any, metrics: TrainingMetrics):
        self.trainer = trainer
        self.metrics = metrics
        self.own = None if trainer.args.policy_loss is None else OwnPolicyLoss(trainer.args.policy_loss)

    def loss(self, scores: Scores, batch: MicroBatch, *, kl_coef: float) -> Tensor:
        """The loss of a micro-batch, divided by those that make up an optimizer step.

        The KL to the start, times `kl_coef`, is part of each token's loss where no estimator is named: k3, times the
        ratio where `use_bias_correction_kl` says so.
        """
        trainer, args = self.trainer, self.trainer.args
        mask, old, logprobs = batch.mask, batch.old_logprobs, scores.logprobs
        old = logprobs.detach() if old is None else old  # on policy
        losses, series = self._token_losses(logprobs, old, batch)
        if trainer.off_policy_mask_threshold is not None:
            sampled = old if batch.sampled_logprobs is None else batch.sampled_logprobs
            threshold = trainer.off_policy_mask_threshold
            keep = on_policy_mask(logprobs, sampled, batch.advantages, mask, threshold=threshold)
            losses = torch.where(keep, losses, 0.0)
        teaches = mask
        if trainer.top_entropy_quantile < 1.0:
            teaches = mask & (scores.entropies >= self._entropy_threshold(scores.entropies[mask]))
            losses = torch.where(teaches, losses, 0.0)
        if batch.importance_ratio is not None and trainer.loss_type != "vespo":  # whose weight holds it
            losses = losses * batch.importance_ratio
        if kl_coef and args.kl_estimator is None:
            series["kl"] = kl_estimate(logprobs, batch.ref_logprobs, kind="k3")
            if args.use_bias_correction_kl:
                series["kl"] = series["kl"] * probability_ratio(logprobs, old, mask, trainer.importance_sampling_level)
            losses = losses + kl_coef * series["kl"]
        loss = reduce_losses(
            losses,
            mask,
            trainer.loss_type,
            max_completion_length=trainer.max_completion_length,
            step_tokens=step_tokens(trainer, batch),
        )
        if trainer._entropy_bonus_enabled:
            self.metrics.mean("policy_loss", loss)
        if trainer.loss_type not in MEANS_OVER_STEP:
            loss = loss / accumulation(trainer)
        if trainer._entropy_bonus_enabled:
            loss = loss - self._entropy_bonus(scores.entropies, teaches)
        self._log_series(series | {"entropy": scores.entropies}, mask)
        return loss

    def _token_losses(self, logprobs: Tensor, old: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token, (B, T), and what the log says of the ratios, (B, T) or (B, 1)."""
        trainer, args, mask, advantages = self.trainer, self.trainer.args, batch.mask, batch.advantages
        common, level = (logprobs, old, advantages, mask), trainer.importance_sampling_level
        if self.own is not None:
            return self.own.of(*common), {}
        if trainer.loss_type == "sapo":
            temperatures = {name: getattr(args, f"sapo_{name}") for name in ("temperature_pos", "temperature_neg")}
            return sapo(*common, **temperatures, level=level), {}
        if trainer.loss_type == "vespo":
            shape = {name: getattr(args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
            weight = vespo_weight(*common, **shape, importance_BT=batch.importance_ratio)
            return vespo(logprobs, advantages, mask, weight=weight), {"vespo/phi_seq_mean": weight}
        ratio = probability_ratio(logprobs.detach(), old, mask, level)
        sign = advantages if advantages.ndim == 2 else advantages[:, None]
        if trainer.loss_type == "cispo":
            clipped = (ratio > trainer.epsilon_high) & (sign > 0)
            return cispo(*common, largest=trainer.epsilon_high, level=level), {"cispo_clip_ratio": clipped}
        if args.delta is not None:
            ratio = ratio.clamp(max=args.delta)
        low, high = (ratio < 1 - trainer.epsilon_low) & (sign < 0), (ratio > 1 + trainer.epsilon_high) & (sign > 0)
        clips = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "largest": args.delta}
        series = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
        return clipped_surrogate(*common, **clips, level=level), series

    def _entropy_threshold(self, entropies: Tensor) -> Tensor:
        """The entropy that the tokens which teach have at least, from those of all ranks' counted tokens, (N,)."""
        accelerator = self.trainer.accelerator
        padded = accelerator.pad_across_processes(entropies.detach().float(), dim=0, pad_index=torch.nan)
        everywhere = accelerator.gather(padded)
        everywhere = everywhere[~everywhere.isnan()]
        if not len(everywhere):
            return entropies.new_tensor(torch.inf)
        return torch.quantile(everywhere, 1 - self.trainer.top_entropy_quantile)

    def _entropy_bonus(self, entropies: Tensor, teaches: Tensor) -> Tensor:
        """The coefficient times the mean entropy of the tokens that teach; adapts the coefficient afterwards.

        The coefficient is one number for all micro-batches of an optimizer step, and adapts to their entropy.
        """
        trainer, args = self.trainer, self.trainer.args
        rests = trainer.use_adaptive_entropy and trainer._last_world_entropy > args.entropy_target
        bonus = (0.0 if rests else trainer.entropy_coef) * masked_mean(entropies, teaches) / accumulation(trainer)
        if not trainer.model.training:
            return bonus
        if trainer.use_adaptive_entropy:
            sums = torch.stack([torch.where(teaches, entropies, 0.0).sum(), teaches.sum()]).detach()
            kept = trainer._entropy_window_stats
            trainer._entropy_window_stats = sums if kept is None else kept + sums
            if trainer.accelerator.sync_gradients:
                total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
                trainer._entropy_window_stats = None
                trainer._last_world_entropy = (total / count.clamp(min=1.0)).item()
                if trainer._last_world_entropy <= args.entropy_target:
                    trainer.entropy_coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
                else:
                    trainer.entropy_coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        if trainer.accelerator.sync_gradients:
            self.metrics.series["entropy_coef"].append(trainer.entropy_coef)
        return bonus

    def _log_series(self, series: Mapping[str, Tensor], mask: Tensor) -> None:
        """Log the means over this micro-batch of all ranks: of counted tokens, (B, T), or of sequences, (B, 1)."""
        metrics, accelerator = self.metrics.series, self.trainer.accelerator
        dtype, sums = series["entropy"].dtype, []
        for x in series.values():
            counted = mask if x.shape == mask.shape else torch.ones_like(x, dtype=torch.bool)
            counted = counted & ~x.isnan()  # entropies of rows that were left out
            sums += [torch.where(counted, x.detach().to(dtype), 0.0).sum(), counted.sum().to(dtype)]
        totals, counts = accelerator.reduce(torch.stack(sums).view(-1, 2), reduction="sum").unbind(1)
        for name, mean in zip(series, (totals / counts.clamp(min=1.0)).tolist(), strict=True):
            metrics[name].append(mean)
        if self.trainer.loss_type not in CLIPPED or self.own is not None:
            return
        shares = [_share_by_sequence(series[f"clip_ratio/{side}_mean"], mask) for side in ("low", "high")]
        low, high = accelerator.gather(torch.stack(shares, dim=1)).unbind(1)
        metrics["clip_ratio/low_min"].append(nanmin(low).item())
        metrics["clip_ratio/high_max"].append(nanmax(high).item())


def _share_by_sequence(flags: Tensor, mask: Tensor) -> Tensor:
    """Of each row's counted tokens, the share that is flagged, (B,); NaN where none is counted."""
    if flags.shape != mask.shape:
        return flags.float().squeeze(1)
    return (flags & mask).sum(1) / mask.sum(1)
