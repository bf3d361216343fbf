"""The rewards that a run optimises, from its settings."""

from __future__ import annotations

from typing import Any

from rlseq.config.training import RewardArguments
from rlseq.errors import ConfigError
from rlseq.scoring import RewardSuite, load_rewards


def optimised_rewards(rewards: RewardArguments, config: Any) -> RewardSuite:
    """The suite of reward_funcs; an empty one where the objective needs none.

    Raises:
        ConfigError: none is named, though the objective optimises them.
        RewardError: one is not found, or fits no form.
    """
    if rewards.reward_funcs:
        weights = config.reward_weights
        options = {"max_error_rate": rewards.max_error_rate, "think_end": config.think_end}
        return load_rewards(rewards.reward_funcs, weights=weights, **options)
    if config.objective == "distillation":
        return RewardSuite([], [])
    raise ConfigError("no reward is named; give --reward_funcs (`rlseq reward list` shows the bundled ones)")
