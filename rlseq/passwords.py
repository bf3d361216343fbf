"""Passwords in what a user gives, which no file of a run may show."""

from __future__ import annotations

import re
from typing import Any

_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@:]*:([^\s/?#]+)@", re.IGNORECASE)
ADVICE = "in a reward's arguments an environment variable can stand for it: http://USER:${VARIABLE}@HOST/..."


def holds_password(value: Any) -> bool:
    """Whether a value, or anything in it, is a URL with a password; the name of an environment variable is none."""
    return any(not password.startswith("$") for password in _PASSWORD.findall(str(value)))
