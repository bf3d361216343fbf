"""Environments that cannot serve, and settings that do not go with one: refused by name, before a model loads."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file
from test_environment import CHAT, Accumulator, says_done
from tiny_chat import chat_model, chat_tokenizer
from tiny_task import ROWS, tiny_tokenizer

from rlseq.config.training import GRPOConfig, ModelArguments, PPOConfig, RewardArguments, TrainingDataArguments
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError, TrainingError
from rlseq.scoring import load_rewards
from rlseq.training.environment import check_group_prompts, load_environment
from rlseq.training.run import recipe
from rlseq.training.tools import check_tools


class OneMore(Accumulator):
    """The accumulator, as of this file."""


def add(number: int) -> int:
    """Add one.

    Args:
        number: the number.
    """
    return number + 1


class NoReset:
    def act(self) -> str:
        """Act."""
        return ""


class AsyncReset(NoReset):
    async def reset(self):
        return None


class NothingToCall:
    def reset(self):
        return None

    def get_reward(self):
        return 1.0


class Untold(NothingToCall):
    def act(self, how):
        return how


class Quiet(NoReset):
    def reset(self, **_):
        return None


class Greedy(Quiet):
    def reset(self, starts):
        return None


class NeedsMore(Quiet):
    def __init__(self, size):
        self.size = size


class Fails(Quiet):
    def reset(self, start):
        raise KeyError("no such level")


class Numbers(Quiet):
    def reset(self):
        return 7


def single(kept=Quiet()):  # noqa: B008
    return kept


def slotted():
    return type("Slots", (), {"__slots__": (), "reset": Quiet.reset, "act": NoReset.act})()


def settings(**given):
    config = GRPOConfig(output_dir="x", num_generations=2, per_device_train_batch_size=2, use_cpu=True)
    for name, value in given.items():
        setattr(config, name, value)
    return config


def load(name, rewards=(says_done,), rows=CHAT, **given):
    environment = f"{__file__}:{name}" if name else None
    return load_environment(
        settings(environment=environment, **given), build_prompts(rows, chat_tokenizer()), load_rewards(list(rewards))
    )


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("Missing", "is not found: .*has no function 'Missing'"),
        ("NeedsMore", "cannot be made: TypeError: .*'size'"),
        ("NoReset", "no method reset"),
        ("AsyncReset", "no method reset"),
        ("NothingToCall", "no method that the model may call"),
        ("Untold", "act of .* does not tell a model how it is called: .* begins with _"),
        ("Greedy", "reset asks for 'starts', which is no column. Did you mean 'start'"),
        ("slotted", "with __slots__"),
        ("OneMore", "no reward asks for that: add environment_reward to reward_funcs"),
    ],
)
def test_an_environment_that_cannot_serve_is_refused_by_name(name, named):
    with pytest.raises(ConfigError, match=named):
        load(name)


def test_a_spec_without_a_name_is_refused():
    with pytest.raises(ConfigError, match=r"expected path/to/file\.py:name or package\.module:name"):
        load_environment(settings(environment="accumulator"), [], load_rewards([says_done]))


def test_its_reward_is_refused_where_nothing_gives_one():
    with pytest.raises(ConfigError, match=r"asks for environment_reward, but environment .* has no get_reward"):
        load("Quiet", rewards=["environment_reward"])
    with pytest.raises(ConfigError, match="asks for environment_reward, but no environment is named"):
        load(None, rewards=["environment_reward"])
    assert load(None) is None
    assert load(None, ["environment_reward"], rows=[{**CHAT[0], "environment_reward": 1.0}]) is None  # a column


def test_a_tool_and_a_method_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="add is both in tools and a method"):
        load("OneMore", rewards=["environment_reward"], tools=[f"{__file__}:add"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"objective": "minimum_risk"}, "objective"),
        ({"advantage_baseline": "greedy"}, "advantage_baseline greedy"),
        ({"reference_prefix": 1}, "reference_prefix"),
        ({"reference_loss_coef": 0.1}, "reference_loss_coef"),
        ({}, "a prompt is a text"),
    ],
)
def test_what_cannot_go_with_an_environment_is_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        check_tools(settings(environment="a:b", **given), build_prompts(ROWS, tiny_tokenizer()))


def test_a_critic_is_refused():
    config = PPOConfig(output_dir="x", environment="a:b", use_cpu=True)
    with pytest.raises(ConfigError, match="a critic"):
        check_tools(config, build_prompts(CHAT, chat_tokenizer()))


def test_an_object_that_is_given_twice_is_refused():
    factory = load("single")
    factory()
    with pytest.raises(ConfigError, match="gives one object twice"):
        factory()


def test_what_goes_wrong_in_a_rollout_names_its_prompt():
    prompts = build_prompts(CHAT, chat_tokenizer())
    environment = load("Fails")()
    with pytest.raises(TrainingError, match=f"reset raised KeyError: 'no such level', on prompt '{prompts[1].key}'"):
        environment.reset(prompt=CHAT[1]["prompt"], index=1)
    with pytest.raises(TrainingError, match=r"reset returned a int .*expected None, or a text"):
        load("Numbers")().reset(prompt=CHAT[0]["prompt"], index=0)


def test_a_vllm_server_is_refused_prompts_that_differ_within_a_group():
    check_group_prompts([0, 0, 1], ["a", "a", "b"])
    with pytest.raises(ConfigError, match="two rollouts of one prompt different texts"):
        check_group_prompts([0, 0, 1], ["a", "b", "b"])


@pytest.mark.parametrize(
    ("name", "eval_rewards", "evaluates", "named"),
    [
        ("NoReset", None, False, "no method reset"),
        ("OneMore", None, True, "evaluation samples without the environment"),
        ("OneMore", ["environment_reward"], True, "evaluation samples without the environment"),
        ("OneMore", None, False, None),
        ("OneMore", [f"{__file__}:says_done"], True, None),
    ],
)
def test_a_recipe_refuses_before_a_model_loads(name, eval_rewards, evaluates, named, tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    chat_model(tokenizer).config.save_pretrained(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors")  # no weights: loading it would fail
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    data = TrainingDataArguments(dataset_name=str(tmp_path / "rows.jsonl"), eval_split="train")
    rewards = RewardArguments(reward_funcs=["environment_reward"], eval_reward_funcs=eval_rewards)
    model = ModelArguments(model_name_or_path=str(tmp_path / "model"))

    def prepare():
        return recipe.load_task(data, rewards, model, settings(environment=f"{__file__}:{name}"), evaluates=evaluates)

    if named is None:
        prepare().close()
    else:
        with pytest.raises(ConfigError, match=named):
            prepare()
