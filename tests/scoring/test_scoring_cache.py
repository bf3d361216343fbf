"""The cache of reward values: what it keeps, what it tells apart, and who shares it."""

from __future__ import annotations

import functools
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_rollouts import only, score

from rlseq.errors import RewardError
from rlseq.scoring.cache import Cache
from rlseq.scoring.outcome import Outcome

CALLS = []  # what the rewards below were called with; no closure, whose contents the key would hold


@pytest.fixture
def calls():
    CALLS.clear()
    return CALLS


def judge(completion, level=0):
    CALLS.append(completion)
    if completion == "raise":
        raise ValueError
    return None if completion == "none" else (float(len(completion)) + level, {"said": completion})


def test_the_cache_keeps_values_abstentions_and_details_but_no_failures(tmp_path, calls):
    spec = {"func": judge, "cache": str(tmp_path / "c.sqlite"), "on_error": "abstain"}
    texts = ["a", "none", "raise", "a"]
    first, second = score(spec, texts), score(spec, texts)
    assert calls == ["a", "none", "raise", "raise"]
    assert first.values == second.values == {"judge": [1.0, None, None, 1.0]}
    assert first.status == second.status == {"judge": ["ok", "abstained", "error", "ok"]}
    assert second.details["judge"][0] == {"said": "a"}


def test_the_cache_knows_arguments_and_columns_apart(tmp_path, calls):
    def score_with(kwargs, columns):
        return only(
            score({"func": judge, "cache": str(tmp_path / "c"), "kwargs": kwargs}, ["a"], columns=columns), "values"
        )

    assert score_with({}, {}) == [1.0]
    assert score_with({"level": 2}, {}) == [3.0]
    assert score_with({}, {"level": [5]}) == [6.0]
    assert score_with({}, {"unread": [5]}) == [1.0]  # what the reward does not read changes nothing
    assert len(calls) == 3


def test_the_cache_forgets_values_of_changed_code(tmp_path):
    path = tmp_path / "judge.py"
    for value in (1, 2):
        path.write_text(f"def judge(completion): return {value}\n")
        assert only(score({"func": f"{path}:judge", "cache": str(tmp_path / "c")}, ["a"]), "values") == [value]


def test_a_batch_form_is_cached_row_by_row_and_a_group_as_a_whole(tmp_path, calls):
    def batch(completions, **kwargs):
        CALLS.append(list(completions))
        return [float(len(c)) for c in completions]

    spec = {"func": batch, "cache": str(tmp_path / "c")}
    score(spec, ["a", "bb"])
    assert only(score(spec, ["bb", "ccc", "a"]), "values") == [2.0, 3.0, 1.0]
    assert calls == [["a"], ["bb"], ["ccc"]]


def test_processes_share_a_cache_file(tmp_path):
    path = tmp_path / "c.sqlite"
    script = """
import sys
from rlseq.scoring.cache import Cache
from rlseq.scoring.outcome import Outcome
start = int(sys.argv[2])
for i in range(start, start + 20):
    Cache(sys.argv[1]).put({f"k{i}": [Outcome(float(i), "ok", {})]})
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), str(20 * i)]) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = Cache(path).get(f"k{i}" for i in range(60))
    assert [found[f"k{i}"][0].value for i in range(60)] == [float(i) for i in range(60)]


def test_the_cache_is_a_plain_sqlite_file_of_json(tmp_path):
    Cache(tmp_path / "c").put({"k": [Outcome(0.5, "ok", {"a": np.float64(1)})]})
    with sqlite3.connect(tmp_path / "c") as database:
        assert database.execute("SELECT * FROM rewards").fetchall() == [("k", '[[0.5, "ok", {"a": 1.0}]]')]


def test_a_cache_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "c").write_text("this is no database, however long one looks at it " * 20)
    with pytest.raises(RewardError, match="cannot be used: file is not a database"):
        score({"func": "constant", "cache": str(tmp_path / "c")}, ["a"])


def test_details_are_equal_from_the_cache_and_without_one(tmp_path):
    def judge(completion):
        return 1.0, {"what": Path("a"), "pair": (1, 2), 3: None}

    spec = {"func": judge, "cache": str(tmp_path / "c")}
    details = [score(one, ["a"]).details["judge"][0] for one in (judge, spec, spec)]
    assert details == [{"what": "a", "pair": [1, 2], "3": None}] * 3


class Scorer:
    def __init__(self, points):
        self.points = points

    def __call__(self, completion):
        return self.points

    def score_it(self, completion):
        return self.points


def scorer(points):
    def score_it(completion):
        return points

    return score_it


def calling(function):
    def score_it(completion):
        return function()

    return score_it


@pytest.mark.parametrize(
    "make",
    [
        Scorer,
        scorer,
        lambda points: functools.partial(judge, level=points - 1),
        lambda points: calling(lambda: points),
        lambda points: Scorer(points).score_it,
    ],
    ids=["object", "closure", "partial", "closure over a closure", "method"],
)
def test_the_cache_tells_apart_what_a_function_carries(tmp_path, make):
    for points in (1.0, 2.0, 1.0):
        assert only(score({"func": make(points), "name": "f", "cache": str(tmp_path / "c")}, ["a"]), "values") == [
            points
        ]


def test_a_decorated_reward_has_the_same_key_in_every_process(tmp_path):
    path = tmp_path / "judged.py"
    path.write_text(
        "def twice(f):\n    def inner(completion): return 2 * f(completion)\n    return inner\n\n"
        "@twice\ndef judged(completion): return len(completion)\n"
    )
    script = f"from rlseq import load_rewards; print(load_rewards([{f'{path}:judged'!r}]).fingerprint())"
    said = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(said) == 1
    assert "code" in said.pop()


def test_a_cache_in_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match="cannot be used"):
        score({"func": "constant", "cache": str(tmp_path / "file" / "c.sqlite")}, ["a"])
