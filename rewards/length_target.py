"""Closeness of a completion's length to a target."""

from rlseq.scoring import reward


@reward(range=(0, 1))
def length_target(
    completion: str, completion_ids: list[int], target: int, tolerance: int, unit: str = "token"
) -> tuple[float, dict]:
    """max(0, 1 − |length − target| / tolerance): 1 at the target, 0 from `tolerance` units away.

    `unit` is "token" (as sampled, the stop token included), "word" or "character". Details: the length.
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance is {tolerance}; expected at least 1")
    units = {"token": completion_ids, "word": completion.split(), "character": completion}
    if unit not in units:
        raise ValueError(f"unit is {unit!r}; expected {', '.join(units)}")
    length = len(units[unit])
    return max(0.0, 1.0 - abs(length - target) / tolerance), {"length": length}
