"""Dynamic sampling: groups whose samples earned the same give way to other prompts'."""

from __future__ import annotations

import json

import pytest
import torch
from forks import run_ranks
from tiny_task import ROWS, tiny_trainer

import rlseq
from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError
from rlseq.training.selection.resampling import SparePrompts, equal_groups

EQUAL = {row["prompt"] for row in ROWS[:6]}  # prompts whose samples all earn the same


def uneven(completion: str, prompt: str) -> float:
    """What tells samples apart for two prompts of eight."""
    return 1.0 if prompt in EQUAL else float(len(completion)) + 0.1 * sum(map(ord, completion))


def rounds(folder):
    """The logged rollouts, batch by batch: (prompt, sample) -> (completion, total)."""
    for file in sorted((folder / "rollouts").glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        yield {(r["prompt"], r["sample"]): (r["completion"], r["total"]) for r in records}


def test_a_group_is_equal_where_no_two_rewards_given_differ():
    nan = float("nan")
    rewards = torch.tensor(
        [[0.1 + 0.2, 0.3, 0.3], [0.0, 1e-3, 0.0], [nan, 0.5, 0.5], [nan, nan, nan], [1e9, 1e9 + 64, 1e9], [nan, 1, 2]],
        dtype=torch.float64,
    )
    assert rewards[0, 0] != rewards[0, 1]
    assert equal_groups(rewards).tolist() == [True, False, True, True, True, False]


def test_spare_prompts_come_once_a_pass_in_an_order_of_their_own():
    spare = SparePrompts(7, seed=3)
    first, second = ([spare.take(1, besides=()) for _ in range(7)] for _ in range(2))
    assert sorted(first) == sorted(second) == [[i] for i in range(7)]
    assert first != second
    assert spare.take(9, besides={0, 1}) and set(spare.take(9, besides={0, 1})) == {2, 3, 4, 5, 6}
    assert spare.take(1, besides=range(7)) == []


def test_spare_prompts_go_on_where_they_were():
    spare, again = SparePrompts(7, seed=3), SparePrompts(7, seed=3)
    spare.take(10, besides=())
    again.load_state_dict(spare.state_dict())
    assert [again.take(2, besides={4}) for _ in range(5)] == [spare.take(2, besides={4}) for _ in range(5)]


def test_equal_groups_give_way_until_none_is_left_or_no_prompt(tmp_path):
    settings = {"per_device_train_batch_size": 8, "rewards": [uneven], "max_steps": 4}  # two prompts a batch
    plain = tiny_trainer(tmp_path / "plain", **settings)
    plain.train()
    trainer = tiny_trainer(tmp_path / "resampled", resample_equal_groups=8, **settings)
    trainer.train()
    for batch in rounds(tmp_path / "resampled"):
        assert len(batch) == 8
        assert {prompt for prompt, _ in batch}.isdisjoint(EQUAL)
    assert any(prompt in EQUAL for batch in rounds(tmp_path / "plain") for prompt, _ in batch)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["frac_reward_zero_std"] == 0 for line in lines)
    assert sum(line["discarded_rollouts"] for line in lines) > 0
    of_plain = [line["reward"] for line in plain.state.log_history if "loss" in line]
    assert lines[0]["reward_first_round"] == pytest.approx(of_plain[0])  # the same first round


def test_a_prompt_that_takes_a_place_is_sampled_as_it_would_be_anywhere(tmp_path):
    trainer = tiny_trainer(
        tmp_path, rewards=[uneven], per_device_train_batch_size=8, max_steps=1, resample_equal_groups=8, learning_rate=0
    )
    model, tokenizer = trainer.model, trainer.processing_class
    trainer.train()
    (batch,) = rounds(tmp_path)
    by_text = {prompt.prompt: prompt for prompt in trainer.prompts}
    for prompt in {prompt for prompt, _ in batch}:
        (group,) = rlseq.sample(
            model,
            [by_text[prompt]],
            num_samples=4,
            max_new_tokens=6,
            strategy=Sample(temperature=1.0),
            seed=trainer.args.seed,
            stop_ids=trainer.eos_token_ids,
            tokenizer=tokenizer,
        )
        assert [batch[prompt, i] for i in range(4)] == [
            (one.text, pytest.approx(uneven(one.text, prompt))) for one in group
        ]


def test_at_most_so_many_times_and_what_is_left_stays(tmp_path):
    trainer = tiny_trainer(
        tmp_path, rewards=["constant"], per_device_train_batch_size=8, max_steps=1, resample_equal_groups=2
    )
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["discarded_rollouts"] == 2 * 8
    assert line["frac_groups_resampled"] == line["frac_reward_zero_std"] == 1
    (batch,) = rounds(tmp_path)
    assert len({prompt for prompt, _ in batch}) == 2


def test_two_processes_ask_the_prompts_of_one(tmp_path):
    def train(name, processes):
        trainer = tiny_trainer(
            tmp_path / name,
            rewards=[uneven],
            per_device_train_batch_size=16 // processes,
            max_steps=3,
            resample_equal_groups=3,
        )
        trainer.train()

    train("one", 1)
    run_ranks(2, lambda: train("two", 2), tmp_path / "log")
    one, two = ([set(batch.items()) for batch in rounds(tmp_path / name)] for name in ("one", "two"))
    assert one[0] == two[0]  # later batches are of weights that differ in rounding
    assert [{prompt for (prompt, _), _ in batch} for batch in one] == [
        {prompt for (prompt, _), _ in batch} for batch in two
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage_baseline": "greedy"}, "advantage_baseline mean"),
        ({"objective": "expected_accuracy", "num_generations": 1}, "advantage_baseline mean"),
        ({"use_transformers_continuous_batching": True}, "rlseq's sampler"),
    ],
)
def test_what_it_cannot_serve_is_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny_trainer(tmp_path, resample_equal_groups=1, **settings)


def test_parts_of_groups_on_a_process_are_refused(tmp_path):
    def refuse():
        with pytest.raises(ConfigError, match="whole groups"):
            tiny_trainer(tmp_path, resample_equal_groups=1, per_device_train_batch_size=2)

    run_ranks(2, refuse, tmp_path / "log")


def test_what_a_reward_logs_of_each_rollout_follows_it(tmp_path):
    def logs(completions, prompts, log_extra, **_):
        log_extra("seen", [f"{prompt} {completion}" for prompt, completion in zip(prompts, completions, strict=True)])
        pairs = zip(completions, prompts, strict=True)
        return [uneven(completion, prompt) for completion, prompt in pairs]

    trainer = tiny_trainer(
        tmp_path,
        rewards=[logs],
        per_device_train_batch_size=8,
        max_steps=1,
        resample_equal_groups=8,
        log_completions=True,
    )
    trainer.train()
    shown = trainer.tracking.completions
    assert shown.extra["seen"] == [f"{p} {c}" for p, c in zip(shown.prompts, shown.completions, strict=True)]
    assert set(shown.prompts).isdisjoint(EQUAL)
