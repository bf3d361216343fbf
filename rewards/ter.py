"""Translation edit rate by sacrebleu: edits and shifts of word blocks."""

from functools import lru_cache

from sacrebleu.metrics import TER

from rlseq.scoring import Ratio, reward
from rlseq.scoring.distance import as_list


def _description(normalized: bool = False) -> str:
    metric = TER(normalized=normalized)
    metric.num_refs = -1  # "nrefs:var": a row has as many references as it has
    return f"TER: edits over mean reference lengths (sacrebleu {metric.get_signature()})"


@reward(
    range=(0, 1),
    extra="text",
    corpus={"corpus_ter": Ratio("edits", "reference_length", description=_description)},
)
def ter(completion: str, references: list[str] | str, normalized: bool = False) -> tuple[float, dict]:
    """One minus the translation edit rate (Snover et al. 2006) by sacrebleu, at least 0.

    The rate is edits, shifts of blocks among them, to the closest reference over the mean length of the
    references. Details: both numbers. The search for shifts takes long on long texts (over ten seconds for
    several hundred words that hardly match): set `timeout` where completions may be that long.
    """
    score = _metric(normalized).sentence_score(completion, as_list(references))
    edits, length = float(score.num_edits), float(score.ref_length)
    value = max(0.0, 1.0 - edits / length) if length else float(edits == 0)
    return value, {"edits": edits, "reference_length": length}


@lru_cache(maxsize=2)
def _metric(normalized: bool) -> TER:
    return TER(normalized=normalized)
