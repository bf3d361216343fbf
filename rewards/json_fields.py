"""The share of correct fields in the JSON object of a completion."""

import json
from typing import Any

from rlseq.scoring import Ratio, reward

_DECODER = json.JSONDecoder(object_pairs_hook=lambda pairs: _Pairs(pairs))


@reward(
    range=(0, 1),
    corpus={
        "exact_objects": Ratio(
            "exact",
            "objects",
            higher_is_better=True,
            description="exact objects: share of completions that are the object and nothing else",
        )
    },
)
def json_fields(
    completion: str, record: dict[str, Any], surrounded: float = 0.5, named: float = 0.0
) -> tuple[float, dict]:
    """Return the number of correct fields over the number of distinct fields in the completion's object and `record`.

    The value is 1 only if the completion is exactly that object and nothing else. It is 0 if there is no JSON object.

    A field is a path of keys to a value that is not an object. It is correct if `record` has the same value at the
    same path. 35 equals 35.0; strings and booleans never equal a number. Missing, additional and duplicate keys lower
    the value.

    Args:
        completion: its first JSON object is read.
        record: the object that is expected.
        surrounded: factor on the value if there is text before or after the object.
        named: credit for a field with the correct path and another value. Above 0, keys are learned before values.

    Returns:
        (value, details). The details are `exact` (1 if the value is 1), `objects` (1), `right` (correct fields) and
        `fields` (distinct fields).
    """
    found, alone = _first_object(completion)
    if found is None:
        return 0.0, {"exact": 0, "objects": 1, "right": 0, "fields": len(dict(_fields(record)))}
    wanted, given = dict(_fields(record)), list(_fields(found))
    paths = {path for path, _ in given}
    fields = len(wanted.keys() | paths) + len(given) - len(paths)  # a key that is given twice counts twice
    equal = [_equal(wanted.pop(path), value) for path, value in given if path in wanted]
    right = sum(equal)
    earned = right + named * (len(equal) - right)
    value = (earned / fields if fields else 1.0) * (1.0 if alone else surrounded)
    return value, {"exact": int(value == 1.0), "objects": 1, "right": right, "fields": fields}


class _Pairs(list):
    """A JSON object as its (key, value) pairs, so that a key that is given twice is seen."""


def _first_object(text: str) -> tuple[_Pairs | None, bool]:
    """Return the first JSON object of a text, None without one, and whether nothing but white space is around it."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value, not text[:start].strip() and not text[end:].strip()
    return None, False


def _fields(value: Any, path: tuple[str, ...] = ()):
    """Yield (path of keys, value) of everything that is not an object; an empty object is a value."""
    pairs = value if isinstance(value, _Pairs) else value.items() if isinstance(value, dict) else None
    if pairs:
        for key, inner in pairs:
            yield from _fields(inner, (*path, key))
    elif path or pairs is None:
        yield path, value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(b, _Pairs):  # within a list
        inner = dict(b)
        same_keys = isinstance(a, dict) and len(inner) == len(b) and inner.keys() == a.keys()
        return same_keys and all(_equal(a[key], value) for key, value in b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
