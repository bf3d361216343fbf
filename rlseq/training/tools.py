"""What the model may call while it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from rlseq.data.chat import continues
from rlseq.errors import ConfigError, RewardError
from rlseq.scoring.specs.find import find
from rlseq.types import Prompt


def load_tools(specs: Sequence[str]) -> list[Callable]:
    """The functions that tools are named by: `package.module:function` or `path/to/file.py:function`.

    Raises:
        ConfigError: one is not found, or its types and docstring do not say how it is called.
    """
    tools = [find_callable("tools", spec) for spec in specs]
    for spec, tool in zip(specs, tools, strict=True):
        check_schema(f"tools: {spec!r}", tool)
    return tools


def find_callable(setting: str, spec: str) -> Callable:
    """Find what a setting names as `package.module:name` or `path/to/file.py:name`.

    Raises:
        ConfigError: it is named otherwise, or is not found; the setting is named.
    """
    if ":" not in spec and not spec.endswith(".py"):
        raise ConfigError(
            f"{setting}: {spec!r} names no function; expected path/to/file.py:name or package.module:name"
        )
    try:
        return find(spec, Path.cwd()).function
    except RewardError as error:
        raise ConfigError(f"{setting}: {spec!r} is not found: {error}") from error


def check_schema(name: str, function: Callable, hint: str = "") -> None:
    """Refuse a function that the model could not be told of.

    Args:
        name: of the function, for the message.
        function: of its own or a method of an object.
        hint: what else the user may do.

    Raises:
        ConfigError: its types and docstring do not say how it is called.
    """
    try:
        get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ConfigError(
            f"{name} does not tell a model how it is called: {str(error).splitlines()[0]} Give every argument a type, "
            f"and a line under Args: in a Google-style docstring.{' ' * bool(hint)}{hint}"
        ) from error


def check_tools(config: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse what cannot be trained with tools or an environment, where TRL's own loop samples.

    Raises:
        ConfigError: says which setting, and what to do.
    """
    if not config.tools and not config.environment:
        return
    wrong = {
        "objective": config.objective != "policy_gradient",
        "advantage_baseline greedy": config.advantage_baseline == "greedy",
        "reference_prefix": config.reference_prefix > 0,
        "reference_loss_coef": config.reference_loss_coef != 0,
        "a critic (recipes/ppo.py)": hasattr(config, "critic"),
    }
    named = [name for name, is_set in wrong.items() if is_set]
    if named:
        raise ConfigError(
            f"tools and an environment do not go with {', '.join(named)}, which samples or scores without them: leave "
            "it out"
        )
    if any(isinstance(prompt.prompt, str) for prompt in prompts):
        raise ConfigError(
            "tools and an environment's methods are called in a chat, but a prompt is a text: give --prompt_column a "
            "column of messages"
        )
    if any(continues(prompt.prompt, {}) for prompt in prompts):
        raise ConfigError(
            "a prompt ends in a message of the assistant, which runs with tools would close before they answer; let it "
            "end in another role's"
        )
