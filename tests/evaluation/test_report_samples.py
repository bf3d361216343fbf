"""The report's samples: rows that got better or worse, marked differences, and pass@k from samples."""

import pytest
from tiny_report import sample

from rlseq.evaluation.report.samples import marked_pieces, monte_carlo_pass_at_k, pair_samples


def test_gains_and_losses_are_ranked_and_counted(samples):
    side = pair_samples(samples, "base", "rl", "greedy")
    assert [(row.key, row.gain) for row in side.better] == [
        ("r4", pytest.approx(0.7)),
        ("r1", pytest.approx(0.5)),
    ]
    assert [row.key for row in side.worse] == ["r2"]
    assert side.counts == {"better": 2, "same": 1, "worse": 1, "changed": 3}
    assert side.changed == ()  # what stayed at its score stayed as it was
    assert {row.key for row in side.random} == {"r1", "r2", "r3", "r4"}
    assert side.score_name == "accuracy_x"
    assert pair_samples(samples, "base", "rl", "beam") is None


def test_rows_score_the_mean_over_their_samples_and_repeats_are_counted():
    samples = [
        sample("base", "r", "K AE T", 1.0, number=0),
        sample("base", "r", "K", 0.0, number=1),
        sample("base", "r", "K AE T", 1.0, number=2),
        sample("rl", "r", "K AE T", None, number=0) | {"values": {"accuracy_x": None}},
        sample("rl", "r", "K AE T", 1.0, number=1),
    ]
    row = pair_samples(samples, "base", "rl", "greedy").better[0]
    assert row.a.score == pytest.approx(2 / 3) and row.b.score == 1.0  # what abstained is not a zero
    assert [count for count, _ in row.a.completions] == [2, 1]


def test_rows_that_changed_at_an_equal_score_are_shown():
    samples = [sample("base", "r", "K", 0.0), sample("rl", "r", "K T", 0.0)]
    samples += [sample("base", "s", "AE", 1.0), sample("rl", "s", "AE", 1.0)]
    side = pair_samples(samples, "base", "rl", "greedy")
    assert [row.key for row in side.changed] == ["r"]
    assert side.counts == {"better": 0, "same": 2, "worse": 0, "changed": 1}


def test_pieces_mark_what_differs_from_the_closest_reference():
    references = ["K AE T S", "D AO G"]
    assert marked_pieces("K AE D S", references) == (("K AE ", "same"), ("D ", "wrong"), ("S", "same"))
    assert marked_pieces("D G", references) == (("D ", "same"), ("AO", "missing"), ("G", "same"))
    assert marked_pieces("quite another text", references) == (("quite another text", "same"),)
    assert marked_pieces("K AE T S", references) == (("K AE T S", "same"),)
    assert marked_pieces(" ", references) == ()


def test_monte_carlo_pass_at_k_follows_by_hand():
    # Two rows of two samples: one right of two, none right. pass@1 = (1/2 + 0) / 2, pass@2 = (1 + 0) / 2.
    samples = [
        sample("m", "r1", "K AE T", 1, "sample", 0),
        sample("m", "r1", "K", 0, "sample", 1),
        sample("m", "r2", "D", 0, "sample", 0),
        sample("m", "r2", "K AE T", 0, "sample", 1) | {"finish_reason": "length"},  # cut: not the reference
    ]
    assert monte_carlo_pass_at_k(samples, "sample", 2) == {"m": {1: 0.25, 2: 0.5}}
    assert monte_carlo_pass_at_k(samples, "sample", 3) == {}  # a part of the rows estimates something else
