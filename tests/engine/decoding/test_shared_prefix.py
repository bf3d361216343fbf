"""Prompts held once: by brute force, each slot's logits are those of a plain forward of its whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cuda_graph import HELD, SOURCES, compare, follow
from tiny import tiny_model

from rlseq.engine.decoding import backends
from rlseq.engine.decoding.prefix_attention import Groups, _softmax
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ModelError
from rlseq.types import Prompt


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_each_slot_goes_on_as_its_sequence_alone(family):
    model = tiny_model(family)
    with torch.no_grad():
        state = backends.SharedPrefixDecoder(model, HELD, 6, 30)
    follow(model, state, SOURCES)
    assert all(len(layer.prompt_keys) <= len(HELD) < 6 == layer.max_rows for layer in state.cache.layers)


def test_queries_that_share_keys_by_heads():
    model = tiny_model("qwen2", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    with torch.no_grad():
        state = backends.SharedPrefixDecoder(model, HELD, 6, 30)
    follow(model, state, SOURCES)
    assert all(len(layer.prompt_keys) <= len(HELD) < 6 == layer.max_rows for layer in state.cache.layers)


def test_prompts_that_nobody_follows_are_let_go():
    model = tiny_model()
    with torch.no_grad():
        state = backends.SharedPrefixDecoder(model, HELD, 8, 30)
        assert [len(layer.prompt_keys) for layer in state.cache.layers] == [4, 4]
    follow(model, state, [None, [3, 3, 1, 3], [0, 2], None, [1, 1, 1, 0], [0]])
    assert [len(layer.prompt_keys) for layer in state.cache.layers] == [1, 1]
    assert state.groups.bias.shape == (1, 1, 1, 3)


def test_groups_by_hand():
    groups = Groups(np.array([2, 0, 2, 2, 0]), torch.zeros(3, 1, 1, 4))
    assert groups.rows.tolist() == [[1, 4, 0], [0, 0, 0], [0, 2, 3]]
    assert groups.rows.flatten()[groups.place].tolist() == [0, 1, 2, 3, 4]


def test_softmax_by_hand():
    # Scores 0, ln 2 and a hidden one: weights 1/3 and 2/3, the sum of exponentials 3.
    query, keys = torch.ones(1, 1), torch.tensor([[0.0], [np.log(2)], [5.0]], dtype=torch.float32)
    hidden = torch.tensor([0.0, 0.0, torch.finfo(torch.float32).min])
    found, weight = _softmax(query, keys, torch.tensor([[3.0], [6.0], [100.0]]), hidden)
    assert found.item() == pytest.approx(5) and weight.item() == pytest.approx(np.log(3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_of_long_prompts_have_the_log_probs_of_plain_forwards(attention, monkeypatch):
    monkeypatch.setattr(backends, "MIN_SHARED_PREFIX", 4)
    made = []
    kind = backends.SharedPrefixDecoder
    monkeypatch.setattr(backends, "SharedPrefixDecoder", lambda *a: made.append(a) or kind(*a))
    model = tiny_model("qwen2", attn_implementation=attention)
    prompts = [Prompt(str(i), "", tuple(range(3, 5 + i)), {}) for i in range(4)]
    settings = {"max_new_tokens": 20, "strategy": Sample(), "seed": 0, "stop_ids": [2]}
    found = sample(model, prompts, num_samples=5, **settings)
    assert len(made) == (2 if attention == "sdpa" else 1)  # a trial, and the work where it was passed
    compare(model, prompts, found)
    del made[:]
    sample(model, prompts, num_samples=1, **settings)  # a prompt to a row: nothing to share
    assert not made


def test_a_model_that_hands_on_other_keys_does_not_pass_the_trial():
    model = tiny_model("llama")
    assert backends.supports_shared_prefix(model)
    other = tiny_model("llama", seed=1)
    for layer in other.model.layers:
        layer.self_attn.register_forward_pre_hook(_copied_keys, with_kwargs=True)
    assert not backends.supports_shared_prefix(other)


def _copied_keys(module, args, kwargs):
    cache = kwargs.get("past_key_values")
    if cache is not None and not hasattr(cache, "plain"):
        cache.plain, update = True, cache.update
        cache.update = lambda *a, **k: tuple(x.clone() for x in update(*a, **k))  # the mark is lost
    return args, kwargs


def test_windows_cannot_be_shared():
    with pytest.raises(ModelError, match="cannot share the keys"), torch.no_grad():
        backends.SharedPrefixDecoder(tiny_model("mistral"), HELD)
