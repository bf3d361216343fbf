"""Whether the final answer of a completion equals a reference mathematically, by math-verify."""

import threading
from functools import lru_cache

from math_verify import parse, verify

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list


@reward(range=(0, 1), extra="math")
def math_equal(completion: str, references: list[str] | str) -> tuple[float | None, dict]:
    r"""1 if the final answer equals a reference's as mathematics (1/2, 0.5 and \frac{1}{2} are equal), else
    0.

    The final answer is what follows the last `####` if that mark is there, else what math-verify finds
    (boxed first). A reference that math-verify cannot read makes the reward abstain. Sympy can take very
    long on strange input: set `timeout`. Details: the answer as read.
    """
    targets = [target for target in map(_read_reference, as_list(references)) if target]
    if not targets:
        return None, {"answer": None}
    answer = _read(completion)
    equal = any(verify(target, answer, timeout_seconds=_seconds()) for target in targets)
    return float(equal), {"answer": str(answer[-1]) if answer else None}


def _read(text: str) -> list:
    _, mark, answer = text.rpartition("####")
    return parse(f"${answer.strip()}$" if mark else text, parsing_timeout=_seconds())


@lru_cache(maxsize=65536)
def _read_reference(text: str) -> list:
    return _read(text if "####" in text or "$" in text or "\\" in text else f"#### {text}")


def _seconds() -> int | None:
    """Math-verify's own limit is an alarm, which works in the main thread only."""
    return 5 if threading.current_thread() is threading.main_thread() else None
