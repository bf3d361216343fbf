"""Whether the final number of a completion is that of a reference (GSM8K and its like)."""

import re
from fractions import Fraction

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list

LONGEST = 4300  # characters of a number: Python reads no more digits
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")


@reward(range=(0, 1))
def number_match(completion: str, references: list[str] | str) -> tuple[float, dict]:
    """1 if the completion's final number equals a reference's, else 0; exact, so 18, 18.0 and $18.00 are
    equal.

    The final number is the first after the last `####` if that mark is there, else the last in the text. A
    minus sign counts where no digit stands before it. Details: the number found. A reference without a
    number is an error. A number of more than 4,300 characters counts as none.
    """
    targets = [final_number(reference) for reference in as_list(references)]
    if None in targets:
        raise ValueError(f"no number in the reference {as_list(references)[targets.index(None)]!r}")
    found = final_number(completion)
    return float(found is not None and found in targets), {"number": None if found is None else str(found)}


def final_number(text: str) -> Fraction | None:
    """The final number of a text, or None."""
    _, mark, answer = text.rpartition("####")
    numbers = [match for match in _NUMBER.finditer(answer) if match[0]]
    if not numbers:
        return None
    match = numbers[0] if mark else numbers[-1]
    digits = match[0].replace(",", "").replace("−", "-")
    if match.start() and answer[match.start() - 1].isdigit():  # "48-24": a difference, not minus 24
        digits = digits.lstrip("+-")
    return Fraction(digits) if len(digits) <= LONGEST else None
