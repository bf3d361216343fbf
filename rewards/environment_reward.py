"""What the environment that a rollout was made in says of it; nothing where there was none, as in evaluation."""

from rlseq.scoring import reward


@reward
def environment_reward(completion: str, environment_reward: float | None = None) -> float | None:
    """What `get_reward` of the training environment returned (docs/models.md)."""
    return environment_reward
