"""BLEU by sacrebleu: sentence BLEU as a reward, corpus BLEU from the same counts."""

from functools import lru_cache

import numpy as np
from sacrebleu.metrics import BLEU

from rlseq.scoring import CorpusMetric, reward
from rlseq.scoring.distance import as_list

_ORDERS = (1, 2, 3, 4)
_STATISTICS = (
    "hypothesis_length",
    "reference_length",
    *(f"{what}_{n}" for what in ("match", "total") for n in _ORDERS),
)


def corpus_bleu(sums: dict) -> np.ndarray:
    """Corpus BLEU, 0 to 100, from summed counts; equals `sacrebleu.BLEU().corpus_score` (exponential smoothing)."""
    hypothesis, reference = (np.asarray(sums[name], float) for name in _STATISTICS[:2])
    matches = np.stack([np.asarray(sums[f"match_{n}"], float) for n in _ORDERS])  # (4, ...)
    totals = np.stack([np.asarray(sums[f"total_{n}"], float) for n in _ORDERS])
    # an order without a match counts as 1/2, 1/4, ... of one: the n-th such order as 2^-n
    unmatched = np.cumsum((matches == 0) & (totals > 0), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches > 0, matches, 0.5**unmatched) / totals
        brevity = np.where(hypothesis < reference, np.exp(1 - reference / hypothesis), 1.0)
        score = 100 * brevity * np.exp(np.mean(np.log(precisions), axis=0))
    return np.where((totals.min(axis=0) > 0) & (matches.sum(axis=0) > 0), score, 0.0)


def _description(tokenize: str = "13a", lowercase: bool = False) -> str:
    metric = BLEU(tokenize=tokenize, lowercase=lowercase)
    metric.num_refs = -1  # "nrefs:var": a row has as many references as it has
    return f"corpus BLEU (sacrebleu {metric.get_signature()})"


@reward(
    range=(0, 1),
    extra="text",
    corpus={"corpus_bleu": CorpusMetric(_STATISTICS, corpus_bleu, description=_description)},
)
def bleu(
    completion: str, references: list[str] | str, tokenize: str = "13a", lowercase: bool = False
) -> tuple[float, dict]:
    """Sentence BLEU over 100 (Papineni et al. 2002), with effective order and exponential smoothing.

    Computed by sacrebleu (Post 2018) with its tokenizer `tokenize`. Details are the n-gram counts, from
    which the corpus score is made.
    """
    score = _metric(tokenize, lowercase).sentence_score(completion, as_list(references))
    counts = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return min(1.0, score.score / 100), dict(zip(_STATISTICS, map(int, counts), strict=True))


@lru_cache(maxsize=8)
def _metric(tokenize: str, lowercase: bool) -> BLEU:
    return BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
