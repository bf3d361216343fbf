"""The versions that pyproject.toml declares: each has a lowest, which `make floor` installs; settings fit them all."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rlseq.config.defaults import DefaultsMixin
from rlseq.config.training import GRPOConfig, SFTConfig

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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # of packages that are called otherwise


@pytest.mark.parametrize("dependency", DECLARED)
def test_each_dependency_has_a_lowest_version_and_imports_beside_the_others(dependency):
    name = re.fullmatch(r"([a-z0-9_-]+)>=[0-9.]+(,<[0-9.]+)?", dependency)[1]
    module = MODULES.get(name, name)
    assert importlib.import_module(module).__name__ == module


def modules_of(dependencies):
    names = [re.match(r"[A-Za-z0-9_-]+", dependency)[0] for dependency in dependencies]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported(file):
    """Packages that a file imports, at its top or inside a function; Python's own and rlseq are left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"rlseq"}


def test_every_import_is_declared():
    of_users = {"vllm", "inspect_ai"}  # imported where the user installed it: TRL's own extra, and who has .eval logs
    allowed = {
        "rlseq": modules_of(DECLARED + EXTRAS["tracking"]) | of_users,
        "rewards": modules_of(DECLARED + EXTRAS["text"] + EXTRAS["math"] + EXTRAS["judge"]),
        "recipes": modules_of(DECLARED + EXTRAS["g2p"]),
    }
    files = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in allowed}
    undeclared = {
        str(file.relative_to(ROOT)): sorted(names)
        for folder in files
        for file in files[folder]
        if (names := imported(file) - allowed[folder])
    }
    assert undeclared == {}
    used = set().union(*(imported(file) for folder in files for file in files[folder]))
    assert modules_of(DECLARED) - used == set()  # nothing is declared and not imported


def test_the_core_of_the_suite_is_files_that_are_there():
    names = re.search(r"^CORE := \$\(foreach name,([\w ]+),", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [name for name in names if len(list((ROOT / "tests").rglob(f"test_{name}.py"))) != 1] == []
    assert {"grpo", "sampler", "losses", "trl_seams"} <= set(names)
