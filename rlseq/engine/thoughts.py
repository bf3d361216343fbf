"""Where the thought ends in the token ids of a completion (`--think_end`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlseq.engine.stop_strings import StopStrings


class ThinkEnd:
    """Finds the text that ends a thought in token ids, wherever the tokens that spell it begin and end.

    A thought is the tokens up to and including the one that completes the text for the first time.

    Args:
        think_end: the text, as "</think>"; None: completions have no thoughts.
        tokenizer: decodes completions.

    Raises:
        ConfigError: the text can never be part of a completion's text.
    """

    def __init__(self, think_end: str | None, tokenizer: Any):
        self.text, self.tokenizer = think_end, tokenizer
        self._strings = StopStrings(() if think_end is None else (think_end,), tokenizer, setting="--think_end")

    def __bool__(self) -> bool:
        return self.text is not None

    def length(self, ids: Sequence[int]) -> tuple[int, bool]:
        """How many of T token ids are the thought, and whether it was closed; one that was not is all of them."""
        end = self._strings.end(ids)
        return (len(ids), False) if end is None else (end, True)

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """Where in T token ids the answer starts: behind the thought and the tokens of whitespace after it.

        None: the thought was never closed, or text of the answer stands in the token that closes it.
        """
        end, closed = self.length(ids)
        if not closed or self._decode(ids[:end]).partition(self.text)[2].strip():
            return None
        while end < len(ids) and (text := self._decode(ids[end : end + 1])) and not text.strip():
            end += 1
        return end

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def check_ends(stop_strings: Sequence[str] | None, think_end: str | None, tokenizer: Any) -> None:
    """Refuse texts that end completions and thoughts, and that no completion's text can hold.

    Raises:
        ConfigError: names the setting, and what to do.
    """
    StopStrings(stop_strings or (), tokenizer)
    ThinkEnd(think_end, tokenizer)
