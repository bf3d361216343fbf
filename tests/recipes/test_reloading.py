"""A run's result, loaded again as an evaluation loads it, against the trained model that is still in memory."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_ppo import tiny_ppo
from tiny_task import ROWS, save_model, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from rlseq.config.training import ModelArguments
from rlseq.data.prompts import build_prompts
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.recipes.rollouts import check_reloaded
from rlseq.training.models import write_merged
from rlseq.training.run.directory import RunDirectory


def base_of(folder, dtype):
    """A base as a recipe loads it, from a folder."""
    save_model(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def lora():
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def trained(kind, folder, dtype=torch.float32, **settings):
    """A trainer that trained for two steps and saved its result."""
    settings["max_steps"] = 2
    if kind == "ppo":
        trainer = tiny_ppo(folder / "run", **settings)
    else:
        adapter = lora() if kind == "lora" else None
        trainer = tiny_trainer(folder / "run", model=base_of(folder, dtype), peft_config=adapter, **settings)
    trainer.train()
    trainer.save_model(folder / "run")
    tiny_tokenizer().save_pretrained(folder / "run")
    return trainer


def checked(trainer, folder, **settings):
    return check_reloaded(trainer, RunDirectory(folder / "run"), ModelArguments("m", **settings))


def change(file, name, by):
    """Add to one saved number of a weight."""
    weights = load_file(file)
    weights[name].view(-1)[0] += by
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("full", {}),
        ("full", {"bf16": True}),  # autocast
        ("full", {"dtype": torch.bfloat16}),
        ("lora", {}),
        ("lora", {"dtype": torch.bfloat16}),
        ("ppo", {}),
    ],
)
def test_what_was_saved_is_what_was_trained(kind, settings, tmp_path, capsys):
    trainer = trained(kind, tmp_path, **settings)
    capsys.readouterr()
    (found,) = checked(trainer, tmp_path)
    assert found.same and found.weights == {} and found.completions == (8 if kind == "ppo" else 16)
    assert found.difference < 1e-6
    assert "loaded again, is the model that was trained (log-probs of" in capsys.readouterr().out
    (told,) = json.loads((tmp_path / "run/reloaded.json").read_text())["folders"]
    assert told["same"] is True and told["tokens"] == found.tokens > 16


@pytest.mark.parametrize(
    ("kind", "file", "saved", "name"),
    [
        ("full", "model", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("ppo", "model", "model.norm.weight", "model.norm.weight"),
        (
            "lora",
            "adapter_model",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
            "model.layers.1.self_attn.q_proj.lora_B.default.weight",
        ),
    ],
)
def test_a_weight_that_was_saved_otherwise_is_named(kind, file, saved, name, tmp_path, capsys):
    trainer = trained(kind, tmp_path)
    change(tmp_path / f"run/{file}.safetensors", saved, 2.0)
    capsys.readouterr()
    (found,) = checked(trainer, tmp_path)
    assert not found.same and found.difference > 1e-3
    assert found.weights == {name: pytest.approx(2.0)}
    said = capsys.readouterr().out
    assert f"WARNING: {tmp_path / 'run'}, loaded again, is not the model that was trained" in said
    assert f"these weights differ: {name} (by 2)" in said
    assert json.loads((tmp_path / "run/reloaded.json").read_text())["folders"][0]["same"] is False


def test_a_difference_that_log_probs_do_not_show_is_named_too(tmp_path):
    trainer = trained("full", tmp_path)
    change(tmp_path / "run/model.safetensors", "model.layers.0.mlp.up_proj.weight", 1e-6)
    (found,) = checked(trainer, tmp_path)
    assert found.difference < 1e-4 and not found.same
    assert found.weights == {"model.layers.0.mlp.up_proj.weight": pytest.approx(1e-6, rel=0.1)}


def test_a_result_that_cannot_be_loaded_is_said_and_does_not_end_the_run(tmp_path, capsys):
    trainer = trained("full", tmp_path)
    (tmp_path / "run/model.safetensors").write_bytes(b"cut short")
    (found,) = checked(trainer, tmp_path)
    assert not found.same and found.difference is None
    assert "could not be loaded again to compare it" in capsys.readouterr().out


def test_the_merged_adapter_is_compared_too(tmp_path):
    trainer = trained("lora", tmp_path)
    write_merged(tmp_path / "run", ModelArguments(str(tmp_path / "base")))
    run, merged = checked(trainer, tmp_path, use_peft=True, merge_adapter=True)
    assert run.same and merged.same and merged.path.endswith("merged")
    assert 0 < merged.difference < 1e-5  # sums in another order
    change(tmp_path / "run/merged/model.safetensors", "model.layers.0.self_attn.q_proj.weight", 2.0)
    run, merged = checked(trainer, tmp_path, use_peft=True, merge_adapter=True)
    assert run.same and not merged.same
    assert merged.weights == {"model.layers.0.self_attn.q_proj.weight": pytest.approx(2.0)}


def test_without_rollouts_prompts_are_scored(tmp_path):
    trainer = trained("full", tmp_path, objective="expected_accuracy", per_device_train_batch_size=8)
    (found,) = checked(trainer, tmp_path)
    assert found.same and found.completions == 8


def test_the_last_metrics_of_training_are_measured_again(tmp_path, capsys):
    trainer = trained("full", tmp_path)
    prompts = build_prompts(ROWS, tiny_tokenizer())
    trainer.evaluator = ValidationEvaluator(prompts, tiny_tokenizer(), trainer.suite, max_new_tokens=6)
    trainer.evaluate()
    (found,) = checked(trainer, tmp_path)
    assert found.same and found.metrics > 4 and not found.changed
    assert f"{found.metrics} of {found.metrics} metrics of the last evaluation as logged" in capsys.readouterr().out
    last = [log for log in trainer.state.log_history if "eval_nll_per_token" in log][-1]
    assert last["step"] == 2
    last["eval_nll_per_token"] += 0.5
    (found,) = checked(trainer, tmp_path)
    assert not found.same and list(found.changed) == ["nll_per_token"]
    assert "these metrics differ: nll_per_token (" in capsys.readouterr().out
