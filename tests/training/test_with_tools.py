"""Evaluation rows answered with the tools or environment of training, before and after it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_environment import made

from rlseq.data.prompts import build_prompts
from rlseq.evaluation.settings import ContrastSettings
from rlseq.recipes.rollouts import compare_with_tools
from rlseq.training.run.directory import RunDirectory
from rlseq.training.trl.with_tools import rewards_with_tools

CHAT = [{"role": "user", "content": "Add."}]
HELD_OUT = [{"prompt": CHAT, "start": start, "notes": []} for start in (10, 20, 30, 40, 50)]


def measured(trainer):
    return rewards_with_tools(trainer, build_prompts(HELD_OUT, trainer.processing_class), seed=0)


def test_rows_meet_an_environment_of_their_own_and_the_rewards_of_training(tmp_path, monkeypatch):
    trainer, scripted = made(tmp_path, monkeypatch)
    found = measured(trainer)
    assert not trainer._metrics["eval"]  # else its lengths would stand in the log of the next evaluation
    # By hand: even places add 2, odd ones 4 and 1; four rows are sampled at a time, so the fifth is at place 0 again.
    totals = [10 + 2, 20 + 5, 30 + 2, 40 + 5, 50 + 2]
    assert found[:, 0].tolist() == pytest.approx([total / 10 for total in totals])  # environment_reward
    assert found[:, 1].tolist() == [1.0] * 5  # says_done
    assert found[:, 2].tolist() == pytest.approx([2 * total / 10 + 1 for total in totals])  # weights 2 and 1
    assert any("Add. Start: 50." in text for text in scripted.seen)


def test_measuring_changes_nothing_of_the_run(tmp_path, monkeypatch):
    def run(path, measures):
        trainer, _ = made(path, monkeypatch, max_steps=2, logging_steps=1)
        if measures:
            measured(trainer)
        state = torch.get_rng_state()
        trainer.train()
        if measures:
            measured(trainer)
        clock = ("runtime", "second", "step_time")
        log = [{k: v for k, v in x.items() if not any(c in k for c in clock)} for x in trainer.state.log_history]
        return trainer.model.state_dict(), log, (path / "rollouts/000002.jsonl").read_text(), state

    plain, seen = run(tmp_path / "plain", False), run(tmp_path / "measured", True)
    assert torch.equal(plain[3], seen[3]) and plain[1:3] == seen[1:3]
    assert all(torch.equal(seen[0][name], weight) for name, weight in plain[0].items())


def test_the_comparison_is_paired_by_row(tmp_path, capsys):
    """Of four rows two rise by 1 and two do not, so the mean rises by 1/2; a reward that abstains does not count."""
    trainer = SimpleNamespace(suite=SimpleNamespace(names=["right"]), is_world_process_zero=lambda: True)
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [float("nan"), 0.0]])
    after = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = compare_with_tools(trainer, RunDirectory(tmp_path), before, after, ContrastSettings(resamples=500))
    assert (found["right"]["before"], found["right"]["after"]) == (pytest.approx(1 / 3), 0.75)
    assert found["total"]["difference"] == 0.5 and found["total"]["ci95"][0] == 0
    assert found["total"]["p_value"] == pytest.approx(0.5, abs=0.1)  # 2 of the 4 signs of two rows
    told = json.loads((tmp_path / "evaluation/with_tools.json").read_text())
    assert told["rows"] == 4 and told["rewards"]["total"]["difference"] == 0.5
    said = capsys.readouterr().out
    assert "with tools, on 4 evaluation rows, total is 0.250 before and 0.750 after training: +0.500 (" in said
    assert compare_with_tools(trainer, RunDirectory(tmp_path), None, None, ContrastSettings()) == {}
