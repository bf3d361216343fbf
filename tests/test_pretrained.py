"""Whatever loads a checkpoint, for training or evaluation, no weight of it is left random unless that was asked for."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_task import tiny_tokenizer

from rlseq.errors import ModelError
from rlseq.evaluation.loading import load_checkpoint
from rlseq.training.config import ModelArguments
from rlseq.training.models import check_model_path, load_model

WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallelism": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "both, the other way round": lambda name: f"_orig_mod.module.{name}",
    "each layer compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "layers and parts of them": lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace(
        "mlp.", "mlp._checkpoint_wrapped_module."
    ),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
}


def saved(folder, rename=lambda name: name, file="model.safetensors", **config):
    """A tiny model in a folder, its weights under other names (None: left out) and its configuration changed."""
    if not (folder / "config.json").exists():
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    weights = {rename(name): weight for name, weight in load_file(folder / file).items() if rename(name) is not None}
    save_file(weights, folder / file, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return str(folder)


def for_training(path, allow_missing=False):
    return load_model(ModelArguments(model_name_or_path=path, allow_missing_weights=allow_missing))


def for_evaluation(path, allow_missing=False):
    return load_checkpoint("it", path, allow_missing)


@pytest.fixture(params=[for_training, for_evaluation])
def load(request):
    return request.param


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_that_wrappers_gave_to_weights_are_read_as_the_models_own(load, tmp_path, rename):
    found, expected = load(saved(tmp_path, rename)).state_dict(), tiny_model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lost", ["layers.1.", "embed_tokens", "norm.weight", "lm_head"])
def test_a_checkpoint_that_lacks_weights_is_refused(load, tmp_path, lost):
    path = saved(tmp_path, lambda name: None if lost in name else name, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks \d+ of the model's weights .*--allow_missing_weights true"):
        load(path)
    assert load(path, True).num_parameters() == tiny_model().num_parameters()


def test_a_lost_tie_is_a_lost_head(load, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).get_output_embeddings() is not None
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights \(lm_head.weight\)"):
        load(saved(tmp_path, tie_word_embeddings=False))


def test_a_layer_that_the_configuration_leaves_out_is_not_lost_in_silence(load, tmp_path):
    with pytest.raises(ModelError, match="weights of layers that its configuration leaves out"):
        load(saved(tmp_path, num_hidden_layers=1))


@pytest.fixture
def adapter(tmp_path):
    saved(tmp_path / "base")
    base = load_checkpoint("it", str(tmp_path / "base"))
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def renamed(adapter, rename):
    file = adapter / "adapter_model.safetensors"
    weights = {rename(name): weight for name, weight in load_file(file).items() if rename(name)}
    save_file(weights, file, metadata={"format": "pt"})
    return str(adapter)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 3, 4]])).logits


def test_an_adapter_saved_from_a_compiled_model_is_read_as_it_was(load, adapter):
    expected = logits(load(str(adapter)))
    name = "base_model.model.model."
    found = logits(load(renamed(adapter, lambda n: n.replace(name, "base_model.model._orig_mod.model."))))
    assert torch.equal(found, expected)


def test_an_adapter_that_lacks_weights_is_refused(load, adapter):
    with pytest.raises(ModelError, match="lacks 2 of the model's weights"):
        load(renamed(adapter, lambda name: None if "layers.0" in name and "q_proj" in name else name))


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for load in (for_training, for_evaluation):
        with pytest.raises(ModelError, match=re.escape(path)):
            load(path)
    with pytest.raises(ModelError, match=r"model\.safetensors' was cut short"):
        check_model_path(path)
