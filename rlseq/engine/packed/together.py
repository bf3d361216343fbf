"""Packing prompts that begin alike into one row: what they begin with is computed once, as are their completions' own
common prefixes.

To `pack`, the common prefix is the prompt, and what is left of each prompt, followed by one of its
completions, is a completion, of which only the latter part is scored. Attention that computes what tokens see and
little else (`rlseq.engine.decoding.packed_attention`, FlexAttention) makes such a row worth its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlseq.engine.decoding.common_prefix import find_common_prefixes
from rlseq.engine.packed.layout import Group
from rlseq.engine.packed.packing import IGNORED, PackedBatch, pack

ROW_TOKENS = 1024  # of prompts and completions that begin with one common prefix; beyond, others start another row


def pack_together(groups: Sequence[Group], **options: Any) -> PackedBatch | None:
    """As `pack` does, with the prefixes of several groups' prompts once in a row; None: too little is shared.

    Args:
        groups: as of `pack`.
        options: of `pack`, but `row_tokens`.

    Returns:
        The batch; its completions are those of the groups, in order.
    """
    if not all(completions for _, completions in groups):
        return None
    prefixes = find_common_prefixes([prompt for prompt, _ in groups])
    if prefixes is None:
        return None
    joined: list[tuple[Sequence[int], list[tuple[int, ...]]]] = []
    places: list[tuple[int, int]] = []  # of each group: where it is joined, and the tokens before its completions
    newest: dict[int, int] = {}  # common prefix -> the last one joined that begins with it
    used: list[int] = []  # tokens of each, at most
    for (prompt, completions), common, length in zip(
        groups, prefixes.of.tolist(), prefixes.lengths.tolist(), strict=True
    ):
        length = length or len(prompt)  # it begins as no other
        rest = tuple(prompt[length:])
        tokens = len(rest) + sum(map(len, completions))
        place = newest.get(common)
        if common < 0 or place is None or used[place] + tokens > ROW_TOKENS:
            place = newest[common] = len(joined)
            joined.append((prompt[:length], []))
            used.append(length)
        joined[place][1].extend((*rest, *completion) for completion in completions)
        used[place] += tokens
        places.append((place, len(rest)))
    return _without_the_rests(groups, joined, places, pack(joined, row_tokens=1, **options))


def _without_the_rests(
    groups: Sequence[Group],
    joined: Sequence[Group],
    places: Sequence[tuple[int, int]],
    batch: PackedBatch,
) -> PackedBatch:
    """The batch of the groups' own completions: what is left of prompts is not scored."""
    starts = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()  # of each joined completion, among all tokens
    first = torch.tensor([0, *(len(completions) for _, completions in joined)]).cumsum(0).tolist()
    kept, lengths = [], []
    for (_, completions), (place, skipped) in zip(groups, places, strict=True):
        for completion in completions:
            number = first[place]
            first[place] += 1
            kept.append(torch.arange(starts[number] + skipped, starts[number + 1]))
            lengths.append(len(completion))
    index = torch.cat(kept).to(batch.token_rows.device)
    rows, columns = batch.token_rows[index], batch.token_columns[index]
    labels = torch.full_like(batch.labels, IGNORED)
    labels[rows, columns] = batch.input_ids[rows, columns]
    return replace(batch, labels=labels, lengths=tuple(lengths), token_rows=rows, token_columns=columns)
