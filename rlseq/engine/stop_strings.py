"""Stop strings: texts that end a completion, wherever the tokens that spell them begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from rlseq.errors import ConfigError

MARGIN = 16  # characters by which a window's text may differ at its start from the whole text's end


class StopStrings:
    """Ends a completion with the first token after which its text holds one of these strings.

    The text is the completion decoded without special tokens, so what counts are the token ids of the completion
    alone. The tokens up to that one are the completion; its text ends where the string begins.

    Args:
        strings: what ends a completion.
        tokenizer: decodes completions; not needed without strings.
        setting: what names the strings in a message.

    Raises:
        ConfigError: there is no tokenizer, or a string can never be part of a text.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any | None, *, setting: str = "--stop_strings"):
        self.strings, self.tokenizer = tuple(strings), tokenizer
        if not self.strings:
            return
        if tokenizer is None:
            raise ConfigError("stop_strings are found in the text of completions; give the tokenizer too")
        if "" in self.strings:
            raise ConfigError(f"{setting} names an empty text; name what a completion or its thought is to end with")
        for string in self.strings:
            within = [token for token in tokenizer.all_special_tokens if token in string]
            if within:
                raise ConfigError(
                    f"{setting} {string!r} holds the special token {within[0]!r}, which is no part of a text. "
                    "Leave it out; a token that ends a completion is named by eos_token_id in the model's "
                    "generation_config.json."
                )
        self.special = frozenset(tokenizer.all_special_ids)
        self.needed = max(map(len, self.strings)) + MARGIN  # characters of a window

    def __bool__(self) -> bool:
        return bool(self.strings)

    def reached(
        self, completions: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]] | None = None
    ) -> list[bool]:
        """Whether each completion's text holds a stop string that does not lie in its prefix alone.

        Only the last tokens are decoded, so ask after every token.

        Args:
            completions: token ids, without their prefixes.
            prefixes: token ids that were not sampled, one list per completion.
        """
        rows = list(zip(prefixes or [()] * len(completions), completions, strict=True))
        found = [any(string in text for string in self.strings) for text in self._ends(rows)]
        return [
            near and self._place((*prefix, *ids), prefix) is not None
            for near, (prefix, ids) in zip(found, rows, strict=True)
        ]

    def end(self, ids: Sequence[int]) -> int | None:
        """How many of these token ids the completion has; None: its text holds no stop string."""
        if self._place(ids) is None:
            return None
        low, high = 0, len(ids)  # the text of `low` tokens holds none, that of `high` does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._place(ids[:middle]) is not None else (middle, high)
        return high

    def cuts(self, ids: Sequence[int]) -> bool:
        """Whether these ids cannot be sampled whole: a string ends them before, or with, their last."""
        return bool(self.strings) and self._place(ids) is not None

    def text(self, ids: Sequence[int], text: str, prefix: Sequence[int] = ()) -> str:
        """The text of a completion without the stop string that ended it, and all that follows.

        Args:
            ids: of the completion, its prefix included.
            text: these ids decoded without special tokens.
        """
        return text[: self._place(ids, prefix, text)] if self.strings else text

    def _place(self, ids: Sequence[int], prefix: Sequence[int] = (), text: str | None = None) -> int | None:
        """Where in the text the first stop string begins, of those that end behind the prefix."""
        text = self._decode([ids])[0] if text is None else text
        begun = len(self._decode([prefix])[0]) if prefix else 0
        places = [text.find(string, max(0, begun - len(string) + 1)) for string in self.strings]
        return min((place for place in places if place >= 0), default=None)

    def _ends(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
        """At least the last `needed` characters of the text of each prefix and what follows it, or all of it."""
        texts, size, left = [""] * len(rows), self.needed, list(range(len(rows)))
        while left:
            windows = []
            for prefix, ids in (rows[i] for i in left):
                window = ids[-size:] if len(ids) >= size else (*prefix, *ids)[-size:]
                windows.append([token for token in window if token not in self.special])
            for i, text in zip(left, self._decode(windows), strict=True):
                texts[i] = text
            left = [i for i in left if len(texts[i]) < self.needed and size < sum(map(len, rows[i]))]
            size *= 2
        return texts

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)


class StopStringsCriteria(StoppingCriteria):
    """`StopStrings` for `generate`.

    Args:
        width: tokens of the prompts, padding included, which stand before the completions.
    """

    def __init__(self, stop_strings: StopStrings, width: int):
        self.stop_strings, self.width = stop_strings, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) bool: which rows of (B, L) end here."""
        reached = self.stop_strings.reached(input_ids[:, self.width :].tolist())
        return torch.tensor(reached, device=input_ids.device)
