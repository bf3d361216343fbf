"""Values in messages: escapes for characters that act on a terminal or cannot be encoded, and a limit of length."""

from __future__ import annotations

import re
from typing import Any

# controls except tab and line feed; halves of surrogate pairs; marks that change the direction of text; line and
# paragraph separators
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text with such characters as JSON escapes (\\u202e): JSON text keeps its values."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shortened(value: Any, longest: int = 200) -> str:
    """Return the repr of a value, cut to this many characters."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
