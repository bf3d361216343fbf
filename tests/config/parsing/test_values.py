"""Values of settings against their types, from YAML as from flags."""

from enum import Enum
from typing import Any, Literal

import pytest

from rlseq.config.parsing.values import TypeMismatch, check_value


class Shade(Enum):
    LIGHT = "light"
    NO = "no"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        (1, int | str, 1),
        ("auto", int | str | None, "auto"),
        ("a", list[str], ["a"]),
        ({"func": "a"}, list[str | dict[str, Any]], [{"func": "a"}]),
        (["a", {"func": "a"}], list[str | dict], ["a", {"func": "a"}]),
        (None, list[str] | None, None),
        (1, list[float] | None, [1.0]),
        ([], list[int], []),
        ({"a": True}, dict[str, bool], {"a": True}),
        ("all", str | bool, "all"),
        (False, Shade | str, "no"),
        ("light", Shade | str, "light"),
        ([["x"]], Any, [["x"]]),
        (False, str | None | Literal[False], False),
    ],
)
def test_a_value_of_its_type_is_taken_as_a_flag_would_give_it(value, hint, expected):
    taken = check_value(value, hint)
    assert taken == expected and type(taken) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("0x10", float),
        ("nan", float),
        (True, float),
        (2.0, int),
        (None, int),
        ("dark", Shade | str),
        (True, Literal[1]),
        ({"a": 3}, dict[str, bool]),
        (["a", 1], list[str]),
        ("{}", dict),
    ],
)
def test_a_value_of_another_type_is_refused(value, hint):
    with pytest.raises(TypeMismatch):
        check_value(value, hint)


# The dataclasses' own checks
