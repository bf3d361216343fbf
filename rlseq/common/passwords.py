"""Passwords and keys in what a user gives, which no file of a run may show."""

from __future__ import annotations

import re
from typing import Any

# A password, or over HTTP a user name alone, which is a token.
_USER = re.compile(
    r"[a-z][a-z0-9+.-]*://[^\s/?#@:]*:([^\s/?#]+)@|\b(?:https?|wss?)://([^\s/?#@:\"',<>]+):?@", re.IGNORECASE
)
_QUERY = re.compile(r"://[^\s\"'?]*\?([^\s\"'#]+)")
_KEY = re.compile(
    r"(?:^|[&;])[^=&;]*(?:key|token|secret|password|pwd|auth|sig|signature|credential)=([^&;]+)", re.IGNORECASE
)
ADVICE = (
    "in a reward's arguments an environment variable can stand for it: http://USER:${VARIABLE}@HOST/... or "
    "http://HOST/...?key=${VARIABLE}"
)


def holds_password(value: Any) -> bool:
    """Whether a value, or anything in it, is a URL with a password or key; an environment variable's name is none."""
    text = str(value)
    found = [password or token for password, token in _USER.findall(text)]
    found += [key for query in _QUERY.findall(text) for key in _KEY.findall(query)]
    return any(not secret.startswith("$") for secret in found)
