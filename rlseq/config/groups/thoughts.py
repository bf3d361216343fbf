"""The setting of models that think before they answer."""

from __future__ import annotations

from dataclasses import dataclass

from rlseq.config.fields import Conflict, setting


@dataclass
class ThoughtArguments:
    """What ends a thought."""

    think_end: str | None = setting(
        None,
        "Text that ends the thought in a completion, e.g. </think>: rewards may ask for `thought` (the text before it) "
        "and `answer` (after it), and thoughts have metrics.",
        metavar="TEXT",
        conflicts=(
            Conflict("is empty; name the text that ends a thought, e.g. </think>", lambda config: not config.think_end),
            Conflict(
                "is {think_end!r}, which holds one of the stop strings {stop_strings}: completions would end before "
                "it. Leave out one of them.",
                lambda config: any(
                    text and text in config.think_end for text in getattr(config, "stop_strings", None) or ()
                ),
            ),
        ),
    )
