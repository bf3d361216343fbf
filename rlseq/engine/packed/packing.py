"""Packing a prompt and its completions into one row: their common prefixes are computed once.

A row holds one or more groups. A group is the prompt and its completions in lexicographic order, so that each shares
with the one before it all that it shares with any. The first is written whole after the prompt, and of each
further one what it does not share, after a copy of the last token that it does share, at that token's position:

    prompt  p₀ p₁      completions  a b c,  a b d  and  e

    tokens       p₀  p₁   a   b   c |  b   d | p₁   e
    positions     0   1   2   3   4 |  3   4 |  1   2
    labels        -   -   a   b   c |  -   d |  -   e        (- is IGNORED)

A token sees those it follows in its own sequence, and nothing else: each original or copy is seen up to the next
copy of it or of a token before it. So each token sees what it would see alone, at the positions it would have alone,
and labels shifted by one (the usual convention) line up: a copy predicts what follows the shared part. One shared token
could not do that for several; and where a copy saw its original, it would see that token twice.

Equal completions thus cost as much as one, and the samples of a group cost only the tokens that they do not share. In
eval mode and in training without dropout that is exact; dropout would be shared.

The mask is a float added to the attention scores: boolean masks are silently wrong under eager attention. For a model
with FlexAttention (Dong et al. 2024, arXiv:2412.05496) it is a rule instead, and blocks of the row in which nothing
is seen are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rlseq.engine.decoding.prefix_attention import mark_packed
from rlseq.engine.packed.layout import Group, Layout, arrange, fill_rows, ramps, split

FLEX = "flex_attention"  # transformers' name
FLEX_BLOCK = 128  # row lengths are a multiple of it, so that kernels are compiled for few lengths
IGNORED = -100  # the label of positions that are not scored, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """R rows of S tokens that hold B completions of N tokens in all, and the places of these tokens.

    Attributes:
        input_ids: (R, S) long.
        position_ids: (R, S) long; 0 at padding.
        attention_mask: (R, 1, S, S), 0 where a token (third axis) sees another (fourth axis), else the lowest
            finite number of its dtype; padding sees itself, so that no softmax is empty. For FlexAttention the same
            as a BlockMask. From `pad`: (R, S) of 0 and 1.
        labels: (R, S) long, the token itself at completion tokens and IGNORED elsewhere (not yet shifted).
        lengths: tokens of each of the B completions, in the order given.
        token_rows, token_columns: (N,) long, row and column of each token of each completion in turn; completions
            with a common prefix name the same places.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | BlockMask
    labels: Tensor
    lengths: tuple[int, ...]
    token_rows: Tensor
    token_columns: Tensor

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The arguments of a model's forward, without labels: not every forward takes them."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }


def pack(
    groups: Sequence[Group],
    *,
    pad_id: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    row_tokens: int | None = None,
    whole_groups: bool = False,
    attention: str | None = None,
) -> PackedBatch:
    """Lay groups out in rows, each prompt once, and each prefix that completions share.

    Args:
        groups: (prompt ids, [completion ids, ...]); a prompt has a token at least, a completion may be empty.
        pad_id: the token that fills short rows; nothing sees it.
        device: of the tensors.
        dtype: of the attention mask; the model's own.
        row_tokens: None gives each group a row. A number is a budget: several groups share a row by first
            fit, longest first, and a longer group is split into several with the prompt repeated; a single
            completion that exceeds the budget gets a row of its own.
        whole_groups: split no group; the budget becomes the tokens of the longest group if that is above `row_tokens`.
        attention: the model's attention implementation (`attention_of`), which determines the kind of mask.

    Returns:
        The batch; its completions are the groups' in order, flattened.

    Raises:
        ValueError: no groups, a prompt without tokens, or a budget below 1.
    """
    if not groups:
        raise ValueError("pack was given no groups; expected at least one (prompt, completions)")
    if row_tokens is not None and row_tokens < 1:
        raise ValueError(f"row_tokens is {row_tokens}; expected at least 1, or None for one group per row")
    for number, (prompt, _) in enumerate(groups):
        if len(prompt) == 0:
            raise ValueError(f"group {number} has an empty prompt; a completion needs a token to follow")
    arranged = [arrange(prompt, completions) for prompt, completions in groups]
    if row_tokens is not None and whole_groups:
        row_tokens = max(row_tokens, *(sum(shared.tokens) for shared in arranged))
    rows = fill_rows(split(groups, arranged, row_tokens), row_tokens)

    layout = Layout([len(completion) for _, completions in groups for completion in completions])
    for row, blocks in enumerate(rows):
        column = 0
        for block in blocks:
            column = layout.write(block, row, column)
    width = max(1, layout.width)
    if attention == FLEX:
        width = -(-width // FLEX_BLOCK) * FLEX_BLOCK
    row_of, column_of, length_of, position_of, unscored_of = np.asarray(layout.pieces, np.int64).reshape(-1, 5).T
    ramp = ramps(length_of)
    places = np.repeat(row_of * width + column_of, length_of) + ramp  # of each token, in the flattened (R, S)
    tokens = np.fromiter(chain.from_iterable(layout.ids), np.int64, count=len(ramp))
    scored = ramp >= np.repeat(unscored_of, length_of)

    size = len(rows) * width
    input_ids, positions, labels = np.full(size, pad_id), np.zeros(size, np.int64), np.full(size, IGNORED)
    input_ids[places] = tokens
    positions[places] = np.repeat(position_of, length_of) + ramp
    labels[places[scored]] = tokens[scored]
    seen_until = np.tile(np.arange(1, width + 1, dtype=np.int32), len(rows))  # padding sees itself
    row_of, column_of, length_of, end_of = np.asarray(layout.seen, np.int64).reshape(-1, 4).T
    seen_until[np.repeat(row_of * width + column_of, length_of) + ramps(length_of)] = np.repeat(end_of, length_of)

    shape = (len(rows), width)
    seen_RS = torch.from_numpy(seen_until).view(shape).to(device)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids).view(shape).to(device),
        position_ids=torch.from_numpy(positions).view(shape).to(device),
        attention_mask=_rule(seen_RS) if attention == FLEX else _added(seen_RS, dtype),
        labels=torch.from_numpy(labels).view(shape).to(device),
        lengths=tuple(layout.lengths.tolist()),
        token_rows=torch.from_numpy(np.repeat(layout.row_of, layout.lengths)).to(device),
        token_columns=torch.from_numpy(np.concatenate(layout.columns_of)).to(device),
    )


def _added(seen_RS: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, S, S), from the column before which each token is seen, (R, S)."""
    columns = torch.arange(seen_RS.shape[1], dtype=torch.int32, device=seen_RS.device)
    visible = columns[:, None] < seen_RS[:, None, :]  # (R, S, S)
    # 1 becomes 0 and 0 the lowest finite number: much faster than a masked fill
    return mark_packed(visible.tril_().to(dtype).sub_(1).mul_(torch.finfo(dtype).max)[:, None], seen_RS)


def _rule(seen_RS: Tensor) -> BlockMask:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < seen_RS[row, key])

    rows, width = seen_RS.shape
    return create_block_mask(visible, rows, None, width, width, device=seen_RS.device, BLOCK_SIZE=FLEX_BLOCK)


def rows_of_group(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], row_tokens: int | None
) -> list[tuple[int, list[int]]]:
    """How `pack` would split a group: for each row the number of tokens, and the indices of its completions."""
    blocks = split([(prompt, completions)], [arrange(prompt, completions)], row_tokens)
    return [(block.tokens, [index for index, _, _ in block.completions]) for block in blocks]


def pad(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """One sequence per row, padded on the right: the layout for models without `supports_packing`.

    Args:
        prompts, completions: B token id lists each; prompts have at least one token.
        pad_id: the token that fills short rows.
        device: of the tensors.

    Raises:
        ValueError: unequal counts, no rows, or a prompt without tokens.
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"pad was given {len(prompts)} prompts and {len(completions)} completions")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; a completion needs a token to follow")
    prompt_lengths, lengths = (np.array([len(x) for x in side]) for side in (prompts, completions))
    totals = prompt_lengths + lengths
    positions = np.broadcast_to(np.arange(totals.max()), (len(prompts), totals.max()))
    real = positions < totals[:, None]
    scored = real & (positions >= prompt_lengths[:, None])
    input_ids = np.full(real.shape, pad_id)
    pairs = zip(prompts, completions, strict=True)
    input_ids[real] = np.fromiter(chain.from_iterable(x for pair in pairs for x in pair), np.int64)
    labels = np.where(scored, input_ids, IGNORED)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(positions.copy()).to(device),
        attention_mask=torch.from_numpy(real.astype(np.int64)).to(device),
        labels=torch.from_numpy(labels).to(device),
        **_index(np.arange(len(prompts)), prompt_lengths, lengths, device),
    )


def unpack(per_token: Tensor, batch: PackedBatch, *, shifted: bool | None = None) -> list[Tensor]:
    """Take each completion's values out of a batch, differentiably.

    Args:
        per_token: (R, S-1), shifted: column t-1 holds the value of token t (log-probs of labels shifted by
            one, values of the state before a token); or (R, S): column t holds the value of token t.
        batch: the batch the values belong to.
        shifted: which of the two is meant; None reads it off the width.

    Returns:
        B tensors, (T_b,) each, in the order of the completions; an empty completion gives an empty one.

    Raises:
        ValueError: `per_token` has neither width, or not the one named.
    """
    return list(_completion_tokens(per_token, batch, shifted).split(batch.lengths))


def unpack_padded(per_token: Tensor, batch: PackedBatch, T: int, *, shifted: bool | None = None) -> Tensor:
    """As `unpack`, as one (B, T) tensor, right-padded with 0; one gather, differentiable.

    Raises:
        ValueError: `per_token` has a wrong width, or a completion has more than T tokens.
    """
    if max(batch.lengths, default=0) > T:
        raise ValueError(f"T is {T}, but a completion has {max(batch.lengths)} tokens")
    tokens = _completion_tokens(per_token, batch, shifted)  # (N,)
    lengths = torch.tensor(batch.lengths, device=tokens.device)
    mask = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T); its True entries are the N tokens
    return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)


def _index(rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, device: torch.device | str | None) -> dict:
    """The fields of a batch that say where its completions are."""
    return {
        "lengths": tuple(lengths.tolist()),
        "token_rows": torch.from_numpy(np.repeat(rows, lengths)).to(device),
        "token_columns": torch.from_numpy(np.repeat(starts, lengths) + ramps(lengths)).to(device),
    }


def _completion_tokens(per_token: Tensor, batch: PackedBatch, shifted: bool | None) -> Tensor:
    rows, width = batch.input_ids.shape
    widths = {True: width - 1, False: width}
    expected = list(widths.values()) if shifted is None else [widths[shifted]]
    if per_token.ndim != 2 or per_token.shape[0] != rows or per_token.shape[1] not in expected:
        shapes = " or ".join(f"({rows}, {w})" for w in expected)
        raise ValueError(f"per_token has shape {tuple(per_token.shape)}; this batch expects {shapes}")
    return per_token[batch.token_rows, batch.token_columns - (width - per_token.shape[1])]  # (N,)
