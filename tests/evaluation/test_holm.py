"""p-values adjusted for their number, against hand arithmetic and simulated families."""

import math

import numpy as np
import pytest

from rlseq.evaluation.results.primary import adjusted
from rlseq.evaluation.stats.holm import holm


def test_holm_follows_by_hand():
    # In order .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, of which the last must not fall below .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([0.04]) == pytest.approx([0.04])
    assert holm([]).tolist() == []


def test_what_is_not_defined_does_not_count():
    assert holm([0.02, math.nan, 0.5]) == pytest.approx([0.04, math.nan, 0.5], nan_ok=True)


def test_one_family_in_twenty_has_a_false_finding():
    p = np.random.default_rng(0).random((4000, 10))  # no family has a difference
    assert np.mean([holm(family).min() < 0.05 for family in p]) == pytest.approx(0.05, abs=0.011)  # 3 standard errors
    assert np.mean(p.min(axis=1) < 0.05) > 0.35  # unadjusted


def comparison(a, b, metric, p):
    return {"a": a, "b": b, "strategy": "greedy", "metric": metric, "p_value": p}


def test_the_primary_comparison_and_single_seeds_of_a_method_are_not_adjusted():
    primary = {"a": "base", "b": "rl", "strategy": "greedy", "metric": "wer"}
    found, adjustment = adjusted(
        [
            comparison("base", "rl", "wer", 0.01),
            comparison("base", "rl", "length", 0.02),
            comparison("base", "sft", "wer", 0.03),
            comparison("base", "rl#1", "wer", 0.001),
            comparison("base", "sft", "length", math.nan),
        ],
        primary,
        ["base", "rl#1", "rl#2", "sft"],
    )
    p = [c["p_adjusted"] for c in found]
    assert p == pytest.approx([math.nan, 0.04, 0.04, math.nan, math.nan], nan_ok=True)
    assert [c["p_value"] for c in found][:4] == [0.01, 0.02, 0.03, 0.001]
    assert adjustment == {"method": "holm", "comparisons": 2}
    alone, adjustment = adjusted([comparison("base", "rl", "wer", 0.01)], None, ["base", "rl"])
    assert alone[0]["p_adjusted"] == 0.01 and adjustment["comparisons"] == 1
