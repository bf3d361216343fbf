"""Keys of per-row statistics, and their form on file."""

import json

import numpy as np
import pytest

from rlseq.evaluation.statistics import CORPUS, LIKELIHOOD, REWARD, Statistic, rows_as_json, rows_from_json, rows_matrix

# Names that users may give, which hold every mark that a form on file could have.
NAMES = ["a", "b:sum", "a|b", "a'", '"a"', "x[1]", "corpus/a", "a, b", "", "größe\n", "\\", "reward:é"]


def test_whatever_users_call_their_rewards_no_two_statistics_share_a_form_and_each_is_read_back():
    made = [CORPUS("sum", a, b) for a in NAMES for b in NAMES]
    made += [REWARD(part, name) for name in NAMES for part in ("sum", "count")]
    row = {statistic: float(i) for i, statistic in enumerate(made)}
    (on_file,) = json.loads(json.dumps(rows_as_json([row], "completion")))
    assert len(on_file) == len(made)
    assert rows_from_json([on_file], "completion") == [row]


def test_the_form_on_file_says_the_source_only_where_it_is_not_the_blocks():
    row = {LIKELIHOOD("nll"): 1.5, LIKELIHOOD("pass_at", 4): 0.5, REWARD("sum", "wer"): 2.0}
    assert rows_as_json([row], "likelihood") == [{"nll": 1.5, "pass_at[4]": 0.5, 'reward/sum["wer"]': 2.0}]
    assert rows_from_json([{"nll": 1.0}], "coverage") == [{Statistic("coverage", "nll"): 1.0}]


def test_what_is_no_statistic_is_not_read():
    with pytest.raises(ValueError, match="'map:proven' is no statistic"):
        rows_from_json([{"map:proven": 1.0}], "completion")


def test_a_statistic_that_a_row_lacks_is_zero_in_the_matrix():
    rows = [{LIKELIHOOD("nll"): 1.0, LIKELIHOOD("tokens"): 2.0}, {LIKELIHOOD("tokens"): 3.0}]
    found = rows_matrix(rows, (LIKELIHOOD("tokens"), LIKELIHOOD("nll")))
    np.testing.assert_array_equal(found, [[2.0, 1.0], [3.0, 0.0]])
    assert rows_matrix([], (LIKELIHOOD("nll"),)).shape == (0, 1)
