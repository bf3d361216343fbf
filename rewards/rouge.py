"""ROUGE by Google's rouge-score."""

import re
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list


@reward(range=(0, 1), extra="text")
def rouge(completion: str, references: list[str] | str, kind: str = "rougeL", stem: bool = False) -> tuple[float, dict]:
    """ROUGE F1 (Lin 2004) against the best reference: `kind` is rouge1, rouge2, ..., rougeL or rougeLsum.

    `stem` applies the Porter stemmer. Details: precision and recall against that reference. Words are of a to z
    and digits, as rouge-score has them: references in another script alone are an error.
    """
    targets = as_list(references)
    if any(map(str.strip, targets)) and not any(re.search("[a-z0-9]", target.lower()) for target in targets):
        raise ValueError(
            f"rouge-score finds no word in {targets[0]!r}: it knows a to z and digits; use chrf or token_f1"
        )
    score = _scorer(kind, stem).score_multi(targets, completion)[kind]
    return score.fmeasure, {"precision": score.precision, "recall": score.recall}


@lru_cache(maxsize=8)
def _scorer(kind: str, stem: bool) -> RougeScorer:
    return RougeScorer([kind], use_stemmer=stem)
