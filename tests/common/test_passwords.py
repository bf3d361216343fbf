"""Passwords and keys in URLs are found, in the time it takes to read the text."""

import time

import pytest

from rlseq.common.passwords import holds_password


@pytest.mark.parametrize(
    "value",
    [
        "http://user:secret@host/v1",
        "postgresql+psycopg2://user:p@ss@host/db",
        "see https://token@host, please",
        "wss://token:@host",
        {"judge": ["a", "https://host/v1?model=m&api_key=abc"]},
        "https://host/#/route?x=1;sig=abc",
        "https://host/v1?x=1#b?access_token=abc",
    ],
)
def test_a_password_or_key_is_found_wherever_it_stands(value):
    assert holds_password(value)


@pytest.mark.parametrize(
    "value",
    [
        "http://host:8000/v1",
        "http://user:${PASSWORD}@host/v1",
        "https://host/v1?api_key=${KEY}",
        "mail me@host: key=value",
        "://",
        "?key=1",
        ["https://host/v1?model=m", "user:secret@host"],
        4,
        None,
    ],
)
def test_other_text_holds_none(value):
    assert not holds_password(value)


@pytest.mark.parametrize("unit", ["a", "a:", "a://", "a://b?", "a://b:", "&key", "http://"])
def test_long_text_takes_no_longer_than_reading_it(unit):
    text = unit * (400_000 // len(unit))
    started = time.process_time()
    assert not holds_password(text)
    assert time.process_time() - started < 5  # the square of the length would take many minutes
