"""What a teacher says at the trained positions of a micro-batch, kept as its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlseq.engine.packed.packing import PackedBatch
from rlseq.losses import clipped_surrogate, divergence_of_states, divergence_to_go


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """The teacher's states of B rows, and how the student is compared with them.

    Attributes:
        states: (B, T, H), each before its token.
        weight, bias: of the teacher's head.
        kind, jsd_beta: as for `rlseq.losses.divergence`.
        temperature: of the teacher's distribution.
        places: (R, S-1) of a packed batch, which of the B·T states belongs to each label; -1: none. None before
            `placed`.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    kind: str
    jsd_beta: float
    temperature: float
    places: Tensor | None = None

    def placed(self, batch: PackedBatch, place_of: Sequence[int]) -> TeacherTargets:
        """The same for a packed batch.

        Args:
            batch: the B rows' completions, and perhaps others.
            place_of: of each row, its place among the batch's completions.
        """
        device, T = batch.token_rows.device, self.states.shape[1]
        row_of = {place: row for row, place in enumerate(place_of)}
        index = torch.cat(
            [
                torch.arange(n) + row_of[place] * T if place in row_of else torch.full((n,), -1)
                for place, n in enumerate(batch.lengths)
            ]
        ).to(device)  # (N,)
        ours = index >= 0  # a position may be shared with a completion that is no row: a reference
        places = torch.full(batch.input_ids.shape, -1, dtype=torch.long, device=device)
        places[batch.token_rows[ours], batch.token_columns[ours]] = index[ours]
        return replace(self, places=places[:, 1:])

    def divergences(self, hidden: Tensor, head: nn.Module, temperature: float) -> Tensor:
        """Of each position that has a place, (N,) nats, from the student's states (N, H) there."""
        return divergence_of_states(
            hidden,
            head.weight,
            head.bias,
            self.states.flatten(0, 1)[self.places[self.places >= 0]],
            self.weight,
            self.bias,
            kind=self.kind,
            jsd_beta=self.jsd_beta,
            temperature=temperature,
            teacher_temperature=self.temperature,
        )


def sequence_divergence_loss(
    divergences: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Per token, what has the gradient of the expected sum of a sequence's divergences, (B, T).

        D_t + c_t · ratio_t (clipped),   c_t = Σ_{s>t} D_s without gradient

    Args:
        divergences, logprobs, mask: (B, T).
        old_logprobs: of the policy that sampled; None: that is the policy itself.
        clip_low, clip_high: of the ratio, where rollouts are used more than once.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    advantages = -divergence_to_go(divergences, mask)
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    return torch.where(mask, divergences, 0.0) + clipped_surrogate(logprobs, old, advantages, mask, **clips)
