"""How rewards are found, adapted, run, isolated, cached and checked; the rewards themselves are in
`rewards/`."""

from .load import load_rewards
from .reward import CorpusMetric, Ratio, reward
from .suite import RewardSuite, ScoreTable

__all__ = ["CorpusMetric", "Ratio", "RewardSuite", "ScoreTable", "load_rewards", "reward"]
