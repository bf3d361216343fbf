"""The two methods at which a trainer on rollouts departs from TRL's: one makes a batch, one a loss."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from rlseq.errors import ConfigError
from rlseq.training.rollouts import MicroBatch, RolloutBatch
from rlseq.training.run.faults import memory_for, update_advice
from rlseq.training.trl.trainer import RunMixin


class RolloutTrainer(RunMixin, trl.GRPOTrainer):
    """TRL's GRPOTrainer, whose batches are `RolloutBatch`es and whose micro-batches are rows of them."""

    def make_batch(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample, score and log the rollouts of B rows of the data set."""
        raise NotImplementedError

    def minibatches(self, trained: MicroBatch) -> list[MicroBatch]:
        """The rows of a batch in the parts that updates take in turn."""
        raise NotImplementedError

    def micro_batch_loss(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, by one call of the model; divided by those that make up an optimizer step."""
        raise NotImplementedError

    @property
    def starts_batch(self) -> bool:
        """Whether the next micro-batch is the first one of a batch of rollouts."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single rows, which would tear prompts from their samples; groups are shuffled whole, by a
        # generator of their own, so that no other random number of the run changes.
        if not self.model.training:
            raise ConfigError(
                "rollouts are not predicted: sample by rlseq.sample, or measure by evaluate or rlseq.contrast"
            )
        if self.starts_batch or self._buffered_inputs is None:
            with memory_for("scoring the rollouts (log-probs, the reference, values)", update_advice, self.args):
                self._buffered_inputs = self.minibatches(self.make_batch(generation_batch).trained)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.guard.keep(inputs, self.micro_batch_loss(model, inputs))
