"""Attention of packed rows in blocks: numbers and gradients against one plain forward a sequence."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_packing import GROUPS, SEQUENCES, SHARING, alone, gradients, shifted_logprobs
from tiny import PAD, tiny_model

from rlseq.engine.decoding import packed_attention, prefix_attention
from rlseq.engine.packed.packing import pack, unpack


@pytest.fixture
def calls(monkeypatch):
    """Packed rows of any length in blocks of 4 queries; of each call of the packed attention the rows' tokens."""
    seen = []

    def spy(query, key, value, blocks, scale):
        seen.append(query.shape[2])
        return packed_attention.packed_attention(query, key, value, blocks, scale)

    monkeypatch.setattr(prefix_attention, "packed_attention", spy)
    monkeypatch.setattr(prefix_attention, "MIN_TOKENS", 1)
    monkeypatch.setattr(packed_attention, "BLOCK", 4)
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_log_probs_and_gradients_are_those_of_plain_forwards(family, checkpointed, calls):
    model = tiny_model(family)
    expected = [alone(model, prompt, completion) for prompt, completion in SEQUENCES]
    weights = [1.0 + i for i in range(len(SEQUENCES))]
    wanted = gradients(model, sum(w * x.sum() for w, x in zip(weights, expected, strict=True)))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = pack(GROUPS, pad_id=PAD, row_tokens=32)
    width = batch.input_ids.shape[1]
    found = unpack(shifted_logprobs(model, batch), batch)
    assert calls == [width] * 2 and width > 12  # two layers
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    grads = gradients(model, sum(w * x.sum() for w, x in zip(weights, found, strict=True)))
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-4, rtol=1e-3)


def test_completions_that_share_prefixes(calls):
    model = tiny_model("qwen2")
    batch = pack(SHARING, pad_id=PAD)
    with torch.no_grad():
        found = unpack(shifted_logprobs(model, batch), batch)
        expected = [alone(model, prompt, one) for prompt, completions in SHARING for one in completions]
    assert calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_anything_else_is_handed_on(calls):
    model = tiny_model("qwen2")
    batch = pack(GROUPS, pad_id=PAD, row_tokens=32)
    unmarked = {**batch.model_inputs, "attention_mask": batch.attention_mask.clone()}
    with torch.no_grad():
        found = model(**unmarked, use_cache=False).logits
        model(input_ids=batch.input_ids, use_cache=False)
        model.generate(batch.input_ids[:, :5], max_new_tokens=3, do_sample=False)
        assert not calls
        torch.testing.assert_close(model(**batch.model_inputs, use_cache=False).logits, found, atol=1e-5, rtol=1e-4)
        assert calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_masked_softmax(dtype, monkeypatch):
    monkeypatch.setattr(packed_attention, "BLOCK", 3)
    torch.manual_seed(0)
    # Row 0: tokens 2 and 3 are seen by themselves and by token 4 only; row 1: its last two are padding.
    seen = torch.tensor([[8, 8, 5, 5, 5, 8, 8, 8], [6, 6, 6, 4, 6, 6, 7, 8]])
    query, key, value, weight = (torch.randn(2, heads, 8, 4, dtype=torch.float64).to(dtype) for heads in (6, 2, 2, 6))
    if dtype != torch.bfloat16:  # whose products have 8 bits
        key[:, :, 5] *= 400  # scores so far apart that probabilities underflow
    inputs = [x.requires_grad_() for x in (query, key, value)]
    found = packed_attention.packed_attention(*inputs, packed_attention.Blocks(seen), 0.7)
    gradients = torch.autograd.grad(found, inputs, weight.transpose(1, 2))

    at = torch.arange(8)
    sees = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < seen[:, None, :])  # (R, S, S)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    keys, values = (x.repeat_interleave(3, dim=1) for x in exact[1:])
    scores = (exact[0] @ keys.transpose(-1, -2) * 0.7).masked_fill(~sees[:, None], -torch.inf)
    expected = scores.softmax(-1) @ values
    wanted = torch.autograd.grad(expected, exact, weight.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.04}[dtype]
    assert found.dtype == dtype and found.shape == (2, 8, 6, 4)
    for one, other in zip((found.transpose(1, 2), *gradients), (expected, *wanted), strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_under_autocast_all_is_computed_in_its_precision():
    torch.manual_seed(0)
    blocks = packed_attention.Blocks(torch.full((1, 6), 6))
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):  # a model in float32: rotated queries and keys stay so, values do not
        found = packed_attention.packed_attention(query, key, value.bfloat16(), blocks, None)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=0.02, rtol=0.02)
    found.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in (query, key, value))


def test_transformers_looks_attention_up_by_name():
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is prefix_attention._attend
