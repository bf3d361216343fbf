"""A coin: the control that shows what training gains from no information at all."""

import hashlib
from typing import Any

from rlseq.scoring import reward


@reward(range=(0, 1))
def bernoulli(
    completions: list[str],
    prompt_key: list[str],
    sample: list[int],
    trainer_state: Any = None,
    p: float = 0.5,
    seed: int = 0,
) -> list[float]:
    """1 with probability `p`, else 0, whatever the completion (Shao et al. 2025, arXiv 2506.10947).

    The coin is a hash of (seed, training step, prompt, sample): a run can be repeated and resumed exactly.
    """
    step = getattr(trainer_state, "global_step", 0)
    return [
        float(_uniform(f"{seed}/{step}/{number}/{key}") < p) for key, number in zip(prompt_key, sample, strict=True)
    ]


def _uniform(text: str) -> float:
    """A number in [0, 1) from a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
