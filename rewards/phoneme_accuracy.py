"""Accuracy of a pronunciation against the closest listed one, with phoneme and word error rates."""

from rlseq.scoring import Ratio, reward
from rlseq.scoring.distance import accuracy, as_list, closest


@reward(
    range=(0, 1),
    corpus={
        "per": Ratio(
            "edits",
            "length",
            description="phoneme error rate: Σ edits / Σ phonemes, against the closest pronunciation",
            label="PER",
        ),
        "wer": Ratio(
            "word_error",
            "words",
            description="word error rate: share of words with at least one error",
            label="WER",
        ),
    },
)
def phoneme_accuracy(completion: str, references: list[str]) -> tuple[float, dict]:
    """One minus the edit distance to the closest listed pronunciation over its length, at least 0.

    A pronunciation is phonemes separated by white space. The closest is the one with the fewest edits
    (substitutions, insertions, deletions); of several, the one with the fewest edits per phoneme; of
    several, the first. PER is edits to the closest pronunciation over that pronunciation's length, summed
    over the corpus before dividing; WER is the share of words with at least one error.
    """
    targets = [reference.split() for reference in as_list(references)]
    edits, length = closest(completion.split(), targets)
    details = {"edits": edits, "length": length, "word_error": int(edits > 0), "words": 1}
    return accuracy(edits, length), details
