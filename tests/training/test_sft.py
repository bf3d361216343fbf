"""Teacher-forcing batches: of like lengths, in random order, each row once an epoch."""

from __future__ import annotations

import random
from itertools import pairwise

from rlseq.training.trl.sft import LengthGroupedBatches


def lengths(count=1000):
    return [random.Random(i).randint(5, 40) for i in range(count)]


def test_every_row_comes_once_an_epoch_in_another_order_each_epoch():
    sampler = LengthGroupedBatches(lengths(), 16, seed=0, batches_per_chunk=10)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1000)) and len(sampler) == 1000
    assert first != second
    assert list(LengthGroupedBatches(lengths(), 16, seed=0, batches_per_chunk=10)) == first
    assert list(LengthGroupedBatches(lengths(), 16, seed=1, batches_per_chunk=10)) != first


def test_rows_of_a_batch_have_like_lengths_and_batches_come_in_no_order_of_length():
    rows = lengths()
    order = list(LengthGroupedBatches(rows, 16, seed=0, batches_per_chunk=10))
    batches = [[rows[i] for i in order[start : start + 16]] for start in range(0, 992, 16)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 8  # a random batch of 16 spreads over about 31 of the 36 lengths
    means = [sum(batch) / 16 for batch in batches]
    falls = sum(after < before for before, after in pairwise(means))
    assert 0.3 < falls / (len(means) - 1) < 0.7


def test_the_short_batch_comes_last():
    order = list(LengthGroupedBatches(lengths(100), 16, seed=0))
    assert len(order) == 100
    last = order[96:]
    assert max(lengths(100)[i] for i in last) >= max(lengths(100)) - 1  # the longest rows of the only chunk
