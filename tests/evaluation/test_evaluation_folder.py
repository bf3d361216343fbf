# ruff: noqa: F401, F811 (a fixture is imported)
"""Two evaluations in one folder, and folders that are full."""

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
from test_contrast import ROWS, SETTINGS, checkpoints, letters

from rlseq import load_rewards
from rlseq.errors import ConfigError, TrainingError
from rlseq.evaluation import run as module
from rlseq.evaluation.results.folder import claimed
from rlseq.evaluation.run import contrast, contrast_and_report
from rlseq.training.run.faults import writing


def evaluate(checkpoints, folder, measure=contrast):
    settings = dataclasses.replace(SETTINGS, resamples=20, strategies=("greedy",))
    with load_rewards([letters]) as suite:
        options = {"settings": settings, "prompt_options": {}, "output_dir": folder}
        return measure({"one": checkpoints["one"]}, ROWS, suite, **options)


@pytest.mark.parametrize("measure", [contrast, contrast_and_report])
def test_a_second_evaluation_of_a_folder_in_use_is_refused_and_leaves_the_first_alone(checkpoints, tmp_path, measure):
    with claimed(tmp_path), pytest.raises(ConfigError, match="another evaluation is writing into") as refused:
        evaluate(checkpoints, tmp_path, measure)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "results.json").exists()
    assert evaluate(checkpoints, tmp_path, measure)["rows"] == len(ROWS)  # once the first has ended


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["write_results", "report_on"])
def test_a_full_disk_is_one_line_with_the_folder_and_the_room_on_its_file_system(
    checkpoints, tmp_path, monkeypatch, failing
):
    asked = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage(path))
    monkeypatch.setattr(module, failing, full_disk)
    with pytest.raises(ConfigError, match=r"No space left on device .* GB free") as said:
        evaluate(checkpoints, tmp_path / "out", contrast_and_report)
    assert str(said.value).startswith(f"cannot write {tmp_path / 'out'}: ") and "\n" not in str(said.value)
    assert asked == [tmp_path / "out"]
    monkeypatch.undo()
    assert evaluate(checkpoints, tmp_path / "out")["rows"] == len(ROWS)  # the claim was given up


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make"), claimed(tmp_path / "file" / "out"):
        pass


def test_a_failed_write_of_a_run_names_its_folder(tmp_path):
    with pytest.raises(TrainingError, match=f"cannot write {tmp_path}: No space left"), writing(tmp_path):
        full_disk()
