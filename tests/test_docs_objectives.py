"""docs/objectives.md: every number that a run logs is explained there, and every flag it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_ppo import tiny_ppo
from tiny_task import save_model, tiny_trainer

from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import (
    EvaluationArguments,
    GRPOConfig,
    ModelArguments,
    PPOConfig,
    RejectionArguments,
    RewardArguments,
    RunArguments,
    SFTConfig,
    TrainingDataArguments,
)

PAGE = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
# What every trainer of transformers and TRL logs, and the page leaves to them.
GENERAL = {"loss", "grad_norm", "learning_rate", "epoch", "step", "step_time", "num_tokens", "total_flos", "train_loss"}


def explained(name: str) -> bool:
    table = PAGE.split("## What is logged")[1]
    names = re.findall(r"`([\w/*]+)`", table)
    patterns = [re.escape(n).replace("NAME", "[^/]+").replace(r"\*", ".*") for n in names]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def logged(trainer) -> set[str]:
    trainer.train()
    return {name for record in trainer.state.log_history for name in record if not name.startswith("train_")}


@pytest.mark.parametrize(
    "make, settings",
    [
        (tiny_trainer, {"advantage_baseline": "greedy", "reference_loss_coef": 0.1}),
        (tiny_trainer, {"objective": "reference_exact"}),
        (tiny_trainer, {"objective": "expected_accuracy", "per_device_train_batch_size": 8}),
        (tiny_trainer, {"objective": "max_rl", "max_rl_order": 4, "per_device_train_batch_size": 8}),
        (tiny_trainer, {"objective": "minimum_risk"}),
        (tiny_trainer, {"teacher_name_or_path": "teacher"}),
        (tiny_ppo, {"value_clip": 0.2, "num_iterations": 2, "target_kl": 0.001}),
        (tiny_ppo, {"critic": "shared", "num_generations": 2}),
    ],
)
def test_every_number_that_is_logged_is_explained(make, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "teacher")
    names = logged(make(tmp_path, **settings)) - GENERAL
    assert names
    assert sorted(name for name in names if not explained(name)) == []


def test_every_flag_that_the_page_names_exists():
    known: set[str] = set()
    for config in (GRPOConfig, PPOConfig, SFTConfig):
        more = [RejectionArguments] if config is SFTConfig else [EvaluationArguments, RewardArguments]
        parser = RecipeParser([TrainingDataArguments, *more, RunArguments, config, ModelArguments])
        known |= set(parser._option_string_actions)
    named = set(re.findall(r"--\w+", PAGE))
    assert len(named) > 20
    assert sorted(named - known) == []
