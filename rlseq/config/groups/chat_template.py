"""What --chat_template and --chat_template_kwargs stand for: the text of a file, and a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.errors import ConfigError


def template_options(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """What --chat_template_kwargs stands for: a mapping, or the JSON of one.

    Raises:
        ConfigError: it is neither.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ConfigError(f"--chat_template_kwargs {given!r} is not JSON: {error}") from None
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f'--chat_template_kwargs is {found!r}; expected a mapping, as {{"enable_thinking":false}}')
    return dict(found or {})


def read_chat_template(path: str | None) -> str | None:
    """The text of the file that --chat_template names; None where none is named.

    Raises:
        ConfigError: there is no such file, or it is not a template as transformers compiles them.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--chat_template {path!r} cannot be read: {reason}. Name a file of a Jinja template."
        ) from None
    if not text.strip():
        raise ConfigError(f"--chat_template {path!r} is an empty file; expected a Jinja template of chat messages")
    # Imported here: --help needs neither.
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=text)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"--chat_template {path!r} is not valid Jinja: {error.message} (line {error.lineno})"
        ) from None
    except Exception:  # it may refuse this conversation: `rlseq.data.chat.tokenize_prompts` reports on the rows'
        pass
    return text
