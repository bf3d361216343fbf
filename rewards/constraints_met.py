"""The share of an instruction's constraints that a completion meets."""

import re
from collections.abc import Callable
from typing import Any

from rlseq.scoring import Ratio, reward


@reward(
    range=(0, 1),
    corpus={
        "all_met": Ratio(
            "all_met",
            "completions",
            higher_is_better=True,
            description="all met: share of completions that meet all of their constraints",
        )
    },
)
def constraints_met(completion: str, constraints: list[dict[str, Any]]) -> tuple[float | None, dict]:
    """Constraints that are met / constraints. A completion without words meets none; without constraints it abstains.

    A constraint is {"kind": ..., ...} with the values of its kind:

    * `sentences`, `count`: exactly `count` sentences. A sentence ends at . ! ? or … before white space or the end
      (closing quotes, brackets and asterisks may stand between) and at a line break. A piece without a letter, as the
      number of a list, is not a sentence; the rest after the last end is one. "e.g. this" is an end, "3.5" is not.
    * `max_words`, `min_words`, `count`: at most, at least `count` words. A word is a run of letters and digits;
      apostrophes within join ("don't" is one word), hyphens and points part ("well-known" and "3.5" are two each).
    * `use_words`, `avoid_words`, `words`: each of them, none of them is among the words. Case and a final 's are
      ignored, other forms count as other words ("teas" is not "tea").
    * `opening_word`, `word`: it is the first word, in whatever case.
    * `closing_phrase`, `phrase`: the text ends with it, in whatever case; white space and quotes may follow.
    * `lower_case`, `upper_case`: there is a letter, and none of the other case.
    * `bullets`, `count`: there are exactly `count` lines that are not blank, and each starts with "- ".
    * `no_commas`: there is no comma.
    * `quoted`: the text is in one pair of double quotation marks, straight or curly, and holds no other.

    Details: `all_met` (1 if the value is 1), `completions` (1), and `missed`, the kinds that are not met.

    Raises:
        ValueError: a constraint of an unknown kind.
    """
    for one in constraints:
        if one.get("kind") not in _CHECKS:
            raise ValueError(f"unknown kind of constraint: {one.get('kind')!r}; the kinds are {', '.join(_CHECKS)}")
    if not constraints:
        return None, {"why": "the row has no constraints"}
    words = _words(completion)
    missed = [one["kind"] for one in constraints if not words or not _CHECKS[one["kind"]](completion, words, one)]
    share = (len(constraints) - len(missed)) / len(constraints)
    return share, {"all_met": int(not missed), "completions": 1, "missed": missed}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def _plain(words: list[str]) -> set[str]:
    """The words as they are compared."""
    return {word.casefold().replace("’", "'").removesuffix("'s") for word in words}


def _sentences(text: str) -> int:
    pieces = re.split(r"""[.!?…]["'”’)\]*]*(?:\s|$)|\n""", text)
    return sum(any(map(str.isalpha, piece)) for piece in pieces)


def _ends_with(text: str, phrase: str) -> bool:
    return re.search(rf"""(?<!\w){re.escape(phrase)}[\s"'”’]*\Z""", text, re.IGNORECASE) is not None


def _bullets(text: str, count: int) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return len(lines) == count and all(line.startswith("- ") for line in lines)


_CHECKS: dict[str, Callable[[str, list[str], dict[str, Any]], bool]] = {
    "sentences": lambda text, words, one: _sentences(text) == one["count"],
    "max_words": lambda text, words, one: len(words) <= one["count"],
    "min_words": lambda text, words, one: len(words) >= one["count"],
    "use_words": lambda text, words, one: _plain(one["words"]) <= _plain(words),
    "avoid_words": lambda text, words, one: not _plain(one["words"]) & _plain(words),
    "opening_word": lambda text, words, one: words[0].casefold() == one["word"].casefold(),
    "closing_phrase": lambda text, words, one: _ends_with(text, one["phrase"]),
    "lower_case": lambda text, words, one: text.islower(),
    "upper_case": lambda text, words, one: text.isupper(),
    "bullets": lambda text, words, one: _bullets(text, one["count"]),
    "no_commas": lambda text, words, one: "," not in text,
    "quoted": lambda text, words, one: re.fullmatch(r'\s*("[^"“”]+"|“[^"“”]+”)\s*', text) is not None,
}
