"""The rewards and rows of a run are those it started with: in replaced workers, and when it resumes."""

import datetime
import decimal
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rlseq.errors import RunDirectoryError
from rlseq.scoring import load_rewards
from rlseq.scoring.specs.fingerprint import content_hash
from rlseq.training.run.inputs import changes, check_unchanged, run_inputs, write
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
    return run_inputs({"reward": load_rewards([spec]), "eval reward": None}, {"training rows": rows})


def test_what_differs_is_named(tmp_path):
    file = tmp_path / "drift.py"
    file.write_text("def drift(completion, scale=1): return scale")
    before = described(file, [("a", 1), ("b", 2)])
    assert changes(before, described(file, [("a", 1), ("b", 2)])) == []
    assert changes(before, described(file, [("a", 1)])) == ["training rows: 2, now 1"]
    assert changes(before, described(file, [("a", 1), ("b", 3)])) == ["training rows: row 2 of 2 differs"]
    swapped = described(file, [("b", 2), ("a", 1)])
    assert changes(before, swapped) == ["training rows: 2 of 2 differ, the first is row 1"]
    rows = [("a", 1), ("b", 2)]
    assert changes(before, described(file, rows, {"scale": 2})) == ["reward 'drift': kwargs {}, now {'scale': 2}"]
    assert changes(before, described(file, rows, weight=2.0)) == ["reward 'drift': weight 1.0, now 2.0"]
    file.write_text("def drift(completion, scale=1): return -scale")
    assert changes(before, described(file, rows)) == ["reward 'drift': code"]
    assert changes(before, run_inputs({}, {"training rows": rows})) == ["reward 'drift': gone"]


def image(colour, how="RGB"):
    """A picture as a data set gives it: an object that does not say in its repr what it shows."""
    buffer = io.BytesIO()
    Image.new(how, (2, 2), colour).save(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: image((10, 20, 30)), lambda: image((10, 20, 31))),
        (lambda: {"pictures": [image(7, "L")]}, lambda: {"pictures": [image(8, "L")]}),
        (lambda: np.arange(5000), lambda: np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
        (lambda: np.array(["a", {"b": 1}], object), lambda: np.array(["a", {"b": 2}], object)),
        (lambda: np.int64(3), lambda: np.int64(4)),
        (lambda: torch.arange(3).bfloat16(), lambda: torch.arange(1, 4).bfloat16()),
        (lambda: datetime.date(2024, 1, 2), lambda: datetime.date(2024, 1, 3)),
        (lambda: decimal.Decimal("1.5"), lambda: decimal.Decimal("1.50")),
        (lambda: b"ab", lambda: b"ac"),
        (lambda: SimpleNamespace(name="a"), lambda: SimpleNamespace(name="b")),
        (object, lambda: [object()]),
    ],
    ids=[
        "image",
        "image within",
        "array",
        "array of objects",
        "scalar",
        "tensor",
        "date",
        "decimal",
        "bytes",
        "x",
        "y",
    ],
)
def test_rows_are_compared_by_content_whatever_they_hold(make, other):
    def rows_of(*values):
        return run_inputs({}, {"training rows": [("a", (1, 2), {"column": value}) for value in values]})

    kept = [make(), make(), other()]  # two at a time, so that no address is used again
    before = rows_of(kept[0], kept[2])
    assert changes(before, rows_of(kept[1], kept[2])) == []
    assert changes(before, rows_of(kept[1], kept[1])) == ["training rows: row 2 of 2 differs"]


def test_a_picture_is_compared_by_what_it_shows():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    other = palette.copy()
    other.putpalette([0, 0, 0, 0, 255, 0])
    assert content_hash(palette) != content_hash(other)
    assert content_hash(image((1, 2, 3))) == content_hash(Image.new("RGB", (2, 2), (1, 2, 3)))
    assert content_hash(Image.new("L", (2, 3))) != content_hash(Image.new("L", (3, 2)))


def test_resuming_with_something_else_needs_the_flag(file, tmp_path):
    write(tmp_path, described(file, ["a", "b"]))
    assert check_unchanged(tmp_path, described(file, ["a", "b"]), accepted=False) is None
    other = described(file, ["a"])
    with pytest.raises(RunDirectoryError, match=r"training rows: 2, now 1.*--resume_with_changes true"):
        check_unchanged(tmp_path, other, accepted=False)
    assert "training rows: 2, now 1" in check_unchanged(tmp_path, other, accepted=True)


HELPED = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import package_of_helpers.inner
from scale_of_helpers import scale
sys.path.pop(0)
def drift(completion):
    return scale()
"""
HELPERS = {
    "scale_of_helpers.py": "from deeper_helper import VALUE\ndef scale():\n    return VALUE\n",
    "deeper_helper.py": "import json, torch\nVALUE = 1.0\n",
    "package_of_helpers/inner.py": "def late():\n    from . import later_helper\n",
    "package_of_helpers/later_helper.py": "VALUE = 1.0\n",
    "not_imported.py": "VALUE = 1.0\n",
}


@pytest.fixture
def helped(tmp_path):
    for name, source in HELPERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    path = tmp_path / "drift.py"
    path.write_text(HELPED)
    yield path
    forget()


def forget():
    """Let the rewards be imported again, as another process would."""
    begin = ("scale_of_helpers", "deeper_helper", "package_of_helpers", "_rlseq_reward_drift")
    for name in [name for name in sys.modules if name.startswith(begin)]:
        del sys.modules[name]


def test_local_modules_that_a_reward_imports_count_and_are_named(helped, tmp_path):
    before = described(helped, ["a"])
    for name in HELPERS:
        (tmp_path / name).write_text(HELPERS[name] + "# edited\n")
        expected = [] if name == "not_imported.py" else [f"reward 'drift': module {name}"]
        assert changes(before, described(helped, ["a"])) == expected
        (tmp_path / name).write_text(HELPERS[name])
    files = before["reward 'drift'"]["files"]
    assert set(files) == {f"module {name}" for name in HELPERS if name != "not_imported.py"}  # no json, no torch


def test_a_module_that_is_loaded_by_its_path_counts_too(tmp_path):
    (tmp_path / "by_path.py").write_text("def scale(): return 1.0\n")
    (tmp_path / "drift.py").write_text(
        "import importlib.util, pathlib\n"
        "spec = importlib.util.spec_from_file_location('by_path', pathlib.Path(__file__).with_name('by_path.py'))\n"
        "by_path = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(by_path)\n"
        "def drift(completion): return by_path.scale()\n"
    )
    before = described(tmp_path / "drift.py", ["a"])
    (tmp_path / "by_path.py").write_text("def scale(): return 2.0\n")
    assert changes(before, described(tmp_path / "drift.py", ["a"])) == ["reward 'drift': module by_path.py"]


def test_kept_values_are_not_taken_where_a_helper_was_edited(helped, tmp_path):
    spec = {"func": f"{helped}:drift", "cache": str(tmp_path / "kept.sqlite")}
    assert values(load_rewards([spec]), "a") == [1.0]
    (tmp_path / "deeper_helper.py").write_text("VALUE = 2.0\n")
    forget()
    assert values(load_rewards([spec]), "a") == [2.0]


def test_the_weights_of_a_local_reward_model_count(tmp_path):
    model = tmp_path / "judge"
    model.mkdir()
    (model / "config.json").write_text("{}")
    large = model / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(2**26 + 2**20)  # over what is read whole
    spec = {"func": str(model)}

    def now():
        return run_inputs({"reward": load_rewards([spec])}, {})

    before = now()
    large.touch()
    assert changes(before, now()) == []  # another time of change is no other content
    for place in (0, 2**26 // 2, 2**26 + 2**20 - 8):
        with large.open("r+b") as file:
            file.seek(place)
            was = file.read(2**19)
            file.seek(place)
            file.write(b"\1" * len(was))
        assert changes(before, now()) == ["reward 'judge': weights of model"]
        with large.open("r+b") as file:
            file.seek(place)
            file.write(was)
        assert changes(before, now()) == []
    (model / "config.json").write_text('{"num_labels": 2}')
    assert changes(before, now()) == ["reward 'judge': weights of model"]


def test_the_commit_of_a_model_of_the_hub_counts_once_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--judge"
    (tmp_path / "r.py").write_text("def r(completion, model, language='en'): return 1.0\n")
    spec = {"func": f"{tmp_path / 'r.py'}:r", "kwargs": {"model": "someone/judge", "language": "en"}}
    suite = load_rewards([spec])

    def download(commit):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")

    unknown = run_inputs({"reward": suite}, {})
    assert "files" not in unknown["reward 'r'"]
    download("a" * 40)  # what the first use of the reward does
    before = run_inputs({"reward": suite}, {})
    assert before["reward 'r'"]["files"] == {"weights of model": "a" * 40}
    assert changes(unknown, before) == changes(before, unknown) == []
    assert changes(before, run_inputs({"reward": load_rewards([spec])}, {})) == []
    download("b" * 40)
    assert changes(before, run_inputs({"reward": load_rewards([spec])}, {})) == ["reward 'r': weights of model"]
