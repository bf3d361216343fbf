"""The versions that pyproject.toml declares: each has a lowest, which `make floor` installs; settings fit them all."""

from __future__ import annotations

import importlib
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rlseq.training.config import DefaultsMixin, GRPOConfig, SFTConfig

ROOT = Path(__file__).parents[1]


@dataclass
class ArgumentsBefore5_23:
    """As in transformers 5.16 to 5.22: `gradient_checkpointing` is there and `activation_checkpointing` is not."""

    trust_remote_code: bool = False
    greater_is_better: bool | None = None
    fp16: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_steps: int = 1
    num_train_epochs: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        self.report_to = []


@dataclass
class OlderConfig(DefaultsMixin, ArgumentsBefore5_23):
    pass


@pytest.mark.parametrize("given", [True, False])
def test_settings_do_without_the_newer_name_of_checkpointing(given):
    config = OlderConfig(gradient_checkpointing=given)
    assert config.gradient_checkpointing is given
    assert not hasattr(config, "activation_checkpointing")


@pytest.mark.parametrize("kind", [GRPOConfig, SFTConfig])
@pytest.mark.parametrize("given", [True, False])
def test_checkpointing_is_the_same_under_each_name_that_transformers_has(kind, given, tmp_path):
    names = {"gradient_checkpointing", "activation_checkpointing"} & {field.name for field in fields(TrainingArguments)}
    for name in names:
        config = kind(output_dir=str(tmp_path), use_cpu=True, **{name: given})
        assert {other: getattr(config, other) for other in names} == dict.fromkeys(names, given)


DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("dependency", DECLARED)
def test_each_dependency_has_a_lowest_version_and_imports_beside_the_others(dependency):
    name = re.fullmatch(r"([a-z0-9_-]+)>=[0-9.]+(,<[0-9.]+)?", dependency)[1]
    module = {"pyyaml": "yaml"}.get(name, name)
    assert importlib.import_module(module).__name__ == module


def test_the_core_of_the_suite_is_files_that_are_there():
    names = re.search(r"^CORE := .*addsuffix \.py,(.+)\)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [name for name in names if not (ROOT / "tests" / f"test_{name}.py").exists()] == []
    assert {"grpo", "sampler", "losses", "trl_seams"} <= set(names)
