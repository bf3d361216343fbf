"""Detection of passwords and keys in URLs, which no file of a run may show."""

from __future__ import annotations

import re
from typing import Any

# A password, or over HTTP a user name alone, which is a token. Each pattern starts at "://" or with a few letters: with
# a scheme of any length in front, the time would grow with the square of the text's length.
_USER = re.compile(
    r"(?<=[a-z0-9+.-])://[^\s/?#@:]*:([^\s/?#]+)@|\b(?:https?|wss?)://([^\s/?#@:\"',<>]+):?@", re.IGNORECASE
)
_WORD = re.compile(r"[^\s\"']+")
_KEY = re.compile(
    r"(?:^|[&;#])[^=&;#]*(?:key|token|secret|password|pwd|auth|sig|signature|credential)=([^&;#]+)", re.IGNORECASE
)
ADVICE = (
    "in a reward's arguments an environment variable can stand for it: http://USER:${VARIABLE}@HOST/... or "
    "http://HOST/...?key=${VARIABLE}"
)


def holds_password(value: Any) -> bool:
    """Whether a value, or anything in it, is a URL with a password or key. A variable's name (`${KEY}`) is not one."""
    text = str(value)
    found = [password or token for password, token in _USER.findall(text)]
    for word in _WORD.findall(text):
        _, _, url = word.partition("://")
        found += _KEY.findall(url.partition("?")[2])
    return any(not secret.startswith("$") for secret in found)
