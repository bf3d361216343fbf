"""Rewards that run in processes of their own score while the reference model does."""

from __future__ import annotations

import time

import pytest
from tiny_ppo import saved_model
from tiny_task import shares_letters, tiny_trainer

from rlseq import load_rewards
from rlseq.errors import RewardError
from rlseq.types import Rollout

MODULE = """
from pathlib import Path
CALLS = Path({calls!r})

def length(completion):
    with CALLS.open("a") as file:
        file.write("called\\n")
    if completion == "raise":
        raise ValueError("cannot read this")
    return float(len(completion))
"""


@pytest.fixture
def length(tmp_path):
    """The address of a reward, and the file in which it leaves a line a call."""
    calls = tmp_path / "calls"
    (tmp_path / "lengths.py").write_text(MODULE.format(calls=str(calls)))
    return f"{tmp_path / 'lengths.py'}:length", calls


def rollouts(*texts):
    return [Rollout(f"row-{i}", 0, (1,), (True,), (-0.5,), x, x, None, "stop", "sample") for i, x in enumerate(texts)]


def called(path, lines, seconds=60):
    """Whether the file has N lines, waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file() and len(path.read_text().splitlines()) >= lines:
            return True
        time.sleep(0.02)
    return False


def test_a_submitted_reward_is_waited_for_and_not_called_again(length):
    address, calls = length
    sampled, columns = rollouts("a", "bcd", "ef"), {"prompt": ["q"] * 3, "references": [["a"]] * 3}
    with load_rewards([{"func": address, "workers": 1}, shares_letters]) as suite:
        pending = suite.submit(sampled, columns)
        assert list(pending.outcomes) == ["length"]  # what runs in this process does not run twice at a time
        assert called(calls, 3)
        table = suite.score(sampled, columns, pending=pending)
        assert len(calls.read_text().splitlines()) == 3
        assert table.values["length"] == [1.0, 3.0, 2.0]
        assert table.values["shares_letters"] == pytest.approx([0.9, -0.1, -0.1])
        other = rollouts("wxyz", "a", "b")
        assert suite.score(other, columns, pending=pending).values["length"] == [
            4.0,
            1.0,
            1.0,
        ]  # it was of other rollouts


SLOW_TO_LOAD = """
import os
import time
time.sleep(1)

def process(completion):
    time.sleep(0.2)
    return float(os.getpid())
"""


@pytest.mark.parametrize("options", [{"workers": 2}, {"timeout": 30}])
def test_workers_that_scored_a_step_in_the_background_serve_the_next(tmp_path, options):
    (tmp_path / "slow.py").write_text(SLOW_TO_LOAD)
    sampled, columns, ids = rollouts("a", "b", "c"), {"prompt": ["q"] * 3}, set()
    with load_rewards([{"func": f"{tmp_path / 'slow.py'}:process", **options}]) as suite:
        for _ in range(3):
            ids.update(suite.score(sampled, columns, pending=suite.submit(sampled, columns)).totals)
            time.sleep(0.1)  # a worker that was to be killed is
    assert len(ids) <= 2


def test_an_error_in_the_background_is_raised_where_the_scores_are_asked_for(length):
    address, _ = length
    sampled, columns = rollouts("a", "raise"), {"prompt": ["q"] * 2}
    with load_rewards([{"func": address, "workers": 1, "on_error": "raise"}]) as suite:
        pending = suite.submit(sampled, columns)
        with pytest.raises(RewardError, match="cannot read this"):
            suite.score(sampled, columns, pending=pending)


@pytest.mark.parametrize("rlseq_sampler", [True, False])
def test_a_trainer_scores_by_the_reference_model_while_rewards_are_at_work(tmp_path, length, rlseq_sampler):
    address, calls = length
    model = saved_model(tmp_path / "model")  # from where the reference is loaded, too
    settings = {"model": model, "beta": 0.1, "max_steps": 1, "rlseq_sampler": rlseq_sampler}
    trainer = tiny_trainer(tmp_path, rewards=[{"func": address, "workers": 2}], **settings)
    score, meanwhile = trainer.forward.scores, []

    def only_once_rewards_are_done(*args, **kwargs):
        meanwhile.append(called(calls, 16))  # in turns, this would wait in vain
        return score(*args, **kwargs)

    trainer.forward.scores = only_once_rewards_are_done
    trainer.train()
    trainer.suite.close()
    assert meanwhile and all(meanwhile)
    assert len(calls.read_text().splitlines()) == 16  # once a completion
