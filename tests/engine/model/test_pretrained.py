"""Whatever loads a checkpoint, for training or evaluation, no weight of it is left random unless that was asked for."""

import json
import re
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_task import tiny_tokenizer, tiny_trainer
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from rlseq.config.training import ModelArguments
from rlseq.errors import ModelError
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.training.models import check_model_path, load_model
from rlseq.training.trl.checkpoint.sharded_weights import check_sharded

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


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_was_read_under_wrapped_names_is_saved_under_the_models_own(rename, tmp_path):
    for_training(saved(tmp_path, rename)).save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tiny_model().state_dict().keys()


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


def checkpoint_of(make, folder, **settings):
    """A run of one step, and its checkpoint."""
    trainer = make(folder, max_steps=1, save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    return trainer, folder / "checkpoint-1"


def resumed(make, folder, checkpoint):
    """A trainer that has taken up the checkpoint at the last step, so that it trains none."""
    trainer = make(folder, max_steps=1)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def whole_run(folder, **settings):
    return tiny_trainer(folder, model=tiny_model(initializer_range=0.1, tie_word_embeddings=True), **settings)


def adapter_run(folder, **settings):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return tiny_trainer(folder, peft_config=lora, **settings)


def experts_run(folder, **settings):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 23}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, pad_token_id=0, eos_token_id=2))
    return tiny_trainer(folder, model=model, **settings)


RUNS = {"whole": (whole_run, "model"), "adapter": (adapter_run, "adapter_model"), "experts": (experts_run, "model")}


@pytest.mark.parametrize("rename", [lambda name: name, lambda name: f"_orig_mod.{name}"], ids=["own names", "wrapped"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumes_with_all_of_the_weights_of_its_checkpoint(run, rename, tmp_path):
    make, file = RUNS[run]
    trained, checkpoint = checkpoint_of(make, tmp_path / "run")
    saved(checkpoint, rename, f"{file}.safetensors") if file == "model" else renamed(checkpoint, rename)
    start, found = make(tmp_path / "again").model.state_dict(), resumed(make, tmp_path / "again", checkpoint)
    expected = trained.model.state_dict()
    assert sum(not torch.equal(start[name], expected[name]) for name in expected) > 1  # training moved them
    assert all(torch.equal(weight, expected[name]) for name, weight in found.model.state_dict().items())


@pytest.mark.parametrize(("run", "lost"), [("whole", "layers.1."), ("adapter", "layers.1."), ("adapter", "lm_head")])
def test_a_run_does_not_resume_without_weights_of_its_checkpoint(run, lost, tmp_path):
    make, _ = RUNS[run]
    _, checkpoint = checkpoint_of(make, tmp_path / "run")
    drop = saved if run == "whole" else renamed
    drop(checkpoint, lambda name: None if lost in name else name)
    with pytest.raises(ModelError, match=r"checkpoint-1' lacks \d+ of the model's weights .*another checkpoint"):
        resumed(make, tmp_path / "again", checkpoint)


def test_the_best_checkpoint_of_a_model_with_experts_is_taken_whole(tmp_path):
    trained, checkpoint = checkpoint_of(experts_run, tmp_path / "run")
    best = experts_run(tmp_path / "again")
    best.state.best_model_checkpoint = str(checkpoint)
    best._load_best_model()
    expected = trained.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in best.model.state_dict().items())


def fsdp_whole(folder, weights):
    torch.save(weights, folder / "pytorch_model_fsdp.bin")


def fsdp_shards(folder, weights):
    distributed_checkpoint.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)


def deepspeed(folder, weights):
    """What its documentation says of its folder, written without it."""
    (folder / "global_step1").mkdir()
    (folder / "latest").write_text("global_step1")
    shapes = [OrderedDict((name, weight.shape) for name, weight in weights.items())]
    state = {"module": weights, "param_shapes": shapes, "args": Namespace(a=1), "dtype": torch.float32, "world": {1, 2}}
    torch.save(state, folder / "global_step1" / "mp_rank_00_model_states.pt")


def trained_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("write", [fsdp_whole, fsdp_shards, deepspeed])
@pytest.mark.parametrize("run", ["whole", "adapter"])
def test_what_fsdp_and_deepspeed_load_by_themselves_is_checked_by_name(run, write, tmp_path):
    model = RUNS[run][0](tmp_path / "run").model
    weights = trained_of(model)
    if run == "adapter" and write is fsdp_shards:
        weights = get_peft_model_state_dict(model)
    write(tmp_path, weights)
    check_sharded(model, tmp_path)
    for change, said in (
        (lambda name: name if "layers.1." not in name else None, r"lacks \d+ of the model's weights \(.*layers\.1\."),
        (lambda name: f"_orig_mod.{name}", r"lacks \d+ of .* names of a wrapped model instead \(_orig_mod\."),
    ):
        (folder := tmp_path / re.sub(r"\W", "", said)).mkdir()
        write(folder, {change(name): weight for name, weight in weights.items() if change(name)})
        with pytest.raises(ModelError, match=said):
            check_sharded(model, folder)


def test_under_deepspeed_a_run_does_not_resume_without_weights_of_its_checkpoint(tmp_path, monkeypatch):
    trainer, checkpoint = checkpoint_of(adapter_run, tmp_path / "run")
    deepspeed(checkpoint, {name: x for name, x in trained_of(trainer.model).items() if "layers.1." not in name})
    again = adapter_run(tmp_path / "again", max_steps=2)
    again.is_deepspeed_enabled = True
    loaded = []
    monkeypatch.setattr(transformers.trainer, "deepspeed_load_checkpoint", lambda *_, **__: loaded.append(1))
    with pytest.raises(ModelError, match=r"lacks 2 of the model's weights .*another checkpoint"):
        again.train(resume_from_checkpoint=str(checkpoint))
    again.state.best_model_checkpoint = str(checkpoint)
    with pytest.raises(ModelError, match=r"lacks 2 of the model's weights .*another checkpoint"):
        again._load_best_model()
    assert not loaded


def test_a_checkpoint_without_a_file_that_deepspeed_loads_is_refused(tmp_path):
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(ModelError, match=r"there is no global_step9/\*model_states.pt"):
        check_sharded(tiny_model(), tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for load in (for_training, for_evaluation):
        with pytest.raises(ModelError, match=re.escape(path)):
            load(path)
    with pytest.raises(ModelError, match=r"model\.safetensors' was cut short"):
        check_model_path(path)
