"""Characters that cannot be encoded, act on a terminal or turn the direction of text: shown as escapes."""

from __future__ import annotations

import re

# controls but tab and line breaks; halves of surrogate pairs; marks that change the direction of what follows; line and
# paragraph separators
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with such characters as escapes (\\u202e), for reports and messages."""
    return _HIDDEN.sub(_escape, text)


def encodable(json_text: str) -> str:
    """JSON text with such characters as its escapes: the same values when read, and always UTF-8."""
    return _HIDDEN.sub(_escape, json_text)


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
