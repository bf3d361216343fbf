"""Escapes for characters that cannot be encoded, control a terminal or change the direction of text."""

from __future__ import annotations

import re

# controls except tab and line feed; halves of surrogate pairs; marks that change the direction of text; line and
# paragraph separators
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text with such characters as JSON escapes (\\u202e): JSON text keeps its values."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
