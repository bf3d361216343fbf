"""The share of the fields of a JSON object that a completion gets right."""

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
    """Fields that are right / fields in the completion's object or in `record`; 1 only for that object alone.

    A field is a path of keys to a value that is no object; it is right if the other object has the same path with the
    same value (a whole number equals the same number written 35.0; text and true never equal a number). A key that is
    missing, invented or given twice lowers the value. A field with the right path and another value earns `named`:
    with more than 0, keys are learned before values, nested ones too. If text stands around the object, the first
    object in the text counts, and the value is multiplied by `surrounded`. Without an object the value is 0.

    Details: `exact` (1 if the value is 1), `objects` (1), `right` and `fields`, the two counts of the ratio.
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
