"""What one call of a reward gave: a value and a status, never a guess."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlseq.errors import RewardError

FAILURES = ("error", "timeout", "invalid")


class Outcome(NamedTuple):
    """The result for one completion.

    `status` is "ok", "abstained" (the reward returned None), "error" (it raised), "timeout" (it was killed)
    or "invalid" (neither a finite number nor one per token). `message` says what went wrong, for the three failures.
    """

    value: float | None
    status: str
    details: Mapping[str, Any]
    message: str = ""


class Failed(NamedTuple):
    """A call that gave no result: the status of its rows, and what happened."""

    status: str
    message: str


LARGEST = 1e18  # training computes in float32, which must hold the square of a value for the standard deviation
DEEPEST = 40  # levels of details that are kept
ROUNDING = 1e-6  # share by which a value may pass its declared range
NO_DETAILS: Mapping[str, Any] = {}
TOKEN_REWARDS = "token_rewards"
EXPECTED = "expected a number, None to abstain, or one number per token of completion_ids"
ABSTAINED = Outcome(None, "abstained", NO_DETAILS)


class ArrayOfOne(list):
    """What was an array or tensor of one element: a number, or the one value of a completion of one token."""


def interpret(raw: Any, length: int) -> Outcome:
    """Turn what a reward returned for one completion of `length` tokens into an `Outcome`.

    Accepts a number (Python, numpy or a tensor of one element), None, one number per token (a list, a tuple, an
    array or a tensor of one axis), or a pair (one of these, dict of details). The value of a list is its
    sum; the details keep the list as `token_rewards`.
    """
    if raw is None:
        return ABSTAINED
    if type(raw) is tuple and len(raw) == 2 and isinstance(raw[1], Mapping):
        if TOKEN_REWARDS in raw[1]:
            return _invalid(f"returned details with {TOKEN_REWARDS!r}; return the list itself as the value")
        inner = interpret(raw[0], length)
        return inner._replace(details={**snapshot(raw[1]), **inner.details})
    if not isinstance(raw, numbers.Real):
        raw = plain(raw)
        if type(raw) is ArrayOfOne and length != 1:
            raw = raw[0]
        if isinstance(raw, (list, tuple)):
            return _interpret_tokens(raw, length)
        if inspect.iscoroutine(raw):
            raw.close()
            return _invalid("returned a coroutine that nobody awaits; declare the reward itself with async def")
        if not isinstance(raw, numbers.Real):
            return _invalid(f"returned {type(raw).__name__} {shorten(raw)}; {EXPECTED}")
    value = _float(raw)
    return _valid(value, NO_DETAILS)


def _valid(value: float, details: Mapping[str, Any]) -> Outcome:
    if not math.isfinite(value):
        return _invalid(f"returned {value}; expected a finite number, or None to abstain")
    if abs(value) > LARGEST:
        return _invalid(f"returned {value:g}, which training cannot compute with; expected at most {LARGEST:g} in size")
    return Outcome(value, "ok", details)


def in_range(outcome: Outcome, limits: tuple[float, float] | None) -> Outcome:
    """The outcome, or an invalid one where its value is outside the range that the reward declares."""
    if limits is None or outcome.status != "ok" or outcome.value is None:
        return outcome
    low, high = limits
    slack = ROUNDING * max(1.0, *(abs(limit) for limit in limits if math.isfinite(limit)), 1.0)
    if low - slack <= outcome.value <= high + slack:
        return outcome
    what = f"returned {outcome.value:g}, outside the range {low:g} to {high:g} that it declares"
    return outcome._replace(value=None, status="invalid", message=what)


def _interpret_tokens(raw: Sequence[Any], length: int) -> Outcome:
    """One number per token: their sum, with the numbers in the details."""
    if len(raw) != length:
        return _invalid(f"returned {len(raw)} values for {length} tokens ({shorten(raw, 80)}); {EXPECTED}")
    values = []
    for place, item in enumerate(map(plain, raw)):
        item = item[0] if type(item) is ArrayOfOne else item
        if not isinstance(item, numbers.Real) or not math.isfinite(_float(item)):
            return _invalid(f"returned {shorten(item, 80)} for token {place} of {length}; expected a finite number")
        values.append(float(item))
    return _valid(math.fsum(values), {TOKEN_REWARDS: values})


def _float(number: numbers.Real) -> float:
    """The number as a float; one that is too large is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _invalid(message: str) -> Outcome:
    return Outcome(None, "invalid", NO_DETAILS, message)


def interpret_score_dict(raw: Any, length: int) -> Outcome:
    """As `interpret`, and also for verl's dict, whose "score" is the value and whose rest is details."""
    if isinstance(raw, Mapping):
        if "score" not in raw:
            given = ", ".join(map(str, raw)) or "nothing"
            return _invalid(f"returned a dict with {given}; expected a key 'score'")
        return interpret((raw["score"], {k: plain(v) for k, v in raw.items() if k != "score"}), length)
    return interpret(raw, length)


def interpret_many(raw: Any, lengths: Sequence[int], name: str) -> list[Outcome]:
    """Turn what a batch call returned for completions of these lengths (tokens) into an `Outcome` each.

    Raises:
        RewardError: when it is not a sequence, or has another length than `lengths`: then nothing says which value
            belongs to which completion.
    """
    raw, count = plain(raw), len(lengths)
    if isinstance(raw, (str, bytes, Mapping)) or not isinstance(raw, Sequence):
        raise RewardError(
            f"reward {name!r} returned {type(raw).__name__} {shorten(raw)} for {count} completions; expected a list of "
            f"{count} numbers (None abstains)."
        )
    if len(raw) != count:
        raise RewardError(
            f"reward {name!r} returned {len(raw)} values for {count} completions; expected one value per completion, "
            "None where it abstains."
        )
    return [interpret(value, length) for value, length in zip(raw, lengths, strict=True)]


def interpret_reward_dict(raw: Any, lengths: Sequence[int], name: str) -> list[Outcome]:
    """As `interpret_many`, and also for OpenRLHF's dict: "rewards" are the values, "extra_logs" the
    details."""
    if not isinstance(raw, Mapping):
        return interpret_many(raw, lengths, name)
    if "rewards" not in raw:
        given = ", ".join(map(str, raw)) or "nothing"
        raise RewardError(f"reward {name!r} returned a dict with {given}; expected a key 'rewards'.")
    outcomes, count = interpret_many(raw["rewards"], lengths, name), len(lengths)
    logs = snapshot({key: plain(values) for key, values in (raw.get("extra_logs") or {}).items()})
    per_row = {k: v for k, v in logs.items() if isinstance(v, Sequence) and not isinstance(v, str) and len(v) == count}
    return [
        outcome._replace(details={key: values[row] for key, values in per_row.items()} | dict(outcome.details))
        for row, outcome in enumerate(outcomes)
    ]


def plain(value: Any) -> Any:
    """Numpy arrays and tensors as numbers or lists (of one element: `ArrayOfOne`); anything else as it is."""
    if not hasattr(value, "tolist"):
        return value
    light = inner = value.tolist()
    while isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    return ArrayOfOne([inner]) if isinstance(light, list) and not isinstance(inner, list) else light


def snapshot(value: Any, depth: int = DEEPEST) -> Any:
    """Details as they are now, in JSON's types: arrays as lists, anything else as its text.

    What contains itself, or is nested `depth` levels deep, ends in "...".
    """
    if value is None or type(value) in (bool, float, str):
        return value
    if depth == 0:
        return "..."
    try:
        value = plain(value)
    except Exception:  # a sparse tensor, one on the meta device
        return text_of(value)
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to print it
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else text_of(key): snapshot(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(item, depth - 1) for item in value]
    return text_of(value)


def json_ready(value: Any) -> Any:
    """As `snapshot`, with NaN and infinities as null."""
    return _finite(snapshot(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def text_of(value: Any) -> str:
    """The text of an object, or of an exception; of one whose text cannot be made, its type."""
    return _made_text(str, value)


def _made_text(make: Callable[[Any], str], value: Any) -> str:
    try:
        return str.__str__(make(value))
    except Exception as error:
        return f"<{type(value).__name__}, of which {make.__name__}() raises {type(error).__name__}>"


def shorten(value: Any, width: int = 200) -> str:
    """The repr of a value, cut to `width` characters."""
    text = _made_text(repr, value)
    return text if len(text) <= width else f"{text[:width]}... ({len(text)} characters)"
