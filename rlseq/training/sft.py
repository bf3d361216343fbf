"""Examples of teacher forcing: their lengths, and what cannot be trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from rlseq.data.chat import continues
from rlseq.errors import ConfigError

MEASURED = {"loss": False, "mean_token_accuracy": True, "entropy": False}  # at an evaluation: whether higher is better


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
