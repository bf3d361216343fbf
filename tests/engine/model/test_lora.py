"""LoRA layers compute what PEFT's compute, and leave to PEFT what they do not serve."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from rlseq.engine.model.lora import LoraLinear, with_fused_layers


class Two(nn.Module):
    """Two linear layers, one with a bias, and the input that passes them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20, bias=True), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def config(dropout=0.0, **more):
    return LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["up", "down"], **more)


def adapted(dropout=0.0, *, make=lambda config: config, **more):
    torch.manual_seed(0)
    model = get_peft_model(Two(), make(config(dropout, **more)))
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


def fused(dropout=0.0, **more):
    model = adapted(dropout, make=with_fused_layers, **more)
    assert sum(type(module) is LoraLinear for module in model.modules()) == 2
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_and_every_gradient_are_those_of_peft(autocast):
    model, x = adapted(), torch.randn(3, 5, 12)
    expected, found = outcome(model, x, autocast), outcome(fused(), x, autocast)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        tolerance = 0.03 if autocast else 2e-6  # of the largest: bfloat16 has 8 bits, and sums of it are rounded
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


def test_the_result_is_that_of_the_merged_weight_by_hand():
    model = fused().double()
    layer = model.base_model.model.down
    weight = layer.base_layer.weight + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # 12 / 4
    x = torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_what_is_not_one_plain_adapter_is_computed_by_peft(monkeypatch):
    asked = []
    of_peft = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: asked.append(self) or of_peft(self, x))
    x = torch.randn(2, 12)
    plain = fused()
    plain(x)
    assert not asked
    with plain.disable_adapter():
        torch.testing.assert_close(plain(x), plain.base_model.model(x))
    assert asked
    merged = fused()
    expected = merged(x)
    merged.merge_adapter()
    asked.clear()
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)
    assert len(asked) == 2
    for more in ({"dropout": 0.5}, {"use_dora": True}):
        asked.clear()
        fused(**more).train()(x)
        assert len(asked) == 2, more


def test_dropout_that_is_off_leaves_the_products():
    x = torch.randn(2, 12)
    torch.testing.assert_close(fused(dropout=0.5).eval()(x), adapted(dropout=0.5).eval()(x))


def test_what_is_saved_is_peft_s_and_the_given_configuration_stays(tmp_path):
    given = config()
    torch.manual_seed(0)
    get_peft_model(Two(), given).save_pretrained(tmp_path / "peft")
    torch.manual_seed(0)
    get_peft_model(Two(), with_fused_layers(given)).save_pretrained(tmp_path / "fused")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert all(type(module) is not LoraLinear for module in get_peft_model(Two(), given).modules())


class Other(nn.Linear):
    """A linear layer of another kind, as quantised ones are."""


def test_other_layers_and_other_adapters_are_made_by_peft():
    model = Two()
    model.up = Other(12, 20)
    found = get_peft_model(model, with_fused_layers(config()))
    assert type(found.base_model.model.up) is PeftLinear and type(found.base_model.model.down) is LoraLinear
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        turned = get_peft_model(Two(), with_fused_layers(config(fan_in_fan_out=True)))
    assert type(turned.base_model.model.up) is PeftLinear
    other = IA3Config(target_modules=["up"], feedforward_modules=["up"])
    assert with_fused_layers(other) is other and with_fused_layers(None) is None


def test_a_second_adapter_of_the_same_configuration_is_fused_too():
    model = fused()
    model.add_adapter("ref", model.peft_config["default"])
    assert sum(type(module) is LoraLinear for module in model.modules()) == 2
