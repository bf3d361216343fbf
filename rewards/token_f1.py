"""Overlap of words with a reference, as in extractive question answering."""

import re
import string
from collections import Counter

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@reward(range=(0, 1))
def token_f1(completion: str, references: list[str] | str, normalize: bool = True) -> tuple[float, dict]:
    """F1 of the bag of words against the best reference (SQuAD: Rajpurkar et al. 2016, section 6.1).

    With `normalize`, case, ASCII punctuation and the articles a, an, the do not count. Two empty texts agree.
    Details: precision and recall against that reference.
    """
    guess = _words(completion, normalize)
    scores = [_overlap(guess, _words(reference, normalize)) for reference in as_list(references)]
    f1, precision, recall = max(scores)
    return f1, {"precision": precision, "recall": recall}


def _words(text: str, normalize: bool) -> Counter:
    if normalize:
        text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return Counter(text.split())


def _overlap(guess: Counter, target: Counter) -> tuple[float, float, float]:
    if not guess or not target:
        same = float(guess == target)
        return same, same, same
    common = (guess & target).total()
    precision, recall = common / guess.total(), common / target.total()
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return f1, precision, recall
