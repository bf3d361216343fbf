"""What one call of a reward gave: a value and a status, never a guess."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import RewardError

FAILURES = ("error", "timeout", "invalid")


class Outcome(NamedTuple):
    """The result for one completion.

    `status` is "ok", "abstained" (the reward returned None), "error" (it raised), "timeout" (it was killed)
    or "invalid" (not a finite number). `message` says what went wrong, for the three failures.
    """

    value: float | None
    status: str
    details: Mapping[str, Any]
    message: str = ""


class Failed(NamedTuple):
    """A call that gave no result: the status of its rows, and what happened."""

    status: str
    message: str


NO_DETAILS: Mapping[str, Any] = {}
ABSTAINED = Outcome(None, "abstained", NO_DETAILS)


def interpret(raw: Any) -> Outcome:
    """Turn what a reward returned for one completion into an `Outcome`.

    Accepts a number (Python, numpy or a tensor of one element), None, or a pair (number or None, dict of
    details).
    """
    if raw is None:
        return ABSTAINED
    if type(raw) is tuple and len(raw) == 2 and isinstance(raw[1], Mapping):
        inner = interpret(raw[0])
        return inner._replace(details=dict(raw[1]))
    if not isinstance(raw, numbers.Real):
        with contextlib.suppress(AttributeError, ValueError, RuntimeError):
            raw = raw.item()  # numpy and torch scalars
        if not isinstance(raw, numbers.Real):
            given = f"{type(raw).__name__} {shorten(raw)}"
            return Outcome(None, "invalid", NO_DETAILS, f"returned {given}; expected a number or None")
    value = float(raw)
    if not math.isfinite(value):
        return Outcome(None, "invalid", NO_DETAILS, f"returned {value}; expected a finite number, or None to abstain")
    return Outcome(value, "ok", NO_DETAILS)


def interpret_score_dict(raw: Any) -> Outcome:
    """As `interpret`, and also for verl's dict, whose "score" is the value and whose rest is details."""
    if isinstance(raw, Mapping):
        if "score" not in raw:
            given = ", ".join(map(str, raw)) or "nothing"
            return Outcome(None, "invalid", NO_DETAILS, f"returned a dict with {given}; expected a key 'score'")
        return interpret(raw["score"])._replace(details={k: plain(v) for k, v in raw.items() if k != "score"})
    return interpret(raw)


def interpret_many(raw: Any, count: int, name: str) -> list[Outcome]:
    """Turn what a batch call returned into one `Outcome` a completion.

    Raises:
        RewardError: when it is no sequence, or has another length than `count`: then nothing says which value
            belongs to which completion.
    """
    raw = plain(raw)
    if isinstance(raw, (str, bytes, Mapping)) or not isinstance(raw, Sequence):
        raise RewardError(
            f"reward {name!r} returned {type(raw).__name__} {shorten(raw)} for {count} completions; expected a list of "
            f"{count} numbers (None abstains)."
        )
    if len(raw) != count:
        raise RewardError(
            f"reward {name!r} returned {len(raw)} values for {count} completions; expected one value a completion, "
            "None where it abstains."
        )
    return [interpret(value) for value in raw]


def interpret_reward_dict(raw: Any, count: int, name: str) -> list[Outcome]:
    """As `interpret_many`, and also for OpenRLHF's dict: "rewards" are the values, "extra_logs" the
    details."""
    if not isinstance(raw, Mapping):
        return interpret_many(raw, count, name)
    if "rewards" not in raw:
        given = ", ".join(map(str, raw)) or "nothing"
        raise RewardError(f"reward {name!r} returned a dict with {given}; expected a key 'rewards'.")
    outcomes = interpret_many(raw["rewards"], count, name)
    logs = {key: plain(values) for key, values in (raw.get("extra_logs") or {}).items()}
    per_row = {k: v for k, v in logs.items() if isinstance(v, Sequence) and not isinstance(v, str) and len(v) == count}
    return [
        outcome._replace(details={key: values[row] for key, values in per_row.items()})
        for row, outcome in enumerate(outcomes)
    ]


def plain(value: Any) -> Any:
    """Numpy arrays and tensors as lists or numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def shorten(value: Any, width: int = 200) -> str:
    """The repr of a value, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}... ({len(text)} characters)"
