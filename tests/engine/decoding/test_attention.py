"""Attention of packed rows in blocks: numbers and gradients against one plain forward a sequence."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_packing import GROUPS, SEQUENCES, SHARING, alone, gradients, shifted_logprobs
from tiny import PAD, tiny_model

from rlseq.engine.decoding import prefix_attention
from rlseq.engine.packing import pack, unpack


@pytest.fixture
def spans(monkeypatch):
    """Blocks of 4 queries; each call of SDPA as (queries, keys)."""
    pack(GROUPS, pad_id=PAD)  # what is registered is in place
    seen = []
    whole = prefix_attention._whole

    def spy(module, query, key, *args, **more):
        seen.append((query.shape[2], key.shape[2]))
        return whole(module, query, key, *args, **more)

    monkeypatch.setattr(prefix_attention, "_whole", spy)
    monkeypatch.setattr(prefix_attention, "BLOCK", 4)
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_log_probs_and_gradients_are_those_of_plain_forwards(family, checkpointed, spans):
    model = tiny_model(family)
    expected = [alone(model, prompt, completion) for prompt, completion in SEQUENCES]
    weights = [1.0 + i for i in range(len(SEQUENCES))]
    wanted = gradients(model, sum(w * x.sum() for w, x in zip(weights, expected, strict=True)))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = pack(GROUPS, pad_id=PAD, row_tokens=32)
    width = batch.input_ids.shape[1]
    del spans[:]
    found = unpack(shifted_logprobs(model, batch), batch)
    blocks = [(min(4, width - start), min(start + 4, width)) for start in range(0, width, 4)]
    assert spans == blocks * 2 and len(blocks) > 3  # two layers
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    grads = gradients(model, sum(w * x.sum() for w, x in zip(weights, found, strict=True)))
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-4, rtol=1e-3)


def test_completions_that_share_beginnings(spans):
    model = tiny_model("qwen2")
    batch = pack(SHARING, pad_id=PAD)
    with torch.no_grad():
        found = unpack(shifted_logprobs(model, batch), batch)
        expected = [alone(model, prompt, one) for prompt, completions in SHARING for one in completions]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert (4, 12) in spans


def test_anything_else_is_handed_on(spans):
    model = tiny_model("qwen2")
    batch = pack(GROUPS, pad_id=PAD, row_tokens=32)
    unmarked = {**batch.model_inputs, "attention_mask": batch.attention_mask.clone()}
    with torch.no_grad():
        del spans[:]
        found = model(**unmarked, use_cache=False).logits
        model(input_ids=batch.input_ids, use_cache=False)
        model.generate(batch.input_ids[:, :5], max_new_tokens=3, do_sample=False)
        assert all(keys == queries or queries == 1 for queries, keys in spans)
        torch.testing.assert_close(model(**batch.model_inputs, use_cache=False).logits, found, atol=1e-5, rtol=1e-4)


def test_transformers_looks_attention_up_by_name():
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is prefix_attention._attend


def test_repeated_keys_are_held_once_and_not_by_every_block(monkeypatch):
    pack(GROUPS, pad_id=PAD)
    kept, whole = [], prefix_attention._whole

    def spy(module, query, key, value, *args, **more):
        kept.append((module.num_key_value_groups, key.shape[1], key.untyped_storage().data_ptr()))
        return whole(module, query, key, value, *args, **more)

    monkeypatch.setattr(prefix_attention, "_whole", spy)
    monkeypatch.setattr(prefix_attention, "BLOCK", 4)
    model = tiny_model("llama")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    batch = pack(GROUPS, pad_id=PAD, row_tokens=32)
    shifted_logprobs(model, batch)  # with gradient: what a block was given is held
    assert len(kept) > 6 and {(groups, heads) for groups, heads, _ in kept} == {(1, 2)}
    assert len({storage for _, _, storage in kept}) == 2  # one a layer
