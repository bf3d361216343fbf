"""FlexAttention: the rule against the additive mask written out, and what models give with it against plain forwards.

It has no gradient on a CPU, so where one is taken the tests attend by the rule written out as a mask.
"""

from __future__ import annotations

import pytest
import torch
from test_packing import GROUPS, SEQUENCES, SHARING, alone, gradients, shifted_logprobs
from tiny import PAD, tiny_model
from tiny_task import tiny_trainer
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations import flex_attention as in_transformers

from rlseq.config.training import ModelArguments
from rlseq.engine.likelihood import score
from rlseq.engine.packed.packing import FLEX, FLEX_BLOCK, pack, unpack
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.errors import ConfigError
from rlseq.training.models import load_model


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    calls = []

    def plain(query, key, value, training=False, **kwargs):
        mask = kwargs["block_mask"]
        calls.append(mask)
        if not query.requires_grad:
            return flex_attention(query, key, value, **kwargs)
        written = create_mask(mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], device="cpu")
        scale, gqa = kwargs["scale"], kwargs["enable_gqa"]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=written, scale=scale, enable_gqa=gqa
        )

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # else each mask is traced, for seconds
    monkeypatch.setattr(in_transformers, "compile_friendly_flex_attention", plain)
    return calls


@pytest.mark.parametrize("groups", [GROUPS, SHARING])
def test_the_rule_says_what_the_added_mask_says(groups):
    layout = {"pad_id": PAD, "row_tokens": 160}
    added, ruled = (pack(groups, attention=attention, **layout) for attention in ("sdpa", FLEX))
    rows, width = ruled.input_ids.shape
    assert width % FLEX_BLOCK == 0 and width >= added.input_ids.shape[1]
    written = create_mask(ruled.attention_mask.mask_mod, rows, 1, width, width, device="cpu")
    held = added.input_ids.shape[1]
    assert torch.equal(written[:, :, :held, :held], added.attention_mask == 0)
    assert written.any(-1).all()  # padding sees itself


def test_blocks_in_which_nothing_is_seen_are_left_out():
    # Four groups, each as long as a block: none sees another's block, and the three blocks above are never seen.
    groups = [([5] * (FLEX_BLOCK - 8), [[10] * 8]) for _ in range(4)]
    mask = pack(groups, pad_id=PAD, row_tokens=4 * FLEX_BLOCK, attention=FLEX).attention_mask
    assert mask.to_dense()[0, 0].tolist() == torch.eye(4).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_rows_have_the_numbers_and_gradients_of_plain_forwards(family, uncompiled):
    flex, plain = tiny_model(family, attn_implementation=FLEX), tiny_model(family)
    batch = pack(GROUPS, pad_id=PAD, row_tokens=64, attention=FLEX)
    found = unpack(shifted_logprobs(flex, batch), batch)
    expected = [alone(plain, prompt, completion) for prompt, completion in SEQUENCES]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    weight = [1.0 + i for i in range(len(SEQUENCES))]
    losses = [sum(w * x.sum() for w, x in zip(weight, side, strict=True)) for side in (found, expected)]
    grads = [gradients(model, loss) for model, loss in zip((flex, plain), losses, strict=True)]
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, atol=1e-4, rtol=1e-3)
    assert uncompiled and all(mask is batch.attention_mask for mask in uncompiled)


def test_a_model_with_it_is_scored_in_packed_rows(uncompiled):
    model = tiny_model("qwen2", attn_implementation=FLEX)
    assert supports_packing(model) == (True, "")
    pairs = [(prompt, completion) for prompt, completions in SHARING for completion in completions]
    del uncompiled[:]
    found = score(model, *zip(*pairs, strict=True))
    packed = [mask for mask in uncompiled if mask.shape[0] == 2]  # two prompts, two rows; the others are trials
    assert len(packed) == model.config.num_hidden_layers
    plain = tiny_model("qwen2")
    with torch.no_grad():
        for one, (prompt, completion) in zip(found, pairs, strict=True):
            torch.testing.assert_close(one, alone(plain, prompt, completion), atol=1e-5, rtol=1e-4)


def test_a_step_of_training_has_the_loss_and_gradient_of_plain_attention(tmp_path):
    def learned(attention):
        model = tiny_model("qwen2", initializer_range=0.1, attn_implementation=attention)
        trainer = tiny_trainer(tmp_path / attention, model=model, max_steps=1, learning_rate=1.0, optim="sgd")
        trainer.train()
        assert trainer.forward.packs
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    start = torch.cat([p.detach().flatten() for p in tiny_model("qwen2", initializer_range=0.1).parameters()])
    flex, plain = learned(FLEX), learned("sdpa")
    assert (plain - start).abs().max() > 1e-3
    torch.testing.assert_close(flex, plain, atol=2e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it has a gradient")
def test_training_with_it_is_refused_on_a_cpu_before_a_model_loads():
    with pytest.raises(ConfigError, match="flex_attention has no gradient on a CPU"):
        load_model(ModelArguments(model_name_or_path="recipes/g2p/base", attn_implementation=FLEX))
