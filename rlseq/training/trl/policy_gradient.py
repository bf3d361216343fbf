"""The policy-gradient objective: the losses that TRL names by `loss_type`, with its masks, bonus and series of the log.

The mathematics is `rlseq.losses`. Settings, coefficients and the state of the entropy controller are the attributes in
which TRL keeps them, so that it saves and restores them.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from rlseq.training.forward import Scores
from rlseq.training.rollouts import MicroBatch
from rlseq.training.trl.batches import BatchMixin


class PolicyGradientMixin(BatchMixin):
    """Turns the scores of a micro-batch and its advantages into the loss of `args.loss_type`."""

    @property
    def kl_loss_coef(self) -> float:
        """What multiplies the KL to the start in the loss."""
        return self.beta

    def rows_that_teach(self, batch: MicroBatch) -> list[int] | None:
        """The rows of which the loss or its gradient needs a forward; None: all.

        A row without an advantage has none where the policy gradient is the whole loss, so that the update of a batch
        whose groups earned the same is cheap. One row stays, for a backward on this process as on the others.
        """
        more = (self.kl_loss_coef, self._entropy_bonus_enabled, self.aux_loss_enabled, self.asks_values)
        if self.args.objective != "policy_gradient" or self.args.uses_references or any(more):
            return None
        if self.top_entropy_quantile < 1.0 or not self.model.training:
            return None
        teaches = batch.advantages != 0
        teaches = teaches if teaches.ndim == 1 else teaches.any(1)
        return torch.nonzero(teaches).flatten().tolist() or [0]

    def policy_gradient(self, scores: Scores, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, divided by those that make up an optimizer step.

        The KL to the start is part of each token's loss where no estimator is named: k3, times the ratio where
        `use_bias_correction_kl` says so.
        """
        mask, old, logprobs = batch.mask, batch.old_logprobs, scores.logprobs
        old = logprobs.detach() if old is None else old  # on policy
        losses, series = self._token_losses(logprobs, old, batch)
        if self.off_policy_mask_threshold is not None:
            sampled = old if batch.sampled_logprobs is None else batch.sampled_logprobs
            threshold = self.off_policy_mask_threshold
            keep = on_policy_mask(logprobs, sampled, batch.advantages, mask, threshold=threshold)
            losses = torch.where(keep, losses, 0.0)
        teaches = mask
        if self.top_entropy_quantile < 1.0:
            teaches = mask & (scores.entropies >= self._entropy_threshold(scores.entropies[mask]))
            losses = torch.where(teaches, losses, 0.0)
        if batch.importance_ratio is not None and self.loss_type != "vespo":  # whose weight holds it
            losses = losses * batch.importance_ratio
        if self.kl_loss_coef and self.args.kl_estimator is None:
            series["kl"] = kl_estimate(logprobs, batch.ref_logprobs, kind="k3")
            if self.args.use_bias_correction_kl:
                series["kl"] = series["kl"] * probability_ratio(logprobs, old, mask, self.importance_sampling_level)
            losses = losses + self.kl_loss_coef * series["kl"]
        loss = reduce_losses(
            losses,
            mask,
            self.loss_type,
            max_completion_length=self.max_completion_length,
            step_tokens=self._step_tokens(batch),
        )
        if self._entropy_bonus_enabled:
            self._log_mean("policy_loss", loss)
        if self.loss_type not in MEANS_OVER_STEP:
            loss = loss / self._accumulation
        if self._entropy_bonus_enabled:
            loss = loss - self._entropy_bonus(scores.entropies, teaches)
        self._log_series(series | {"entropy": scores.entropies}, mask)
        return loss

    def _token_losses(self, logprobs: Tensor, old: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token, (B, T), and what the log says of the ratios, (B, T) or (B, 1)."""
        args, mask, advantages = self.args, batch.mask, batch.advantages
        common, level = (logprobs, old, advantages, mask), self.importance_sampling_level
        if self.loss_type == "sapo":
            temperatures = {name: getattr(args, f"sapo_{name}") for name in ("temperature_pos", "temperature_neg")}
            return sapo(*common, **temperatures, level=level), {}
        if self.loss_type == "vespo":
            shape = {name: getattr(args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
            weight = vespo_weight(*common, **shape, importance_BT=batch.importance_ratio)
            return vespo(logprobs, advantages, mask, weight=weight), {"vespo/phi_seq_mean": weight}
        ratio = probability_ratio(logprobs.detach(), old, mask, level)
        sign = advantages if advantages.ndim == 2 else advantages[:, None]
        if self.loss_type == "cispo":
            clipped = (ratio > self.epsilon_high) & (sign > 0)
            return cispo(*common, largest=self.epsilon_high, level=level), {"cispo_clip_ratio": clipped}
        if args.delta is not None:
            ratio = ratio.clamp(max=args.delta)
        low, high = (ratio < 1 - self.epsilon_low) & (sign < 0), (ratio > 1 + self.epsilon_high) & (sign > 0)
        clips = {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high, "largest": args.delta}
        series = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
        return clipped_surrogate(*common, **clips, level=level), series

    def _entropy_threshold(self, entropies: Tensor) -> Tensor:
        """The entropy that the tokens which teach have at least, from those of all ranks' counted tokens, (N,)."""
        padded = self.accelerator.pad_across_processes(entropies.detach().float(), dim=0, pad_index=torch.nan)
        everywhere = self.accelerator.gather(padded)
        everywhere = everywhere[~everywhere.isnan()]
        if not len(everywhere):
            return entropies.new_tensor(torch.inf)
        return torch.quantile(everywhere, 1 - self.top_entropy_quantile)

    def _entropy_bonus(self, entropies: Tensor, teaches: Tensor) -> Tensor:
        """The coefficient times the mean entropy of the tokens that teach; adapts the coefficient afterwards.

        The coefficient is one number for all micro-batches of an optimizer step, and adapts to their entropy.
        """
        args = self.args
        rests = self.use_adaptive_entropy and self._last_world_entropy > args.entropy_target
        bonus = (0.0 if rests else self.entropy_coef) * masked_mean(entropies, teaches) / self._accumulation
        if not self.model.training:
            return bonus
        if self.use_adaptive_entropy:
            sums = torch.stack([torch.where(teaches, entropies, 0.0).sum(), teaches.sum()]).detach()
            kept = self._entropy_window_stats
            self._entropy_window_stats = sums if kept is None else kept + sums
            if self.accelerator.sync_gradients:
                total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
                self._entropy_window_stats = None
                self._last_world_entropy = (total / count.clamp(min=1.0)).item()
                if self._last_world_entropy <= args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        return bonus

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _step_tokens(self, batch: MicroBatch) -> Tensor:
        """The counted tokens of the optimizer step, on all ranks, over the number of these."""
        tokens = batch.trained_tokens.clamp(min=1.0) / self.accelerator.num_processes  # of the whole batch
        if self.model.training:
            tokens = tokens * self._accumulation / self.args.steps_per_generation
        return tokens

    # -- logs ----------------------------------------------------------------------------------------------------

    def _log_mean(self, name: str, value: Tensor) -> None:
        self._metrics[self._mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    def _log_series(self, series: Mapping[str, Tensor], mask: Tensor) -> None:
        """Log the means over this micro-batch of all ranks: of counted tokens, (B, T), or of sequences, (B, 1)."""
        metrics, dtype, sums = self._metrics[self._mode], series["entropy"].dtype, []
        for x in series.values():
            counted = mask if x.shape == mask.shape else torch.ones_like(x, dtype=torch.bool)
            counted = counted & ~x.isnan()  # entropies of rows that were left out
            sums += [torch.where(counted, x.detach().to(dtype), 0.0).sum(), counted.sum().to(dtype)]
        totals, counts = self.accelerator.reduce(torch.stack(sums).view(-1, 2), reduction="sum").unbind(1)
        for name, mean in zip(series, (totals / counts.clamp(min=1.0)).tolist(), strict=True):
            metrics[name].append(mean)
        if self.loss_type not in CLIPPED:
            return
        shares = [self._share_by_sequence(series[f"clip_ratio/{side}_mean"], mask) for side in ("low", "high")]
        low, high = self.accelerator.gather(torch.stack(shares, dim=1)).unbind(1)
        metrics["clip_ratio/low_min"].append(nanmin(low).item())
        metrics["clip_ratio/high_max"].append(nanmax(high).item())

    @staticmethod
    def _share_by_sequence(flags: Tensor, mask: Tensor) -> Tensor:
        """Of each row's counted tokens, the share that is flagged, (B,); NaN where none is counted."""
        if flags.shape != mask.shape:
            return flags.float().squeeze(1)
        return (flags & mask).sum(1) / mask.sum(1)
