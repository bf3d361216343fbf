"""Tables in the terminal."""

from __future__ import annotations

import pytest

from rlseq.common.tables import render_table


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")


def test_columns_are_aligned_left_or_right_below_their_names():
    assert render_table([("wer", 0.5), ("exact_match", 12)], ("reward", "n"), right=[1]).splitlines() == [
        "reward         n",
        "─" * 16,
        "wer          0.5",
        "exact_match   12",
    ]


def test_a_table_without_a_header_has_rows_alone():
    assert render_table([("a", "1"), ("bcd", "22")], right=[1]).splitlines() == ["a     1", "bcd  22"]


def test_wide_text_is_wrapped_within_its_column_and_none_is_lost():
    words = " ".join(f"word{i}" for i in range(30))
    lines = render_table([("a", words), ("b", "x" * 100)], ("name", "text")).splitlines()
    assert max(map(len, lines)) <= 60
    assert [line[0] for line in lines if line[:1].strip()] == ["n", "─", "a", "b"]
    joined = "".join(line[4:] for line in lines[2:]).replace(" ", "")
    assert joined == words.replace(" ", "") + "x" * 100


def test_numbers_stay_whole_and_columns_without_room_follow_below():
    header = ("reward", "weight", "exact_match", "mean log-prob", "n", "abstained")
    row = ("phoneme_accuracy", "1", "0.5992", "-0.25", "307,200", "0")
    assert render_table([row], header, right=range(1, 6)).splitlines() == [
        "                          exact_      mean",
        "reward            weight   match  log-prob        n",
        "───────────────────────────────────────────────────",
        "phoneme_accuracy       1  0.5992     -0.25  307,200",
        "",
        "reward            abstained",
        "───────────────────────────",
        "phoneme_accuracy          0",
    ]


def test_a_name_wider_than_half_the_terminal_is_wrapped_and_hides_no_number():
    lines = render_table([("a" * 70, "307,200", "0.5992")], ("reward", "n", "mean"), right=[1, 2]).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(line.count("a") for line in lines[2:]) == 70
    assert [word for line in lines[2:] for word in line.replace("a", "").split()] == ["307,200", "0.5992"]


def test_markup_and_control_characters_are_shown_as_they_are():
    assert "[red]a[/red] \\u001b[2J" in render_table([("[red]a[/red] \x1b[2J", "")])
