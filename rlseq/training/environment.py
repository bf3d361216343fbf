"""Environments: objects with a state, one a rollout, whose methods the model calls while it answers.

TRL makes them (`environment_factory`), resets them before a rollout and runs the calls. Two things it does otherwise
than rlseq needs, and both are mended here: the trainer's rows lack the columns that `reset` asks for, and a reward of
the environment's own (`get_reward`) would go into TRL's list of rewards instead of the suite. It becomes the column
`environment_reward` of a rollout, which a reward asks for by name; the bundled reward of that name returns it.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlseq.errors import ConfigError, RewardError, TrainingError, did_you_mean
from rlseq.scoring import RewardSuite
from rlseq.scoring.signatures import Parameters, parameters_of
from rlseq.training.tools import check_schema, find_callable, load_tools
from rlseq.types import Prompt, Rollout, column_names

COLUMN = "environment_reward"
OWN = ("reset", "get_reward")  # what the trainer calls, and the model may not


def load_environment(config: Any, prompts: Sequence[Prompt], suite: RewardSuite) -> Callable[[], Any] | None:
    """Find and check the environment that the settings name, and return what makes one for TRL.

    One is made at once, to be looked at; it is the first that the result gives. `reset` of what it makes takes a row
    of `training_rows`, and gives the environment's own `reset` what it asks for by name: the prompt, and the columns
    of its row.

    Args:
        config: `environment` is `package.module:name` or `path/to/file.py:name`, of a class or a function that is
            called without arguments; `tools` may be called beside its methods.
        prompts: what is trained on.
        suite: the rewards.

    Returns:
        The factory, or None where no environment is named.

    Raises:
        ConfigError: it is not found or cannot be made; it has no `reset`, or none that these rows can be given to; a
            method does not say how it is called; or its own reward and the suite do not go together.
    """
    spec = config.environment
    if spec is None:
        _check_reward(suite, prompts, False)
        return None
    factory = find_callable("environment", spec)
    first = _make(spec, factory)
    members = _members(first)
    name = f"environment {spec!r}"
    if "reset" not in members or inspect.iscoroutinefunction(members["reset"]):
        raise ConfigError(
            f"{name} makes a {type(first).__name__} with no method reset (async will not do); expected one, which is "
            "called before each rollout with columns of the prompt's row, and returns None or a text that is added to "
            "the prompt."
        )
    if not hasattr(first, "__dict__"):
        raise ConfigError(f"{name} makes a {type(first).__name__} with __slots__, which is not served; leave them out.")
    methods = callable_methods(first)
    if not methods:
        raise ConfigError(f"{name} has no method that the model may call: none beside reset and get_reward is public.")
    for method in methods:
        hint = "A method that the model is not to call has a name that begins with _."
        check_schema(f"environment: {method.__name__} of {spec!r}", method, hint)
    twice = {method.__name__ for method in methods} & {tool.__name__ for tool in load_tools(config.tools or [])}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is both in tools and a method of {name}: rename one.")
    asked = parameters_of(first.reset)
    row = column_names(prompts)
    missing = [p for p in asked.required if p not in row]
    if missing:
        raise ConfigError(
            f"{name}: reset asks for {', '.join(map(repr, missing))}, which is no column."
            f"{did_you_mean(missing[0], row)} The columns are {', '.join(row)}."
        )
    _check_reward(suite, prompts, "get_reward" in members, name)
    return _reset_by_row(name, factory, first, asked, prompts)


def callable_methods(environment: Any) -> list[Callable]:
    """The methods of an environment that the model may call."""
    return [getattr(environment, name) for name in _members(environment) if name not in OWN and name[0] != "_"]


def check_measured(config: Any, suite: RewardSuite, eval_suite: RewardSuite | None) -> None:
    """Refuse to evaluate by the environment's own reward: evaluation samples without an environment.

    Raises:
        ConfigError: it is to be measured, or nothing else is.
    """
    asking = _asking(eval_suite if eval_suite is not None else suite)
    if config.environment is not None and asking:
        raise ConfigError(
            f"evaluation samples without the environment, so {', '.join(asking)} would have nothing to say there: give "
            "--eval_reward_funcs what else is to be measured, or --evaluate false (and --eval_strategy no)."
        )


def environment_rewards(
    environments: Sequence[Any] | None, rollouts: Sequence[Rollout], loop: asyncio.AbstractEventLoop | None
) -> dict[str, list[Any]]:
    """What N environments say of the N rollouts that were made in them, as the column `environment_reward`.

    Args:
        environments: one a rollout, or None.
        rollouts: for the error message.
        loop: where an async `get_reward` runs, beside the async methods that the model called.

    Returns:
        {"environment_reward": N values}, as `get_reward` gave them; nothing where there is none.

    Raises:
        RewardError: one raised.
    """
    if not environments or "get_reward" not in _members(environments[0]):
        return {}
    if inspect.iscoroutinefunction(environments[0].get_reward):

        async def all_of() -> list[Any]:
            return await asyncio.gather(*(one.get_reward() for one in environments), return_exceptions=True)

        values = asyncio.run_coroutine_threadsafe(all_of(), loop).result()
    else:
        values = [_value_or_error(one.get_reward) for one in environments]
    for rollout, value in zip(rollouts, values, strict=True):
        if isinstance(value, Exception):
            raise RewardError(
                f"the environment's get_reward raised {type(value).__name__}: {value}, on prompt "
                f"{rollout.prompt_key!r}, sample {rollout.sample}. Return None where there is nothing to say."
            ) from value
    return {COLUMN: values}


def check_group_prompts(rows: Sequence[int], prompts: Sequence[Any]) -> None:
    """Refuse prompts that `reset` made unequal, where a generator samples a group from the prompt of its first rollout.

    Args:
        rows: of each rollout, the index of its prompt.
        prompts: of each rollout, as the environment left it.

    Raises:
        ConfigError: two rollouts of one prompt have different ones.
    """
    seen: dict[int, Any] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        if seen.setdefault(row, prompt) != prompt:
            raise ConfigError(
                "environment: reset gave two rollouts of one prompt different texts, but a vLLM server samples "
                "the whole group from the first of them. Let the row decide the text, or give --vllm_mode colocate."
            )


def _make(spec: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception as error:
        raise ConfigError(
            f"environment {spec!r} cannot be made: {type(error).__name__}: {error}. It is called without arguments, "
            "once for each rollout that a process samples at a time."
        ) from error


def _members(environment: Any) -> dict[str, Callable]:
    """Its class's functions by name, looked up as TRL does."""
    return dict(inspect.getmembers(type(environment), predicate=inspect.isfunction))


def _asking(suite: RewardSuite) -> list[str]:
    return [reward.name for reward in suite.rewards if COLUMN in reward.parameters.named]


def _check_reward(suite: RewardSuite, prompts: Sequence[Prompt], owned: bool, name: str = "") -> None:
    asking = _asking(suite)
    if owned and not asking:
        raise ConfigError(
            f"{name} scores its rollouts (get_reward), but no reward asks for that: add {COLUMN} to reward_funcs (with "
            "weight 0 to log it alone)."
        )
    if asking and not owned and COLUMN not in column_names(prompts):
        what = f"{name} has no get_reward" if name else "no environment is named"
        raise ConfigError(f"{', '.join(asking)} asks for {COLUMN}, but {what}: add it, or leave the reward out.")


def _reset_by_row(
    name: str, factory: Callable[[], Any], first: Any, asked: Parameters, prompts: Sequence[Prompt]
) -> Callable[[], Any]:
    made: list[Any] = []

    def make() -> Any:
        environment = factory() if made else first
        if any(environment is other for other in made):
            raise ConfigError(f"{name} gives one object twice; expected a new one a call: rollouts share no state.")
        made.append(environment)
        own = environment.reset

        def reset(*, prompt: Any, index: int) -> str | None:
            row = {**copy.deepcopy(dict(prompts[index].columns)), "prompt": prompt}  # it may change what it is given
            return _reset(name, own, _asked_of(row, asked), prompts[index].key)

        environment.reset = reset
        return environment

    return make


def _asked_of(row: Mapping[str, Any], asked: Parameters) -> dict[str, Any]:
    return {name: value for name, value in row.items() if asked.takes_any or name in asked.named}


def _reset(name: str, own: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> str | None:
    try:
        text = own(**arguments)
    except Exception as error:
        raise TrainingError(f"{name}: reset raised {type(error).__name__}: {error}, on prompt {key!r}") from error
    if text is not None and not isinstance(text, str):
        raise TrainingError(
            f"{name}: reset returned a {type(text).__name__} on prompt {key!r}; expected None, or a text that is added "
            "to the last message of the prompt"
        )
    return text


def _value_or_error(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:  # raised again by the caller, with the rollout's name
        return error
