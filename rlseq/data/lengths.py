"""Prompts that are too long: refused, or left out before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.data.files import place_of
from rlseq.data.prompts import build_prompts
from rlseq.errors import DataError

SHOWN = 5  # rows that a message names


def within_length(
    rows: Sequence[Mapping[str, Any]],
    tokenizers: Sequence[Any],
    split: str,
    *,
    max_prompt_length: int | None,
    drop: bool,
    prompt_options: Mapping[str, Any],
) -> tuple[list[Mapping[str, Any]], str]:
    """The rows whose prompts are no longer than the limit under any of the tokenizers.

    Args:
        rows: of one split.
        tokenizers: of all models that read them: models that are compared keep the same rows.
        split: what a message calls the rows.
        max_prompt_length: tokens of a rendered prompt, the prefill included; None: no limit.
        drop: leave longer ones out instead of refusing them.
        prompt_options: as `build_prompts` takes them.

    Returns:
        (the rows that are kept, a sentence on those left out or "").

    Raises:
        DataError: a prompt is longer and `drop` is off, or no row is left.
    """
    if max_prompt_length is None:
        return list(rows), ""
    options = {**prompt_options, "merge_references": False}  # a prompt per row
    lengths = [0] * len(rows)
    for tokenizer in tokenizers:
        built = build_prompts(rows, tokenizer, **options)
        lengths = [max(length, len(prompt.prompt_ids)) for length, prompt in zip(lengths, built, strict=True)]
    long = [i for i, length in enumerate(lengths) if length > max_prompt_length]
    if not long:
        return list(rows), ""
    named = [f"{place_of(rows[i], i)}: {lengths[i]:,}" for i in long[:SHOWN]]
    named += [f"and {len(long) - SHOWN:,} more"] * (len(long) > SHOWN)
    which = f"{len(long):,} of {len(rows):,} {split} prompts"
    tokens = f"more tokens than max_prompt_length {max_prompt_length:,} ({', '.join(named)})"
    if not drop:
        raise DataError(
            f"{which} have {tokens}. Raise it, shorten those prompts, or leave them out by --overlong_prompts drop."
        )
    if len(long) == len(rows):
        raise DataError(f"{which} have {tokens}, and none would be left. Raise it, or shorten the prompts.")
    return [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_length], (
        f"{which} are left out: they have {tokens}"
    )
