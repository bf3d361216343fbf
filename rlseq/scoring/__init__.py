"""How rewards are found, adapted, run, isolated, cached and checked; the rewards themselves are in
`rewards/`."""

from rlseq.scoring.load import load_rewards
from rlseq.scoring.reward import CorpusMetric, Ratio, reward
from rlseq.scoring.suite import RewardSuite, ScoreTable

__all__ = ["CorpusMetric", "Ratio", "RewardSuite", "ScoreTable", "load_rewards", "reward"]
