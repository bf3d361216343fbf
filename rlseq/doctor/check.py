"""The result of a check: its status, what was found and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"

Problem = tuple[str, str, str]  # status, what was found, what to do


@dataclass(frozen=True)
class Result:
    """One check's result.

    Attributes:
        check: its name.
        status: "ok", "warning" (works in rlseq, or costs something), "failed" or "skipped".
        found: what was found, or why the check was skipped.
        todo: what to do about it, one line per problem; empty where there is nothing to do.
    """

    check: str
    status: str
    found: str
    todo: str = ""

    @property
    def sentence(self) -> str:
        """What was found and what to do, on one line."""
        return f"{self.check}: {self.found}. To do: {'; '.join(self.todo.splitlines())}."


def judge(check: str, problems: Sequence[Problem], fine: Callable[[], str]) -> Result:
    """One result for several problems, with the worst status; without problems it says `fine()`."""
    if not problems:
        return Result(check, OK, fine())
    status = FAILED if any(status == FAILED for status, _, _ in problems) else WARNING
    todos = dict.fromkeys(todo for _, _, todo in problems)
    return Result(check, status, "; ".join(found for _, found, _ in problems), "\n".join(todos))


def named(tokenizer: Any, token: int | None) -> str:
    """A token as `<eos> (1)`."""
    return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"
