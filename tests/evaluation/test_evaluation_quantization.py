"""--quantization and --eval_quantization: what an evaluation loads, says and refuses, on a CPU."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny import tiny_model
from tiny_task import tiny_tokenizer
from transformers import AutoModelForCausalLM

from rlseq.cli.evaluate import ARGUMENTS
from rlseq.cli.main import main
from rlseq.config.groups.adapters import quantization_note
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import (
    GRPOConfig,
    ModelArguments,
    RewardArguments,
    RunArguments,
    TrainingDataArguments,
    TrainingEvaluationArguments,
)
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.recipes.rollouts import prepare

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rlseq[quantization]'")
ROWS = [{"prompt": prompt, "references": [prompt[::-1]]} for prompt in ("a b", "b c d", "c", "d a")]
TRAINING = [
    TrainingDataArguments,
    RewardArguments,
    TrainingEvaluationArguments,
    RunArguments,
    GRPOConfig,
    ModelArguments,
]
QLORA = ["--use_peft", "true", "--load_in_4bit", "true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    for seed, name in enumerate(("one", "two")):
        tiny_model(seed=seed, **sizes).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def evaluated(place, out, *flags, model="one"):
    data = ["--dataset_name", str(place / "train.jsonl"), "--eval_split", "train", "--reward_funcs", "exact_match"]
    few = ["--strategies", "greedy", "--studies", "none", "--max_new_tokens", "3", "--resamples", "50"]
    named = ["--models", f"{model}={place / model}"]
    assert main(["evaluate", *named, *data, *few, "--output_dir", str(out), *flags]) == 0
    return json.loads((out / "results.json").read_text())


def nll(results, model="one"):
    return results["models"][model]["likelihood"]["nll_per_token"]["value"]


def test_four_bits_give_the_likelihood_of_the_weights_that_they_stand_for(place, tmp_path):
    exact, found = evaluated(place, tmp_path / "exact"), evaluated(place, tmp_path / "4bit", "--quantization", "4bit")
    plain = AutoModelForCausalLM.from_pretrained(place / "one")
    for name, module in plain.named_modules():
        if name.endswith("_proj"):
            packed, state = bitsandbytes.functional.quantize_4bit(module.weight.data, quant_type="nf4")
            module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state)
    plain.save_pretrained(place / "rounded")
    tiny_tokenizer().save_pretrained(place / "rounded")
    rounded = evaluated(place, tmp_path / "rounded", model="rounded")
    assert nll(found) == pytest.approx(nll(rounded, "rounded"), abs=1e-5)
    assert abs(nll(found) - nll(exact)) > 1e-3
    assert found["spec"]["settings"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert "All models, or the bases of adapters, are in 4 bits (--quantization)." in found["notes"]
    assert "quantization" not in exact["spec"]["settings"] and not any("bits" in note for note in exact["notes"])


def test_eight_bits_change_numbers_a_little(place, tmp_path):
    exact, found = evaluated(place, tmp_path / "exact"), evaluated(place, tmp_path / "8bit", "--quantization", "8bit")
    assert 1e-5 < abs(nll(found) - nll(exact)) < 0.05
    assert found["spec"]["settings"]["quantization"]["load_in_8bit"] is True


def test_evaluations_of_different_quantisation_are_not_joined(place, tmp_path, capsys):
    evaluated(place, tmp_path / "a")
    evaluated(place, tmp_path / "b", "--quantization", "4bit")
    capsys.readouterr()
    joined = ["evaluate", "--output_dir", str(tmp_path / "joined"), "--compare"]
    assert main([*joined, f"exact={tmp_path / 'a'}", f"four={tmp_path / 'b'}"]) == 2
    assert "settings.quantization" in capsys.readouterr().err


def asked(place, tmp_path, *flags):
    given = {
        "model_name_or_path": place / "one",
        "dataset_name": place / "train.jsonl",
        "eval_split": "train",
        "reward_funcs": "exact_match",
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 3,
        "dtype": "float32",
    }
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return RecipeParser(TRAINING).parse([*words, *flags])


@pytest.mark.parametrize(
    ("flags", "layer", "said"),
    [
        ([], "Linear", None),
        (QLORA, "Linear4bit", "the base in 4 bits, as training did"),
        ([*QLORA, "--eval_quantization", "4bit"], "Linear4bit", "the base in 4 bits, as training did"),
        ([*QLORA, "--eval_quantization", "none"], "Linear", "as they were saved, and training had them in 4 bits"),
        ([*QLORA, "--eval_quantization", "8bit"], "Linear8bitLt", "in 8 bits, and training had them in 4 bits"),
        (["--eval_quantization", "4bit"], "Linear4bit", "in 4 bits, and training had them as they were saved"),
    ],
)
def test_the_evaluation_after_training_loads_what_was_trained_or_what_is_asked(place, tmp_path, flags, layer, said):
    data, rewards, evaluation, _, config, model_args = asked(place, tmp_path, *flags)
    prepared = prepare(data, rewards, evaluation, config, model_args)
    prepared.close()
    settings = prepared.settings
    model = load_checkpoint("it", str(place / "one"), quantization=settings.quantization, dtype=settings.dtype)
    assert {type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")} == {layer}
    note = quantization_note(model_args, settings.quantization)
    assert note is None if said is None else said in note


def test_four_bit_layers_compute_in_the_dtype_of_the_evaluation(place, tmp_path):
    flags = ["--eval_quantization", "4bit", "--eval_dtype", "bfloat16"]
    data, rewards, evaluation, _, config, model_args = asked(place, tmp_path, *flags)
    prepared = prepare(data, rewards, evaluation, config, model_args)
    prepared.close()
    model = load_checkpoint("it", str(place / "one"), quantization=prepared.settings.quantization, dtype="bfloat16")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "groups"), [("--quantization", ARGUMENTS), ("--eval_quantization", TRAINING)], ids=["evaluate", "train"]
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(monkeypatch, name, groups):
    with pytest.raises(ConfigError, match=rf"{name}: given '2bit'; expected .*4bit"):
        RecipeParser(groups).parse([name, "2bit"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=f"{name}.* needs bitsandbytes, which is not installed"):
        RecipeParser(groups).parse([name, "4bit"])
    RecipeParser(groups).parse([name, "none"])
