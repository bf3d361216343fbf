"""Groups of prompts and completions as rows of tokens, common prefixes written once.

`rlseq.engine.packed.packing` explains the layout: the place of each token, and the column from which on it is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # (prompt ids, [completion ids, ...])


@dataclass(frozen=True)
class Shared:
    """A group's completions in lexicographic order.

    Attributes:
        order: the index of the completion at each place.
        shared: tokens that it shares with the completion before it; 0 for the first.
        tokens: tokens that it adds to the row; the first adds the prompt's too.
    """

    order: list[int]
    shared: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Block:
    """The part of a group in one row: completions (their index in the batch, tokens, tokens shared) in order."""

    prompt: Sequence[int]
    completions: list[tuple[int, Sequence[int], int]]
    tokens: int


def arrange(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Shared:
    keys = [tuple(completion) for completion in completions]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared, tokens = [], []
    before: tuple[int, ...] | None = None
    for index in order:
        key = keys[index]
        if before is None:
            shared.append(0)
            tokens.append(len(prompt) + len(key))
        else:
            pairs = enumerate(zip(before, key, strict=False))
            common = next((n for n, (a, b) in pairs if a != b), min(len(before), len(key)))
            shared.append(common)
            tokens.append(len(key) - common + (common < len(before)))
        before = key
    return Shared(order, shared, tokens)


def split(groups: Sequence[Group], arranged: Sequence[Shared], row_tokens: int | None) -> list[Block]:
    """Groups as blocks that each fit a row, or hold a single completion."""
    blocks: list[Block] = []
    first = 0
    for (prompt, completions), places in zip(groups, arranged, strict=True):
        members: list[tuple[int, Sequence[int], int]] = []
        used = 0
        for index, shared, tokens in zip(places.order, places.shared, places.tokens, strict=True):
            if members and row_tokens is not None and used + tokens > row_tokens:
                blocks.append(Block(prompt, members, used))
                members, used = [], 0
            if not members:
                shared, tokens = 0, len(prompt) + len(completions[index])
            members.append((first + index, completions[index], shared))
            used += tokens
        blocks.append(Block(prompt, members, used))
        first += len(completions)
    return blocks


def fill_rows(blocks: list[Block], row_tokens: int | None) -> list[list[Block]]:
    if row_tokens is None:
        return [[block] for block in blocks]
    rows: list[list[Block]] = []
    room: list[int] = []
    for block in sorted(blocks, key=lambda block: -block.tokens):  # stable: ties keep their order
        row = next((r for r, left in enumerate(room) if left >= block.tokens), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(block)
        room[row] -= block.tokens
    return rows


class Layout:
    """The places of the tokens of blocks.

    Attributes:
        ids: the tokens of each piece, a run of tokens that follow each other in a row.
        pieces: of each piece row, column, length, position of its first token, and tokens that are not scored.
        seen: runs of tokens (row, column, length) and the column before which they are seen.
        lengths, row_of, columns_of: of each completion, in the order given: tokens, their row, and their columns.
        width: of the longest row.
    """

    def __init__(self, lengths: list[int]):
        self.ids: list[Sequence[int]] = []
        self.pieces: list[tuple[int, int, int, int, int]] = []
        self.seen: list[tuple[int, int, int, int]] = []
        self.lengths = np.array(lengths, np.int64)
        self.row_of = np.zeros(len(lengths), np.int64)
        self.columns_of = [np.zeros(0, np.int64)] * max(1, len(lengths))
        self.width = 0

    def write(self, block: Block, row: int, column: int) -> int:
        """Lay out a block from a column on, and return the column after it."""
        prompt = block.prompt
        path = np.zeros(len(prompt) + max((len(c) for _, c, _ in block.completions), default=0), np.int64)  # columns
        still_seen: list[tuple[int, int, int]] = []  # runs: position and column of the first token, and tokens
        before: int | None = None  # tokens of the completion before
        ids: Sequence[int]
        for index, completion, shared in block.completions:
            end = len(prompt) + len(completion)
            if before is None:
                ids, position, unscored = (*prompt, *completion), 0, len(prompt)
            elif shared < before:
                last = completion[shared - 1] if shared else prompt[-1]
                ids, position, unscored = (last, *completion[shared:]), len(prompt) + shared - 1, 1
                self._hide(still_seen, position, row, column)
            else:  # the one before, continued
                ids, position, unscored = completion[shared:], len(prompt) + shared, 0
            if ids:
                self.ids.append(ids)
                self.pieces.append((row, column, len(ids), position, unscored))
                still_seen.append((position, column, len(ids)))
                path[position + unscored : end] = np.arange(column + unscored, column + len(ids))
                column += len(ids)
            self.row_of[index], self.columns_of[index] = row, path[len(prompt) : end].copy()
            before = len(completion)
        self._hide(still_seen, 0, row, column)
        self.width = max(self.width, column)
        return column

    def _hide(self, still_seen: list[tuple[int, int, int]], position: int, row: int, column: int) -> None:
        """Mask the tokens from a position on for all columns from a column on."""
        while still_seen and still_seen[-1][0] + still_seen[-1][2] > position:
            first, start, count = still_seen.pop()
            kept = max(0, position - first)
            self.seen.append((row, start + kept, count - kept, column))
            if kept:
                still_seen.append((first, start, kept))


def ramps(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each length n, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def ranks(of: np.ndarray) -> np.ndarray:
    """The number of equal entries before each entry."""
    order = np.argsort(of, kind="stable")
    rank = np.empty_like(of)
    rank[order] = np.arange(len(of)) - np.searchsorted(of[order], of[order])
    return rank
