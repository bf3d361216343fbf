"""Agreement with the prompt's other completions: a control without references."""

import re
from collections import Counter

from rlseq.scoring import reward


@reward(range=(0, 1), scope="group")
def majority_vote(completions: list[str], pattern: str | None = None) -> list[float]:
    """1 for completions whose answer is the prompt's most frequent one (of several, the first given), else
    0.

    TTRL's reward (Zuo et al. 2025, arXiv 2504.16084). The answer is the completion without white space at
    both ends or, given `pattern`, that expression's last match (its first group, if it has one); no match,
    no vote.
    """
    answers = [_answer(completion, pattern) for completion in completions]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return [0.0] * len(answers)
    winner = votes.most_common(1)[0][0]
    return [float(answer == winner) for answer in answers]


def _answer(completion: str, pattern: str | None) -> str | None:
    if pattern is None:
        return completion.strip()
    matches = list(re.finditer(pattern, completion, re.DOTALL))
    return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
