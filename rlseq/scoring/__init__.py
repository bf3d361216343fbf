"""How rewards are found, called, isolated, cached, checked and replayed; the rewards are in `rewards/`."""

from rlseq.scoring.load import load_rewards
from rlseq.scoring.reward import CorpusMetric, Ratio, reward
from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.table import ScoreTable

__all__ = ["CorpusMetric", "Ratio", "RewardSuite", "ScoreTable", "load_rewards", "reward"]
