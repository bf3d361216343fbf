"""How much a completion differs from the others of its prompt: the example of a group reward."""

from rapidfuzz.distance import Levenshtein

from rlseq.scoring import reward


@reward(range=(0, 1), scope="group")
def group_diversity(completions: list[str]) -> list[float | None]:
    """Mean edit distance in words to the prompt's other completions, each over the longer of the two.

    Abstains for a completion without others.
    """
    words = [completion.split() for completion in completions]
    others = len(words) - 1
    if others == 0:
        return [None]
    return [
        sum(Levenshtein.normalized_distance(mine, other) for j, other in enumerate(words) if j != i) / others
        for i, mine in enumerate(words)
    ]
