"""A model's log-probs of the rows of a batch, as updates, old log-probs and the reference need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from rlseq.engine.model.info import attention_of
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.training.rollouts import MicroBatch
from rlseq.training.update.forward import Ids, Scores, forward


class PackedForward:
    """Scores micro-batches by one forward each, packed where the model can be given packed rows.

    Args:
        trainer: TRL's, with the policy.
        longest: tokens of the longest prompt and completion; None where that is not known.

    Attributes:
        packs: whether rows are packed.
    """

    def __init__(self, trainer: Any, *, longest: int | None):
        self.trainer = trainer
        self.longest = longest
        self.packs = trainer.args.pack_updates
        if self.packs:
            self.pack_if(supports_packing(trainer.accelerator.unwrap_model(trainer.model), longest=longest))

    def pack_if(self, supported: tuple[bool, str], because: str = "") -> None:
        """Pack from now on only if that is supported; else say why not."""
        self.packs, reason = supported
        if not self.packs and self.trainer.accelerator.is_main_process:
            print(f"rlseq: updates are not packed{because}: {reason}", flush=True)

    def scores(
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
            more: for `rlseq.training.update.forward.forward`.
        """
        trainer = self.trainer
        if rows is not None and len(rows) < len(batch):
            scores = self.scores(model, batch.select(rows), **more)
            index = torch.tensor(rows, device=trainer.accelerator.device)
            others = torch.zeros_like(batch.mask, dtype=scores.logprobs.dtype)
            if batch.old_logprobs is not None:
                others = batch.old_logprobs.to(others)
            return Scores(
                others.index_copy(0, index, scores.logprobs),
                torch.full_like(others, torch.nan).index_copy(0, index, scores.entropies),
            )
        completions, width = None, 0
        if batch.completion_ids is not None:
            trains, width = batch.mask.any(1).tolist(), batch.mask.shape[1]
            completions = [ids if counts else () for ids, counts in zip(batch.completion_ids, trains, strict=True)]
        with trainer.accelerator.autocast():
            return forward(
                model,
                batch.prompt_ids,
                completions,
                width,
                references=references,
                packs=self.packs,
                pad_id=trainer.processing_class.pad_token_id,
                dtype=trainer.model.dtype,
                device=trainer.accelerator.device,
                attention=attention_of(trainer.model),
                temperature=None if trainer.args.cast_lm_head_to_fp32 else trainer.temperature,
                **more,
            )

    def scores_in_parts(self, model: torch.nn.Module, trained: MicroBatch, **more: Any) -> list[Scores]:
        """What a model says of a batch's completions, without gradient, a micro-batch at a time."""
        args = self.trainer.args
        size, rows = args.per_device_train_batch_size, range(len(trained))
        parts = [trained.select(rows[start : start + size]) for start in rows[::size]]
        with torch.no_grad(), disable_gradient_checkpointing(self.trainer.model, args.gradient_checkpointing_kwargs):
            return [self.scores(model, part, **more) for part in parts]

    def logprobs(self, model: torch.nn.Module, trained: MicroBatch) -> Tensor:
        """(B, T) nats, of a batch's completions, likewise."""
        return torch.cat([part.logprobs for part in self.scores_in_parts(model, trained)])
