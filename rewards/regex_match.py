"""Whether a completion has a given form."""

import re

from rlseq.scoring import reward


@reward(range=(0, 1))
def regex_match(completion: str, pattern: str, whole: bool = True) -> float:
    """1 if the completion matches the regular expression `pattern`, else 0.

    With `whole` all of it must match, else any part; `.` matches line ends, too. Some patterns take
    exponential time: set `timeout` for those.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return float(bool(compiled.fullmatch(completion) if whole else compiled.search(completion)))
