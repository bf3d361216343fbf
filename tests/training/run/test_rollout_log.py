"""What a run writes of its rollouts."""

import json

import pytest
from tiny_task import ROWS, tiny_trainer

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


def test_several_rounds_of_one_step_are_all_kept(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=2, per_device_train_batch_size=4, steps_per_generation=1, gradient_accumulation_steps=4
    )
    trainer.train()
    names = sorted(file.name for file in (tmp_path / "rollouts").iterdir())
    assert names[:4] == ["000001-1.jsonl", "000001-2.jsonl", "000001-3.jsonl", "000001.jsonl"]
    rows = [json.loads(line) for name in names for line in (tmp_path / "rollouts" / name).read_text().splitlines()]
    assert len(rows) == 2 * 16 and [row["step"] for row in rows] == [1] * 16 + [2] * 16


def test_the_loss_of_the_references_is_over_the_rows_that_have_them(tmp_path):
    some = [row | {"references": row["references"] if i % 2 else []} for i, row in enumerate(ROWS)]
    every = [row for i, row in enumerate(ROWS) if i % 2]

    def long(completion):
        return float(len(completion))

    settings = {"reference_loss_coef": 0.1, "num_generations": 2, "learning_rate": 0.0, "max_steps": 1}
    settings["rewards"] = [long]
    half = tiny_trainer(tmp_path / "half", rows=some, per_device_train_batch_size=16, **settings)
    whole = tiny_trainer(tmp_path / "whole", rows=every, per_device_train_batch_size=8, **settings)
    found = []
    for trainer in (half, whole):
        trainer.train()
        found.append(trainer.state.log_history[0]["reference_nll"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
