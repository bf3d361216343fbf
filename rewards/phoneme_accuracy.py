"""Accuracy of a pronunciation against the closest listed one, with phoneme and word error rates."""

from rapidfuzz.distance import Levenshtein

from rlseq.scoring import Ratio, reward


@reward(
    range=(0, 1),
    corpus={
        "per": Ratio(
            "edits",
            "length",
            description="phoneme error rate: Σ edits / Σ phonemes of the closest pronunciation",
        ),
        "wer": Ratio(
            "word_error",
            "words",
            description="word error rate: share of words with at least one wrong phoneme",
        ),
    },
)
def phoneme_accuracy(completion: str, references: list[str]) -> tuple[float, dict]:
    """One minus the edit distance to the closest listed pronunciation over its length, at least 0.

    A pronunciation is phonemes separated by white space. The closest is the one with the fewest edits
    (substitutions, insertions, deletions); of several, the one with the fewest edits per phoneme; of several,
    the first. PER is edits to the closest pronunciation over that pronunciation's length, summed over the
    corpus before dividing; WER is the share of words with at least one error.
    """
    guess = completion.split()
    targets = [
        reference.split() for reference in ([references] if isinstance(references, str) else references)
    ]
    if not targets:
        raise ValueError("references is empty; expected at least one pronunciation")
    scored = [(Levenshtein.distance(guess, target), len(target)) for target in targets]
    edits, length = min(scored, key=lambda pair: (pair[0], -pair[1]))
    value = max(0.0, 1.0 - edits / length) if length else float(edits == 0)
    return value, {"edits": edits, "length": length, "word_error": int(edits > 0), "words": 1}
