"""Prompts whose running mean reward is outside the bounds give way to others."""

from __future__ import annotations

import json
import math

import pytest
import torch
from forks import run_ranks
from tiny_task import ROWS, tiny_trainer

from rlseq.config.training import GRPOConfig
from rlseq.errors import ConfigError
from rlseq.training.selection.curriculum import OnlineCurriculum
from rlseq.training.selection.resampling import SparePrompts

PROMPTS = [row["prompt"] for row in ROWS]
REWARDS = dict(zip(PROMPTS, [0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5], strict=True))
OUTSIDE = {prompt for prompt, reward in REWARDS.items() if reward != 0.5}


def by_prompt(completion: str, prompt: str) -> float:
    """Its prompt's reward, and a difference between samples."""
    return REWARDS[prompt] + 1e-3 * (len(completion) % 2)


def asked(folder) -> list[list[str]]:
    """The prompts of each batch, sorted."""
    found = []
    for file in sorted((folder / "rollouts").glob("*.jsonl")):
        found.append(sorted({json.loads(line)["prompt"] for line in file.read_text().splitlines()}))
    return found


def curriculum(prompts: int = 6, low: float = 0.25, high: float = 0.75) -> OnlineCurriculum:
    return OnlineCurriculum([f"key-{i}" for i in range(prompts)], low, high, SparePrompts(prompts, seed=0))


def test_running_means_by_hand():
    one = curriculum()
    nan = math.nan
    one.record([3, 0, 5], torch.tensor([[0.0, 1.0], [0.25, nan], [nan, nan]]))
    assert one.means == {"key-3": 0.5, "key-0": 0.25}
    one.record([3, 0], torch.tensor([[1.0, 1.0], [nan, nan]]))
    assert one.means == {"key-3": 0.75, "key-0": 0.25}  # ½·0.5 + ½·1
    assert one.outside() == set()  # ends belong to the range
    one.record([3], torch.tensor([[1.0, 1.0]]))
    assert one.means["key-3"] == 0.875 and one.outside() == {3}


def test_unknown_prompts_are_neither_left_out_nor_preferred():
    one = curriculum()
    assert one.choose([4, 2]) == [4, 2]  # nothing is known
    one.record([4], torch.tensor([[1.0]]))
    first, second = one.choose([4, 2])
    assert first not in (2, 4) and second == 2
    one.record([0, 1, 3, 5], torch.tensor([[0.5], [1.0], [1.0], [0.0]]))
    assert one.choose([4, 2]) == [0, 2]  # the only one besides that is not outside
    assert one.choose([4, 0, 2]) == [4, 0, 2]  # none is left


def test_a_prompt_outside_is_sampled_again_after_it_gave_way_three_times():
    one = curriculum()
    one.record([4], torch.tensor([[1.0]]))
    assert [one.choose([4])[0] == 4 for _ in range(5)] == [False, False, False, True, True]
    one.record([4], torch.tensor([[1.0]]))
    assert one.choose([4]) != [4]
    one.record([4], torch.tensor([[0.0]]))  # the mean is ½ now
    assert one.choose([4]) == [4]


def test_the_state_goes_on():
    one, again = curriculum(), curriculum()
    one.record([4, 1], torch.tensor([[1.0], [0.0]]))
    one.choose([4, 1])
    again.load_state_dict(one.state_dict())
    again.spare.load_state_dict(one.spare.state_dict())
    assert [again.choose([4, 1]) for _ in range(6)] == [one.choose([4, 1]) for _ in range(6)]
    again.load_state_dict({})  # of a checkpoint of a run without a curriculum
    again.spare.load_state_dict({})
    assert again.choose([4, 1]) == [4, 1] and again.spare.taken == 0


SETTINGS = {"rewards": [by_prompt], "per_device_train_batch_size": 8, "max_steps": 12}  # 2 prompts a batch, 4 an epoch


def test_the_first_epoch_is_as_ever_and_later_ones_sample_what_lies_between(tmp_path):
    trainer = tiny_trainer(tmp_path / "on", **SETTINGS, online_curriculum="0.25-0.75")
    trainer.train()
    tiny_trainer(tmp_path / "off", **SETTINGS).train()
    on, off = asked(tmp_path / "on"), asked(tmp_path / "off")
    assert on[:4] == off[:4] and set().union(*on[:4]) == set(PROMPTS)
    assert OUTSIDE & set().union(*off[4:])
    assert not OUTSIDE & set().union(*on[4:])
    assert all(len(batch) == 2 for batch in on)
    shares = [line["frac_prompts_replaced"] for line in trainer.state.log_history if "loss" in line]
    assert shares == [len(OUTSIDE & set(batch)) / 2 * (i >= 4) for i, batch in enumerate(off)]


def test_discarded_groups_of_dynamic_sampling_count_too(tmp_path):
    def equal_for_some(completion: str, prompt: str) -> float:
        return (
            REWARDS[prompt]
            if prompt in OUTSIDE
            else REWARDS[prompt] + 0.01 * len(completion) + 1e-3 * hash_of(completion)
        )

    def hash_of(text: str) -> int:
        return sum(ord(c) * i for i, c in enumerate(text, start=1)) % 7

    settings = {**SETTINGS, "rewards": [equal_for_some], "max_steps": 4}
    trainer = tiny_trainer(tmp_path, **settings, online_curriculum="0.25-0.75", resample_equal_groups=8)
    trainer.train()
    known = trainer.batches.curriculum.means
    of_key = {prompt.key: prompt.prompt for prompt in trainer.prompts}
    met = {of_key[key]: mean for key, mean in known.items()}
    assert OUTSIDE & set(met)
    assert all(met[prompt] == REWARDS[prompt] for prompt in OUTSIDE & set(met))
    assert not OUTSIDE & set().union(*asked(tmp_path))


def test_two_processes_ask_the_prompts_of_one(tmp_path):
    def train(name, processes):
        settings = {**SETTINGS, "per_device_train_batch_size": 8 // processes, "learning_rate": 0.0, "max_steps": 8}
        tiny_trainer(tmp_path / name, **settings, online_curriculum="0.25-0.75").train()

    train("one", 1)
    run_ranks(2, lambda: train("two", 2), tmp_path / "log")
    assert asked(tmp_path / "one") == asked(tmp_path / "two")
    assert not OUTSIDE & set().union(*asked(tmp_path / "two")[4:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"online_curriculum": "0.9-0.1"},
            r"online_curriculum is '0\.9-0\.1'; expected two numbers, the smaller first",
        ),
        ({"online_curriculum": "often"}, "online_curriculum is 'often'; expected two numbers"),
        (
            {"online_curriculum": "0.1-0.9", "objective": "expected_accuracy"},
            "online_curriculum is 0.1-0.9, which has no effect without an objective that samples",
        ),
    ],
)
def test_what_it_cannot_serve_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
