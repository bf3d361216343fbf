"""Teacher forcing by `trl.SFTTrainer`, with batches of like lengths in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import trl
from accelerate.utils import gather_object
from torch.utils.data import Sampler

from rlseq.engine.model.lora import with_fused_layers
from rlseq.training.trl.trainer import RunMixin


class LengthGroupedBatches(Sampler[int]):
    """Batches of rows of like length, in random order, shuffled each epoch.

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


class TokenMean:
    """The mean of a loss over all tokens of an evaluation, from the means of its batches."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0  # of this process

    def add(self, mean: float, tokens: int) -> None:
        """Count a batch: the mean over its tokens, and how many they are."""
        self.total += mean * tokens
        self.tokens += tokens

    def over_all_processes(self) -> float | None:
        """The mean, where there is a token; called on every process."""
        total, tokens = map(sum, zip(*gather_object([(self.total, self.tokens)]), strict=True))
        return total / tokens if tokens else None


class SFTTrainer(RunMixin, trl.SFTTrainer):
    """TRL's SFTTrainer with `LengthGroupedBatches` as `train_sampling_strategy: group_by_length`.

    Its `eval_loss` is the mean over all tokens of the completions. transformers takes the mean of batches, each by its
    rows, which depends on the batch size where completions have different lengths. (On several processes the rows that
    fill up the last batch count twice.)

    Attributes:
        eval_nll: of the evaluation under way.
    """

    def __init__(self, *args, peft_config=None, **kwargs):
        super().__init__(*args, peft_config=with_fused_layers(peft_config), **kwargs)
        self.eval_nll = TokenMean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if tokens:
            self.eval_nll.add(found[0].item(), tokens)
        return found

    def evaluation_loop(self, *args, **kwargs):
        self.eval_nll = TokenMean()
        output = super().evaluation_loop(*args, **kwargs)
        mean = self.eval_nll.over_all_processes()
        output.metrics.update({name: mean for name in output.metrics if name.endswith("_loss") and mean is not None})
        return output

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedBatches(
            [len(ids) for ids in dataset["input_ids"]],
            self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.seed,
        )
