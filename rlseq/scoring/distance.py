"""Distance to the closest of several references, shared by the bundled rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def as_list(references: str | Sequence[str]) -> list[str]:
    """References as a list; one text is a list of one.

    Raises:
        ValueError: when there are none.
    """
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise ValueError("references is empty; expected at least one")
    return texts


def closest(guess: Sequence[Any], targets: Sequence[Sequence[Any]]) -> tuple[int, int]:
    """Edit distance (substitutions, insertions, deletions) to the closest target, and that target's length.

    Of targets equally many edits away, the one with the fewest edits per element is taken; of those, the
    first.
    """
    from rapidfuzz.distance import Levenshtein

    scored = [(Levenshtein.distance(guess, target), len(target)) for target in targets]
    return min(scored, key=lambda pair: (pair[0], -pair[1]))


def accuracy(edits: int, length: int) -> float:
    """max(0, 1 − edits / length); of an empty target, 1 without edits and else 0."""
    return max(0.0, 1.0 - edits / length) if length else float(edits == 0)
