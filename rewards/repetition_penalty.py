"""A penalty for saying the same again."""

from rlseq.scoring import reward


@reward(range=(-1, 0))
def repetition_penalty(completion: str, n: int = 3) -> float:
    """Minus the share of word n-grams that have occurred before: distinct / all − 1; 0 with fewer than n words."""
    words = completion.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
