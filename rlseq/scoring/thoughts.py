"""A completion of a model that thinks before it answers, as its thought and its answer (`--think_end`)."""

from __future__ import annotations

from collections.abc import Callable

THOUGHT_FIELDS: dict[str, Callable[[str, str], str]] = {
    "thought": lambda text, think_end: split_thought(text, think_end)[0],
    "answer": lambda text, think_end: split_thought(text, think_end)[1],
}


def split_thought(text: str, think_end: str) -> tuple[str, str]:
    """The text before the first `think_end`, and the text after it without leading whitespace.

    A text without `think_end` is a thought that was never closed: all of it is the thought, and the answer is empty.
    """
    thought, _, answer = text.partition(think_end)
    return thought, answer.lstrip()
