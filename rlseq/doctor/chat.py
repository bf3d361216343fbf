"""Chat templates: how an answer ends, and whether what was said stays as it was when more is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlseq.doctor.check import FAILED, SKIPPED, WARNING, Problem, Result, judge

ANSWER = "It is 5."
TURNS = (
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "And 5 + 5?"},
    {"role": "assistant", "content": "That is 10."},
)


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the first special token that the chat template puts behind an answer; None where there is none."""
    try:
        rendered = _text(tokenizer, TURNS[:2])
    except Exception:  # a template may refuse messages by any error of its own; `check_template` says so
        return None
    _, answer, rest = rendered.rpartition(ANSWER)
    if not answer:
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    return next((i for i in tokenizer(text=rest, add_special_tokens=False)["input_ids"] if i in special), None)


def check_template(tokenizer: Any, *, chat: bool = False, several_turns: bool = True) -> Result:
    """The tokens of a prompt begin those of prompt and answer; with `several_turns`, also every later prompt's.

    Args:
        chat: whether the data is chat: a prompt that its answer changes is then a failure.
        several_turns: whether answers become part of later prompts.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Result("chat template", SKIPPED, "the tokenizer has none")
    problems: list[Problem] = []
    try:
        asked = _ids(tokenizer, TURNS[:1], True)
        answered = _ids(tokenizer, TURNS[:2], False)
        if (place := _parting(asked, answered)) is not None:
            todo = "render an answer behind its own generation prompt: training would see another prompt than sampling"
            found = f"an answer changes the prompt before it, at token {place}"
            problems.append((FAILED if chat else WARNING, found, todo))
        if several_turns:
            problems += _later_turns(tokenizer)
    except Exception as error:  # templates raise what they like
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Result("chat template", WARNING, f"it refuses turns of user and assistant: {reason}", "look into it")
    return judge("chat template", problems, lambda: "keeps what was said as more is said")


def _later_turns(tokenizer: Any) -> list[Problem]:
    turns = list(TURNS)
    if "</think>" in str(tokenizer.chat_template):
        turns[1] = {"role": "assistant", "content": f"<think>\nAdd.\n</think>\n\n{ANSWER}"}
    todo = "carry the sampled ids on from turn to turn; never render them again"
    for k in (2, 3):
        before = _ids(tokenizer, turns[:k], k % 2 == 1)
        after = _ids(tokenizer, turns[: k + 1], k % 2 == 0)
        if (place := _parting(before, after)) is not None:
            return [(WARNING, f"message {k + 1} changes what was said before it, at token {place}", todo)]
    spaced = f"  {ANSWER}  "
    if spaced not in _text(tokenizer, (TURNS[0], {"role": "assistant", "content": spaced})):
        return [(WARNING, "it strips white space off an answer", todo)]
    return []


def _parting(before: Sequence[int], after: Sequence[int]) -> int | None:
    """Where `after` parts from `before`; None if it begins with it."""
    if list(after[: len(before)]) == list(before):
        return None
    pairs = enumerate(zip(before, after, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(before), len(after)))


def _text(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def _ids(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=True)[
        "input_ids"
    ]
