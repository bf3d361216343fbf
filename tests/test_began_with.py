"""The rewards and rows of a run are those it began with: in replaced workers, and when it goes on."""

import sys

import pytest

from rlseq.errors import RunDirectoryError
from rlseq.scoring import load_rewards
from rlseq.training.began_with import began_with, changes, check_unchanged, write
from rlseq.types import Rollout

SOURCE = """
import os
def drift(completion):
    if completion == "die":
        os._exit(3)
    return VALUE
VALUE = 1.0
"""


def values(suite, *texts):
    rollouts = [Rollout("p", 0, (5,), (True,), (-1.0,), t, t, None, "stop", "sample") for t in texts]
    return suite.score(rollouts, {"prompt": ["p"] * len(texts)}).values["drift"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "drift.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "drifting_module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "drifting_module.py"
    sys.modules.pop("drifting_module", None)


@pytest.mark.parametrize("left", [SOURCE.replace("1.0", "100.0"), "def drift(", None])
def test_a_worker_that_takes_anothers_place_runs_the_code_of_the_beginning(file, left):
    spec = {"func": f"{file}:drift", "workers": 1, "on_error": "abstain"}
    with load_rewards([spec], max_error_rate=1.0) as suite:
        assert values(suite, "a") == [1.0]
        file.unlink() if left is None else file.write_text(left)
        assert values(suite, "die", "a") == [None, 1.0]  # the second by a worker that was started after the edit


def test_so_does_a_worker_of_an_installed_module(module):
    spec = {"func": "drifting_module:drift", "workers": 1, "on_error": "abstain"}
    with load_rewards([spec], max_error_rate=1.0) as suite:
        module.write_text(SOURCE.replace("1.0", "100.0"))
        assert values(suite, "die", "a") == [None, 1.0]


def described(file, rows, kwargs=None, weight=1.0):
    spec = {"func": f"{file}:drift", "weight": weight} | ({"kwargs": kwargs} if kwargs else {})
    return began_with({"reward": load_rewards([spec]), "eval reward": None}, {"training rows": rows})


def test_what_differs_is_named(tmp_path):
    file = tmp_path / "drift.py"
    file.write_text("def drift(completion, scale=1): return scale")
    before = described(file, [("a", 1), ("b", 2)])
    assert changes(before, described(file, [("a", 1), ("b", 2)])) == []
    assert changes(before, described(file, [("a", 1)])) == ["training rows: 2, now 1"]
    assert changes(before, described(file, [("a", 1), ("b", 3)])) == ["training rows: content"]
    assert changes(before, described(file, [("b", 2), ("a", 1)])) == ["training rows: content"]
    rows = [("a", 1), ("b", 2)]
    assert changes(before, described(file, rows, {"scale": 2})) == ["reward 'drift': kwargs {}, now {'scale': 2}"]
    assert changes(before, described(file, rows, weight=2.0)) == ["reward 'drift': weight 1.0, now 2.0"]
    file.write_text("def drift(completion, scale=1): return -scale")
    assert changes(before, described(file, rows)) == ["reward 'drift': code"]
    assert changes(before, began_with({}, {"training rows": rows})) == ["reward 'drift': gone"]


def test_going_on_with_something_else_needs_the_flag(file, tmp_path):
    write(tmp_path, described(file, ["a", "b"]))
    assert check_unchanged(tmp_path, described(file, ["a", "b"]), accepted=False) is None
    other = described(file, ["a"])
    with pytest.raises(RunDirectoryError, match=r"training rows: 2, now 1.*--resume_with_changes true"):
        check_unchanged(tmp_path, other, accepted=False)
    assert "training rows: 2, now 1" in check_unchanged(tmp_path, other, accepted=True)
