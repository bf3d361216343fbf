"""ROUGE by Google's rouge-score."""

from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list


@reward(range=(0, 1), extra="text")
def rouge(completion: str, references: list[str] | str, kind: str = "rougeL", stem: bool = False) -> tuple[float, dict]:
    """ROUGE F1 (Lin 2004) against the best reference: `kind` is rouge1, rouge2, ..., rougeL or rougeLsum.

    `stem` applies the Porter stemmer. Details: precision and recall against that reference.
    """
    score = _scorer(kind, stem).score_multi(as_list(references), completion)[kind]
    return score.fmeasure, {"precision": score.precision, "recall": score.recall}


@lru_cache(maxsize=8)
def _scorer(kind: str, stem: bool) -> RougeScorer:
    return RougeScorer([kind], use_stemmer=stem)
