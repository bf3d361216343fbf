"""How many characters of a completion each of its tokens is, so that log-probs can shade them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TokenLengths:
    """Splits completions at their tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    @classmethod
    def of(cls, run: Path) -> TokenLengths | None:
        """Those of a run's tokenizer; None for a run without a tokenizer.json."""
        path = run / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

    def lengths(self, ids: Sequence[int], text: str) -> list[int] | None:
        """Characters of each token, in order; None if the tokens do not spell this text.

        A token that is a part of a character has 0; the last token of that character has its length.
        """
        lengths, pending, position = [], [], 0
        for token in ids:
            pending.append(token)
            piece = self._piece(token) if len(pending) == 1 else self._decode(pending)
            if not text.startswith(piece, position):
                piece = " " + piece  # tokenizers of SentencePiece take a first space away
                if not text.startswith(piece, position):
                    lengths.append(0)
                    continue
            lengths.append(len(piece))
            position += len(piece)
            pending = []
        return lengths if position == len(text) and not pending else None

    def _piece(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._decode([token])
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
