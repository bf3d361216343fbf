"""chrF by sacrebleu: character n-gram F-score, of a sentence and of a corpus."""

from functools import lru_cache

import numpy as np
from sacrebleu.metrics import CHRF

from rlseq.scoring import CorpusMetric, reward
from rlseq.scoring.distance import as_list

_BETA = 2
_ORDERS = tuple(range(1, 9))  # 6 of characters, and up to 2 of words
_STATISTICS = tuple(f"{what}_{n}" for n in _ORDERS for what in ("hypothesis", "reference", "match"))


def corpus_chrf(sums: dict) -> np.ndarray:
    """Corpus chrF, 0 to 100, from summed n-gram counts; equals `sacrebleu.CHRF().corpus_score`."""
    hypothesis, reference, match = (
        np.stack([np.asarray(sums[f"{what}_{n}"], float) for n in _ORDERS])  # (8, ...)
        for what in ("hypothesis", "reference", "match")
    )
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(axis=0), 1)
    precision = np.where(counted, match / np.maximum(hypothesis, 1), 0).sum(axis=0) / orders
    recall = np.where(counted, match / np.maximum(reference, 1), 0).sum(axis=0) / orders
    below = _BETA**2 * precision + recall
    return 100 * (1 + _BETA**2) * precision * recall / np.where(below > 0, below, 1)


def _description(word_order: int = 0) -> str:
    metric = CHRF(word_order=word_order, beta=_BETA)
    metric.num_refs = -1  # "nrefs:var": a row has as many references as it has
    return f"corpus chrF{'++' if word_order == 2 else '+' * word_order} (sacrebleu {metric.get_signature()})"


@reward(
    range=(0, 1),
    extra="text",
    corpus={"corpus_chrf": CorpusMetric(_STATISTICS, corpus_chrf, description=_description)},
)
def chrf(completion: str, references: list[str] | str, word_order: int = 0) -> tuple[float, dict]:
    """Sentence chrF2 over 100 (Popović 2015) by sacrebleu; chrF++ with `word_order` 2.

    Details are the n-gram counts against the best reference, from which the corpus score is made.
    """
    metric, targets = _metric(word_order), as_list(references)
    # sacrebleu's own significance tests start from these statistics; it has no public name for them
    counts = metric._extract_corpus_statistics([completion], [[target] for target in targets])[0]
    padded = list(map(int, counts)) + [0] * (len(_STATISTICS) - len(counts))
    score = min(1.0, metric.sentence_score(completion, targets).score / 100)
    return score, dict(zip(_STATISTICS, padded, strict=True))


@lru_cache(maxsize=4)
def _metric(word_order: int) -> CHRF:
    if word_order not in (0, 1, 2):
        raise ValueError(f"word_order is {word_order!r}; expected 0 (chrF), 1 or 2 (chrF++)")
    return CHRF(word_order=word_order, beta=_BETA)
