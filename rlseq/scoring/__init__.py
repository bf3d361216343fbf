"""How rewards are found, adapted, run, isolated, cached and checked; the rewards themselves are in
`rewards/`."""

from .reward import CorpusMetric, Ratio, reward
from .suite import RewardSuite, ScoreTable, load_rewards

__all__ = ["CorpusMetric", "Ratio", "RewardSuite", "ScoreTable", "load_rewards", "reward"]
