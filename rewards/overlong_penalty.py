"""DAPO's soft punishment of overlong completions."""

from rlseq.scoring import reward


@reward(range=(-1, 0))
def overlong_penalty(completion_ids: list[int], max_length: int, buffer: int) -> float:
    """0 up to max_length − buffer tokens, then falling linearly to −1 at max_length, and −1 beyond.

    Equation 13 of DAPO (Yu et al. 2025, arXiv 2503.14476), where `buffer` is L_cache. Lengths are tokens as
    sampled.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}, max_length {max_length}; expected 0 < buffer <= max_length")
    over = len(completion_ids) - (max_length - buffer)
    return -min(1.0, max(0, over) / buffer)
