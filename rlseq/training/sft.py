"""Teacher forcing by `trl.SFTTrainer`, with batches of like lengths in random order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
import trl
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from rlseq.data.chat import continues
from rlseq.errors import ConfigError
from rlseq.training.run.model_card import ModelCardMixin
from rlseq.training.trl.guard import GuardMixin
from rlseq.training.trl.resume import ResumeMixin

MEASURED = {"loss": False, "mean_token_accuracy": True, "entropy": False}  # at an evaluation: whether higher is better


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


class SFTTrainer(GuardMixin, ResumeMixin, ModelCardMixin, trl.SFTTrainer):
    """TRL's SFTTrainer with `LengthGroupedBatches` as `train_sampling_strategy: group_by_length`.

    Its `eval_loss` is the mean over all tokens of the completions. transformers takes the mean of batches, each by its
    rows, which depends on the batch size where completions have different lengths. (On several processes the rows that
    fill up the last batch count twice.)
    """

    _evaluated: tuple[float, int] = (0.0, 0)  # Σ NLL and tokens of the evaluation under way, of this process

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if tokens:
            self._evaluated = self._evaluated[0] + found[0].item() * tokens, self._evaluated[1] + tokens
        return found

    def evaluation_loop(self, *args, **kwargs):
        self._evaluated = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        nll, tokens = map(sum, zip(*gather_object([self._evaluated]), strict=True))
        output.metrics.update({name: nll / tokens for name in output.metrics if name.endswith("_loss") and tokens})
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


def example_lengths(
    examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any]
) -> list[int]:
    """Tokens of each (prompt, completion) as teacher forcing sees it, with the EOS that ends it."""
    pairs = list(zip(examples["prompt"], examples["completion"], strict=True))
    if isinstance(pairs[0][0], str):
        return [len(ids) + 1 for ids in tokenizer(text=[prompt + text for prompt, text in pairs])["input_ids"]]
    turns = [[*prompt, *answer] for prompt, answer in pairs]
    options = {"tokenize": True, "return_dict": True, **template_options}
    return [len(ids) for ids in tokenizer.apply_chat_template(turns, **options)["input_ids"]]


def check_prefill(prompts: Iterable[Any], name: str) -> None:
    """Refuse prompts, texts or messages, that begin the answer: teacher forcing would close it before the reference.

    Raises:
        ConfigError: a prompt's last message is the assistant's.
    """
    if any(continues(prompt, {}) for prompt in prompts):
        raise ConfigError(
            f"a prompt of the {name} examples ends in a message of the assistant, which teacher forcing would close; "
            "let the references begin with it (--reference_template), and the prompt end before it"
        )


def check_examples(
    config: Any, examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, batch: int = 1
) -> tuple[list[int], str]:
    """What `max_length` takes from examples, which TRL cuts, and leaves out where nothing of the completion is left.

    Args:
        config: the run's settings.
        examples: prompts and completions.
        tokenizer: the model's.
        name: of the examples, in words.
        batch: examples of all processes' micro-batches; fewer are no batch, where `dataloader_drop_last` drops it.

    Returns:
        (tokens of each example before the cut, a sentence about the cut or "").

    Raises:
        ConfigError: nothing would be left to train on.
    """
    check_prefill(examples["prompt"], name)
    told = config.chat_template_kwargs or {}
    lengths, limit = example_lengths(examples, tokenizer, told), config.max_length
    lost, said = 0, ""
    long = [i for i, length in enumerate(lengths) if limit and length > limit]
    if long and not config.packing:
        if config.truncation_mode == "keep_start":
            chat = not isinstance(examples[long[0]]["prompt"], str)
            prompts = [examples[i]["prompt"] for i in long]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **told}
            asked = tokenizer.apply_chat_template(prompts, **options) if chat else tokenizer(text=prompts)
            lost = sum(len(ids) >= limit for ids in asked["input_ids"])
        end = "start" if config.truncation_mode == "keep_end" else "end"
        said = (
            f"max_length {limit} cuts the {end} off {len(long):,} of {len(lengths):,} {name} examples (the longest has "
            f"{max(lengths):,} tokens)"
        ) + (f", and leaves {lost:,} of them out, of whose completion nothing is left" if lost else "")
    if lost == len(lengths):
        raise ConfigError(f"{said}: no example would be left. Raise --max_length.")
    if config.dataloader_drop_last and len(lengths) - lost < batch and not config.packing:
        raise ConfigError(
            f"dataloader_drop_last drops the last batch where it is short, and {len(lengths) - lost:,} {name} examples "
            f"are fewer than a batch of {batch}: nothing would be trained. Leave it out, or give a smaller "
            "per_device_train_batch_size."
        )
    return lengths, said
