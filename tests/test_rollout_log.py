"""What a run writes of its rollouts."""

import json

import pytest
from tiny_task import tiny_trainer

from rlseq.errors import RewardError


def test_what_a_reward_says_beside_its_value_is_logged(tmp_path):
    def judged(completion):
        return len(completion) / 100, {"why": completion[:1], "doubt": float("nan"), "parts": (1, 2.5)}

    trainer = tiny_trainer(tmp_path, rewards=[judged], max_steps=1)
    trainer.train()
    (file,) = (tmp_path / "rollouts").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.name == "000001.jsonl" and len(rows) == 16
    for row in rows:
        assert row["details"] == {"judged": {"why": row["completion"][:1], "doubt": None, "parts": [1, 2.5]}}
        assert row["values"]["judged"] == len(row["completion"]) / 100


def test_a_step_with_too_many_failures_stops_before_anything_is_written(tmp_path):
    def broken(completion):
        raise KeyError("answer")

    trainer = tiny_trainer(tmp_path, rewards=[{"func": broken, "on_error": "abstain"}], max_steps=1)
    with pytest.raises(RewardError, match=r"broken.*16 of 16"):
        trainer.train()
    assert not (tmp_path / "rollouts").exists()
