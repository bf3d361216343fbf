"""The reference of the KL is the policy at its start, however that was saved and whatever shards it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_task import tiny_tokenizer, tiny_trainer
from trl.trainer import grpo_trainer

from rlseq.config.training import ModelArguments
from rlseq.errors import ModelError
from rlseq.training.models import load_model
from rlseq.training.trl.loss import reference


def first_kl(model, folder, **settings):
    trainer = tiny_trainer(folder, model=model, beta=0.5, max_steps=1, **settings)
    trainer.train()
    return next(line["kl"] for line in trainer.state.log_history if "kl" in line)


def wrapped_base(folder):
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({f"_orig_mod.{n}": w for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    return load_model(ModelArguments(model_name_or_path=str(folder)))


@pytest.mark.parametrize("zero3", [False, True])
def test_no_distributed_mode_loads_the_reference_by_trls_loader(zero3, tmp_path, monkeypatch):
    """ZeRO-3, where nothing can be copied, is pretended; the weights are whole here."""
    monkeypatch.setattr(reference, "is_deepspeed_zero3_enabled", lambda: zero3)
    asked, load = [], reference.load_model
    monkeypatch.setattr(reference, "load_model", lambda *args, **kwargs: asked.append(args) or load(*args, **kwargs))
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", None)
    model = wrapped_base(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "run", model=model, beta=0.5)
    assert asked == ([(str(tmp_path / "base"),)] if zero3 else [])
    assert trainer.ref_model is not model
    found = trainer.ref_model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in model.state_dict().items())


def test_a_reference_that_lacks_weights_is_refused_where_it_cannot_be_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "is_deepspeed_zero3_enabled", lambda: True)
    model = wrapped_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "layers.1" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        tiny_trainer(tmp_path / "run", model=model, beta=0.5)


def test_the_reference_of_a_model_that_was_never_saved_is_its_start(tmp_path):
    assert first_kl(tiny_model(), tmp_path / "run") == pytest.approx(0, abs=1e-6)


def test_the_reference_of_a_compiled_models_checkpoint_is_the_policy_at_its_start(tmp_path):
    assert first_kl(wrapped_base(tmp_path / "base"), tmp_path / "run") == pytest.approx(0, abs=1e-6)


def test_the_reference_of_a_policy_whose_head_computes_in_float32_does_so_too(tmp_path):
    model = tiny_model("llama", initializer_range=0.1).to(torch.bfloat16)
    assert first_kl(model, tmp_path / "run", cast_lm_head_to_fp32=True, bf16=True) == 0
