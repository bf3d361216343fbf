"""A cache with room holds what transformers' own holds, and copies it seldom."""

from __future__ import annotations

import torch
from tiny import tiny_model
from transformers import DynamicCache

from rlseq import sampler
from rlseq.decoding import Sample
from rlseq.kv_cache import LEAST_ROOM, RoomyLayer, with_room
from rlseq.types import Prompt


def states(generator, rows, tokens):
    return [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]


def test_it_holds_what_a_cache_that_is_joined_anew_holds():
    generator = torch.Generator().manual_seed(0)
    theirs = DynamicCache()
    theirs.update(*states(generator, 3, 5), 0)
    ours = with_room(
        DynamicCache([tuple(x.clone() for x in (theirs.layers[0].keys, theirs.layers[0].values))]),
        torch.tensor([2, 0, 0, 1]),
    )
    theirs.batch_select_indices(torch.tensor([2, 0, 0, 1]))
    assert type(ours.layers[0]) is RoomyLayer
    rows, buffers = 4, set()
    for step in range(3 * LEAST_ROOM):
        new = states(generator, rows, 3 if step == 7 else 1)
        for mine, other in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        buffers.add(ours.layers[0].keys.data_ptr())
        if step in (10, 50):
            keep = torch.tensor([0, rows - 1])
            ours.batch_select_indices(keep)
            theirs.batch_select_indices(keep)
            rows = 2
    assert len(buffers) <= 6  # of 96 steps


def test_completions_are_the_same_with_room_and_without(monkeypatch):
    for family in ("llama", "gpt2", "mistral"):
        model = tiny_model(family)
        prompts = [Prompt(str(i), "", tuple(range(3, 4 + i)), {}) for i in range(3)]
        settings = {"num_samples": 3, "max_new_tokens": 40, "strategy": Sample(), "seed": 0, "stop_ids": [2]}
        found = []
        for worth in (0, 10**9):
            monkeypatch.setattr(sampler, "WORTH_ROOM", worth)
            found.append(sampler.sample(model, prompts, **settings))
        assert [[r.completion_ids for r in group] for group in found[0]] == [
            [r.completion_ids for r in group] for group in found[1]
        ]
        assert any(len(r.completion_ids) == 40 for group in found[0] for r in group)
