"""A cache with room holds what transformers' own holds, and copies it seldom."""

from __future__ import annotations

import numpy as np
import torch
from tiny import tiny_model
from transformers import DynamicCache

from rlseq.engine import sampling
from rlseq.engine.decoding import decoders
from rlseq.engine.decoding.kv_cache import MIN_HEADROOM, PreallocatedLayer, preallocate, rearrange
from rlseq.engine.strategies import Sample
from rlseq.types import Prompt


def states(generator, rows, tokens):
    return [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]


def test_it_holds_what_a_cache_that_is_joined_again_holds():
    generator = torch.Generator().manual_seed(0)
    theirs = DynamicCache()
    theirs.update(*states(generator, 3, 5), 0)
    ours = DynamicCache([tuple(x.clone() for x in (theirs.layers[0].keys, theirs.layers[0].values))])
    ours = preallocate(ours, 8)
    assert type(ours.layers[0]) is PreallocatedLayer
    moves = {
        0: [2, 0, 0, 1],  # most rows move
        10: [0, 3],  # fewer rows
        20: [0, 1, 0],  # one branches
        30: [0, 1, 2, 0, 1, 2],  # half of them are new
        40: [0, 1, 5, 3, 4, 5, 2, 0],  # rows are taken by others, and the limit is reached
        50: [7, 1],
        80: [0, 1, 1],
    }
    rows, buffers = 3, set()
    for step in range(3 * MIN_HEADROOM):
        if step in moves:
            rearrange(ours, np.array(moves[step]))
            theirs.batch_select_indices(torch.tensor(moves[step]))
            rows = len(moves[step])
        new = states(generator, rows, 3 if step == 7 else 1)
        for mine, other in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert len(ours.layers[0]._buffers[0]) <= 8
        buffers.add(ours.layers[0].keys.data_ptr())
    assert len(buffers) <= 12  # of 96 steps


def test_what_branches_is_copied_alone():
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    cache.update(*states(generator, 10, 5), 0)
    cache = preallocate(cache, 20)
    place = cache.layers[0].keys.data_ptr()
    for rows in (11, 12):
        rearrange(cache, np.array([*range(rows - 1), 4]))
        assert cache.layers[0].keys.data_ptr() == place and len(cache.layers[0].keys) == rows
    assert torch.equal(cache.layers[0].keys[11], cache.layers[0].keys[4])


def test_completions_are_the_same_preallocated_and_not(monkeypatch):
    for family in ("llama", "gpt2", "mistral"):
        model = tiny_model(family)
        prompts = [Prompt(str(i), "", tuple(range(3, 4 + i)), {}) for i in range(3)]
        settings = {"num_samples": 3, "max_new_tokens": 40, "strategy": Sample(), "seed": 0, "stop_ids": [2]}
        found = []
        for least in (0, 10**9):
            monkeypatch.setattr(decoders, "MIN_PREALLOCATED", least)
            found.append(sampling.sample(model, prompts, **settings))
        assert [[r.completion_ids for r in group] for group in found[0]] == [
            [r.completion_ids for r in group] for group in found[1]
        ]
        assert any(len(r.completion_ids) == 40 for group in found[0] for r in group)
