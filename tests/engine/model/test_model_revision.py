"""--model_revision: tokenizer, weights and the base of the contrast are all of that revision."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import constants
from test_dry_run import run
from tiny import tiny_model
from tiny_task import tiny_tokenizer, write_data
from transformers import AutoModelForCausalLM

from rlseq.config.training import ModelArguments
from rlseq.errors import ConfigError


def test_the_base_of_the_contrast_and_the_tokenizer_are_of_the_revision(tmp_path, monkeypatch):
    """A hub cache with two revisions of a model: main ends completions by another token, and has other weights."""
    repository = tmp_path / "hub/models--me--speller"
    for revision, seed, eos in (("old", 0, "<eos>"), ("main", 1, "<unk>")):
        snapshot = repository / "snapshots" / (str(seed) * 40)
        tiny_model(seed=seed, initializer_range=0.1).save_pretrained(snapshot)
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(str(seed) * 40)
    write_data(tmp_path / "data")
    flags = ["--model_name_or_path", "me/speller", "--model_revision", "old", "--dataset_name", tmp_path / "data"]
    flags += ["--reward_funcs", "exact_match", "--learning_rate", 0, "--max_steps", 1, "--save_strategy", "no"]
    flags += ["--per_device_train_batch_size", 8, "--max_completion_length", 6, "--strategies", "greedy"]
    flags += ["--studies", "none", "--resamples", 100, "--use_cpu", "true", "--disable_tqdm", "true"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(monkeypatch, "grpo", *flags, "--output_dir", tmp_path / "run") == 0
    saved = json.loads((tmp_path / "run/tokenizer_config.json").read_text())
    assert saved["eos_token"] == "<eos>"
    old, result = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (repository / "snapshots" / ("0" * 40), tmp_path / "run")
    )
    assert all(torch.equal(old[name], result[name]) for name in old)  # nothing was learnt
    models = json.loads((tmp_path / "run/evaluation/results.json").read_text())["models"]
    base, rl = (models[name]["likelihood"]["nll_per_token"]["value"] for name in ("base", "rl"))
    assert base == pytest.approx(rl, rel=1e-6)


def test_an_adapter_on_a_revision_is_refused_since_its_folder_would_not_name_it(tmp_path):
    with pytest.raises(ConfigError, match="an adapter's folder names its base without one"):
        ModelArguments(model_name_or_path="me/speller", model_revision="old", use_peft=True)
    ModelArguments(model_name_or_path=str(tmp_path), model_revision="old", use_peft=True)
