"""--dtype of an evaluation: its models are loaded in that precision, and the results say so."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model
from tiny_task import tiny_tokenizer

from rlseq.cli.evaluate import ARGUMENTS
from rlseq.cli.main import main
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
from rlseq.evaluation.measure import checkpoint
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.evaluation.measure.references import near_tie_of
from rlseq.recipes.rollouts import prepare

ROWS = [{"prompt": prompt, "references": [prompt[::-1]]} for prompt in ("a b", "b c d", "c", "d a")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("one", "two", "three")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def evaluated(place, out, models, *flags):
    named = [f"{name}={place / name}" for name in models]
    data = ["--dataset_name", str(place / "train.jsonl"), "--eval_split", "train", "--reward_funcs", "exact_match"]
    few = ["--strategies", "greedy", "--studies", "none", "--max_new_tokens", "3", "--resamples", "50"]
    assert main(["evaluate", "--models", *named, *data, *few, "--output_dir", str(out), *flags]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_models_are_loaded_in_the_dtype_that_the_results_name(place, tmp_path, monkeypatch, dtype):
    loaded = []

    def load(*given):
        loaded.append(load_checkpoint(*given))
        return loaded[-1]

    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    flags = [] if dtype == "float32" else ["--dtype", dtype]  # the default
    results = evaluated(place, tmp_path, ["one", "two"], *flags)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)  # as they were saved
    assert [{p.dtype for p in model.parameters()} for model in loaded] == [{expected}] * 2
    assert results["spec"]["settings"]["dtype"] == dtype


def test_rounding_changes_numbers_a_little(place, tmp_path):
    exact, rounded = (
        evaluated(place, tmp_path / dtype, ["one"], "--dtype", dtype)["models"]["one"]["likelihood"]["nll_per_token"]
        for dtype in ("float32", "bfloat16")
    )
    assert 1e-5 < abs(exact["value"] - rounded["value"]) < 0.05


def test_evaluations_in_one_dtype_are_joined_and_in_two_are_not(place, tmp_path, capsys):
    half = ["--dtype", "bfloat16"]
    together = evaluated(place, tmp_path / "all", ["one", "two", "three"], *half)
    for out, name, flags in (("a", "two", half), ("b", "three", half), ("c", "three", [])):
        evaluated(place, tmp_path / out, ["one", name], *flags)
    joined = ["evaluate", "--output_dir", str(tmp_path / "joined"), "--compare"]
    assert main([*joined, str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    results = json.loads((tmp_path / "joined" / "results.json").read_text())
    assert results["comparisons"] == together["comparisons"]
    capsys.readouterr()
    assert main([*joined, str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "settings.dtype is bfloat16 in the first and float32 in the second" in capsys.readouterr().err


def test_another_dtype_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match=r"--dtype: given 'bfloat'; expected .*bfloat16"):
        RecipeParser(ARGUMENTS).parse(["--dtype", "bfloat"])


def test_a_near_tie_is_what_two_logits_of_the_precision_may_differ_by():
    # bfloat16 keeps 8 bits: between 16 and 32 its numbers are 1/8 apart; float16 keeps 11 bits: 1/64
    assert torch.tensor(16.0, dtype=torch.bfloat16).nextafter(torch.tensor(32.0).bfloat16()).item() == 16 + 1 / 8
    assert near_tie_of(tiny_model().bfloat16()) == 2 / 8
    assert near_tie_of(tiny_model().half()) == 2 / 64
    assert near_tie_of(tiny_model()) == 1e-3


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--eval_dtype", "bfloat16"], "bfloat16")])
def test_the_evaluation_after_training_has_a_dtype_of_its_own(place, tmp_path, flags, dtype):
    groups = [TrainingDataArguments, RewardArguments, TrainingEvaluationArguments, RunArguments]
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
    data, rewards, evaluation, _, config, model_args = RecipeParser([*groups, GRPOConfig, ModelArguments]).parse(
        [*words, *flags]
    )
    prepared = prepare(data, rewards, evaluation, config, model_args)
    prepared.close()
    assert prepared.settings.dtype == dtype
