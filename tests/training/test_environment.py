"""Environments that the model acts in while it answers: their state, their words and their reward."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_chat import chat_model, chat_tokenizer, scripted_trainer

from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.errors import RewardError
from rlseq.scoring import load_rewards
from rlseq.training.environment import environment_rewards, load_environment

CHAT = [
    {"prompt": [{"role": "user", "content": "Add."}], "start": 3, "notes": ["a"]},
    {"prompt": [{"role": "user", "content": "Add."}], "start": 5, "notes": ["b"]},
]
ANSWER = "Done.<eos>"


class Accumulator:
    """A calculator with a memory."""

    def __init__(self):
        self.total, self.episodes, self.given = None, 0, None

    def reset(self, prompt, start, notes, scale=10):
        self.given = {"prompt": prompt, "notes": list(notes)}
        notes.clear()  # what it is given is its own
        self.total, self.scale = start, scale
        self.episodes += 1
        return f" Start: {start}."

    def add(self, number: int) -> int:
        """Add to what is there.

        Args:
            number: what to add.
        """
        self.total += number
        return self.total

    def get_reward(self):
        return self.total / self.scale


class AsyncAccumulator(Accumulator):
    async def add(self, number: int) -> int:
        """Add to what is there.

        Args:
            number: what to add.
        """
        return Accumulator.add(self, number)

    async def get_reward(self):
        return Accumulator.get_reward(self)


def halve(number: int) -> float:
    """Halve a number.

    Args:
        number: the number.
    """
    return number / 2


def says_done(completion: str) -> float:
    return float("Done" in completion)


def call(number: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"number": {number}}}}}\n</tool_call><eos>'


def turn(row, text):
    """Even samples add 2; odd ones add 4, then 1; then they answer."""
    results = text.count("<tool_response>")
    odd = call(4) in text if results else row % 2
    return call(4 if odd else 2) if not results else call(1) if odd and results == 1 else ANSWER


def made(path, monkeypatch, name="Accumulator", **settings):
    """A trainer on the accumulator, two samples of two prompts a step, and its scripted generation."""
    defaults = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 600}
    return scripted_trainer(
        path,
        monkeypatch,
        turn,
        rows=CHAT,
        rewards=({"func": "environment_reward", "weight": 2.0}, says_done),
        environment=f"{__file__}:{name}",
        **{**defaults, **settings},
    )


def result(text: str) -> str:
    """What Qwen3's template puts between two turns of the model, by hand."""
    return f"<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["Accumulator", "AsyncAccumulator"])
def test_each_rollout_has_an_environment_of_its_own_and_earns_what_that_says(name, tmp_path, monkeypatch):
    trainer, scripted = made(tmp_path, monkeypatch, name, max_steps=2, logging_steps=1, log_completions=True)
    trainer.train()
    assert len({id(one) for one in trainer.environments}) == 4
    assert all(one.episodes == 2 for one in trainer.environments)  # made once, reset before each rollout
    decode = trainer.processing_class.decode
    wanted = {  # (start, sample): the turns of the model, the results between them, 1/10 of the last total
        (3, 0): ([call(2), ANSWER], ["5"], 0.5),
        (3, 1): ([call(4), call(1), ANSWER], ["7", "8"], 0.8),
        (5, 0): ([call(2), ANSWER], ["7"], 0.7),
        (5, 1): ([call(4), call(1), ANSWER], ["9", "10"], 1.0),
    }
    met = set()
    for row, environment, scored in zip(trainer.batch.rows, trainer.environments, trainer.batch.scored, strict=True):
        given, rollout = CHAT[row["index"]], scored.rollout
        assert environment.given == {"prompt": given["prompt"], "notes": given["notes"]}
        turns, results, value = wanted[given["start"], rollout.sample]
        met.add((given["start"], rollout.sample))
        chosen = list(zip(rollout.completion_ids, rollout.loss_mask, strict=True))
        assert decode([i for i, trained in chosen if trained]) == "".join(turns)
        others = decode([i for i, trained in chosen if not trained])
        assert others == "".join(map(result, results))
        roles = ["assistant", *["tool", "assistant"] * len(results)]
        assert [message["role"] for message in rollout.messages] == roles
        assert [message["content"] for message in rollout.messages if message["role"] == "tool"] == results
        assert rollout.text == "Done." and rollout.finish_reason == "stop"
        assert scored.values == {"environment_reward": value, "says_done": 1.0}
        assert scored.total == pytest.approx(2 * value + 1)
    assert met == set(wanted)
    # The model is told of the method it may call, and of what `reset` said; not of what is the trainer's.
    first = scripted.seen[:4]
    assert sorted(text.split("Add.")[-1].split("<")[0] for text in first) == [" Start: 3."] * 2 + [" Start: 5."] * 2
    assert all('"name": "add"' in text and "get_reward" not in text and "reset" not in text for text in first)
    # Its reward is a reward as any other: one series, weighed, in the log, the table and the rollouts.
    assert trainer.reward_func_names == ["environment_reward", "says_done"] and len(trainer.reward_funcs) == 2
    for line in [line for line in trainer.state.log_history if "reward" in line]:
        assert line["rewards/environment_reward/mean"] == pytest.approx((0.5 + 0.8 + 0.7 + 1.0) / 4)
        assert line["reward"] == pytest.approx(2 * 0.75 + 1)
        assert line["tools/call_frequency"] == 6 / 4 and line["tools/failure_frequency"] == 0
    assert sorted(trainer.tracking.completions.rewards["environment_reward"]) == pytest.approx([0.5, 0.7, 0.8, 1.0])
    for step in ("000001", "000002"):
        records = [json.loads(line) for line in (tmp_path / "rollouts" / f"{step}.jsonl").read_text().splitlines()]
        said = {(one["prompt"][-1]["content"], one["sample"]): one["values"]["environment_reward"] for one in records}
        assert said == {(f"Add. Start: {start}.", sample): value for (start, sample), (*_, value) in wanted.items()}
    assert CHAT[0]["notes"] == ["a"] and trainer.prompts[0].columns["notes"] == ["a"]


def test_what_the_environment_says_is_never_trained(tmp_path, monkeypatch):
    trainer, _ = made(tmp_path, monkeypatch, max_steps=1)
    batches, compute = [], trainer.micro_batch_loss

    def remember(model, batch):
        batches.append(batch)
        return compute(model, batch)

    trainer.micro_batch_loss = remember
    trainer.train()
    (batch,) = batches
    rows = zip(batch.completion_ids, batch.mask.tolist(), strict=True)
    trained = sorted(trainer.processing_class.decode([*itertools.compress(ids, kept)]) for ids, kept in rows)
    assert trained == sorted([call(2) + ANSWER, call(4) + call(1) + ANSWER] * 2)
    found, score = [], trainer.forward.scores

    def remember_logprobs(*args, **options):
        scores = score(*args, **options)
        found.append(scores.logprobs)
        scores.logprobs.retain_grad()
        return scores

    trainer.forward.scores = remember_logprobs
    trainer.model.train()
    compute(trainer.model, batch).backward()
    assert torch.equal(found[0].grad != 0, batch.mask)


def test_an_environment_and_tools_may_both_be_called(tmp_path, monkeypatch):
    trainer, scripted = made(tmp_path, monkeypatch, max_steps=1, tools=[f"{__file__}:halve"])
    trainer.train()
    assert all('"name": "add"' in text and '"name": "halve"' in text for text in scripted.seen)
    assert trainer.forward.longest is None  # a prompt's own length says nothing of the one that the model reads


def test_a_run_resumed_between_rollouts_is_the_undisturbed_one(tmp_path, monkeypatch):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}

    def run(path, checkpoint=None):
        trainer, _ = made(path, monkeypatch, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model.state_dict(), (path / "rollouts" / "000003.jsonl").read_text()

    weights, rollouts = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    start = chat_model(chat_tokenizer()).state_dict()
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    resumed, same = run(tmp_path / "again", str(tmp_path / "again" / "checkpoint-1"))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights) and rollouts == same


def lost_count(_):
    raise ValueError("lost count")


def test_an_error_of_get_reward_is_no_zero(tmp_path, monkeypatch):
    trainer, _ = made(tmp_path, monkeypatch, max_steps=1)
    monkeypatch.setattr(type(trainer._environment_pool[None][0]), "get_reward", lost_count)
    with pytest.raises(RewardError, match=r"get_reward raised ValueError: lost count, on prompt .*, sample 0"):
        trainer.train()
    assert environment_rewards([object()], [], None) == environment_rewards(None, [], None) == {}


def test_the_bundled_reward_returns_what_the_environment_said():
    (reward,) = load_rewards(["environment_reward"]).rewards
    assert reward.function("x", 0.25) == 0.25 and reward.function("x") is None
    assert list(inspect.signature(reward.function).parameters) == ["completion", "environment_reward"]


def test_the_page_shows_an_environment_as_it_is(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("## Environments")[1]
    (tmp_path / "game.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    rows = [{**CHAT[0], "secret": 4}]
    config = GRPOConfig(output_dir="x", environment=str(tmp_path / "game.py:Guess"), use_cpu=True)
    make = load_environment(config, build_prompts(rows, chat_tokenizer()), load_rewards(["environment_reward"]))
    game, other = make(), make()
    for one in (game, other):
        assert one.reset(prompt=CHAT[0]["prompt"], index=0) == " It is between 1 and 9."
    assert [game.guess(number) for number in (2, 9, 4)] == ["higher", "lower", "right"]
    assert game.get_reward() == 1 / 3 and other.get_reward() == 0
