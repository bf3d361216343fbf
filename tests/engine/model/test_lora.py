"""LoRA layers compute what PEFT's compute, and leave to PEFT what they do not serve."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from rlseq.engine.model.lora import LoraLinear, fuse_lora


class Two(nn.Module):
    """Two linear layers, one with a bias, and the input that passes them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20, bias=True), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(dropout=0.0, **more):
    torch.manual_seed(0)
    model = get_peft_model(
        Two(), LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["up", "down"], **more)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def outcome(model, x, autocast):
    """The result and all gradients of a model on x (B, T, 12)."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = model(x)
    (result.float() * torch.arange(12.0)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in gradients) and None not in gradients.values()
    return {"result": result, "x": x.grad, **gradients}


def fused(model):
    model = copy.deepcopy(model)
    fuse_lora(model)
    assert sum(type(module) is LoraLinear for module in model.modules()) == 2
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_and_every_gradient_are_those_of_peft(autocast):
    model, x = adapted(), torch.randn(3, 5, 12)
    expected, found = outcome(model, x, autocast), outcome(fused(model), x, autocast)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        tolerance = 0.03 if autocast else 2e-6  # of the largest: bfloat16 has 8 bits, and sums of it are rounded
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


def test_the_result_is_that_of_the_merged_weight_by_hand():
    model = fused(adapted()).double()
    layer = model.base_model.model.down
    weight = layer.base_layer.weight + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # 12 / 4
    x = torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_what_is_not_one_plain_adapter_is_computed_by_peft(monkeypatch):
    asked = []
    of_peft = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: asked.append(self) or of_peft(self, x))
    x = torch.randn(2, 12)
    plain = fused(adapted())
    plain(x)
    assert not asked
    with plain.disable_adapter():
        torch.testing.assert_close(plain(x), plain.base_model.model(x))
    assert asked
    merged = fused(adapted())
    expected = merged(x)
    merged.merge_adapter()
    asked.clear()
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)
    assert len(asked) == 2
    for more in ({"dropout": 0.5}, {"use_dora": True}):
        asked.clear()
        fused(adapted(**more)).train()(x)
        assert len(asked) == 2, more


def test_dropout_that_is_off_leaves_the_products():
    model, x = adapted(dropout=0.5).eval(), torch.randn(2, 12)
    torch.testing.assert_close(fused(model)(x), model(x))
