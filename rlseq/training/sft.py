"""Teacher forcing by `trl.SFTTrainer`, with batches of like lengths in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import trl
from torch.utils.data import Sampler

from rlseq.training.checkpoints import FinishedRunMixin
from rlseq.training.guard import GuardMixin
from rlseq.training.model_card import ModelCardMixin


class LengthGroupedBatches(Sampler[int]):
    """Batches of rows of like length, in random order, anew each epoch.

    transformers' own `group_by_length` goes from the longest rows to the shortest over and over; that drift, batch
    after batch, makes a small model trained at a high learning rate diverge. Here rows are shuffled, sorted by
    length within chunks of `batches_per_chunk` batches, cut into batches, and the batches are shuffled.

    Args:
        lengths: length of each row, in tokens.
        batch_size: rows of one step over all processes.
        seed: with the epoch, names the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, batches_per_chunk: int = 50):
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.chunk = batch_size * batches_per_chunk
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch whose order comes next; the data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        ordered = torch.cat([chunk[self.lengths[chunk].argsort(stable=True)] for chunk in order.split(self.chunk)])
        batches = list(ordered.split(self.batch_size))
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a short batch keeps its place: the end
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter(torch.cat(shuffled + last).tolist())


class SFTTrainer(GuardMixin, FinishedRunMixin, ModelCardMixin, trl.SFTTrainer):
    """TRL's SFTTrainer whose `train_sampling_strategy: group_by_length` gives `LengthGroupedBatches`."""

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedBatches(
            [len(ids) for ids in dataset["input_ids"]],
            self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.seed,
        )
