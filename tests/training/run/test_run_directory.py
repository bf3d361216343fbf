"""The run directory: one run at a time, never overwritten unasked, continued without duplicates."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlseq.errors import RunDirectoryError
from rlseq.training.run.checkpoints import write_format
from rlseq.training.run.directory import append_jsonl, prepare, write_json_atomic


def open_run(path, *, resume=None, overwrite=False, main_process=True):
    return prepare(path, resume=resume, overwrite=overwrite, main_process=main_process)


def make_checkpoint(run, step, *, weights="model.safetensors"):
    path = Path(run) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(3, 2)}, path / weights)
    write_format(path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "resume_state/rank-0.pt"):
        torch.save({}, path / name)
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text(json.dumps({"a": 1}))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def steps(path):
    with Path(path).open() as file:
        return [json.loads(line)["step"] for line in file]


def test_a_new_directory_is_made_and_names_its_files(tmp_path):
    run = open_run(tmp_path / "a" / "run")
    assert run.path.is_dir() and run.resume_from is None and run.moved_to is None
    names = [run.config.name, run.metrics.name, run.rollouts.name, run.evaluation.name, run.curves.name]
    assert names == ["config.yaml", "metrics.jsonl", "rollouts", "evaluation", "curves.png"]
    assert all(p.parent == run.path for p in (run.config, run.metrics, run.rollouts, run.evaluation, run.curves))


def test_files_of_no_run_do_not_stop_a_new_one(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    open_run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("held", ["config.yaml", "metrics.jsonl", "rollouts/", "checkpoint-3/"])
def test_a_directory_that_holds_a_run_is_refused_with_both_flags_named(tmp_path, held):
    path = tmp_path / held
    path.mkdir() if held.endswith("/") else path.touch()
    with pytest.raises(RunDirectoryError) as caught:
        open_run(tmp_path)
    assert "--resume_from_checkpoint latest" in str(caught.value)
    assert "--overwrite_output_dir" in str(caught.value)


def test_overwriting_moves_the_earlier_run_aside_whole_and_says_so(tmp_path, caplog):
    run = tmp_path / "run"
    make_checkpoint(run, 3)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    opened = open_run(run, overwrite=True)
    assert re.fullmatch(r"run\.previous-\d{8}-\d{6}", opened.moved_to.name)
    assert steps(opened.moved_to / "metrics.jsonl") == [1]
    assert (opened.moved_to / "checkpoint-3" / "model.safetensors").is_file()
    assert os.listdir(run) == [".lock"]
    assert str(opened.moved_to) in caplog.text


def test_two_runs_overwritten_in_one_second_are_both_kept(tmp_path):
    run = tmp_path / "run"
    for _ in range(3):
        opened = open_run(run, overwrite=True)
        opened.config.write_text("a: 1")
        opened.release()
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("run.previous-")]) == 2


def test_overwriting_an_empty_directory_moves_nothing(tmp_path):
    assert open_run(tmp_path / "run", overwrite=True).moved_to is None


def test_the_working_directory_is_not_moved(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match="working directory"):
        open_run(".", overwrite=True)
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_in_use_is_refused_until_its_run_ends(tmp_path, overwrite):
    holder = (
        "import sys; from rlseq.training.run.directory import prepare\n"
        "run = prepare(sys.argv[1], resume=None, overwrite=False, main_process=True)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match="in use"):
            open_run(tmp_path / "run", overwrite=overwrite)
        process.kill()
        process.wait()
    assert open_run(tmp_path / "run").path == tmp_path / "run"


def test_a_refused_directory_is_not_left_claimed(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunDirectoryError, match="already holds"):
        open_run(tmp_path)
    make_checkpoint(tmp_path, 1)
    assert open_run(tmp_path, resume="latest").resume_from == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("resume", ["latest", "true", True])
def test_resuming_takes_the_newest_checkpoint_by_number(tmp_path, resume):
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert open_run(tmp_path, resume=resume).resume_from == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("off", [None, "", False, "false"])
def test_no_resuming_is_asked_for_in_several_words(tmp_path, off):
    assert open_run(tmp_path, resume=off).resume_from is None


def tear_state(path):
    (path / "trainer_state.json").write_text('{"global_st')


def tear_weights(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-4])


def tear_header(path):
    (path / "model.safetensors").write_bytes(b"\x40\0\0")


def remove(name):
    return lambda path: (path / name).unlink()


def copied(path):
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[: (path / name).stat().st_size // 2])


def lose_a_shard(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("tear", "words"),
    [
        (tear_state, "trainer_state.json was cut short"),
        (remove("trainer_state.json"), "no trainer_state.json"),
        (tear_weights, "model.safetensors is missing or was cut short"),
        (tear_header, "model.safetensors is missing or was cut short"),
        (remove("model.safetensors"), "no weights"),
        (remove("optimizer.pt"), "no optimizer state"),
        (lose_a_shard, "model-00001-of-00001.safetensors is missing"),
        (remove("scheduler.pt"), "no scheduler.pt"),
        *(
            (cut(name), f"{name} was cut short")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "resume_state/rank-0.pt", "config.json")
        ),
        (cut("tokenizer.json"), "tokenizer.json was cut short"),
        (copied, "trainer_state.json is of step 3"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_a_warning_and_refused_by_name(tmp_path, caplog, tear, words):
    make_checkpoint(tmp_path, 2)
    tear(make_checkpoint(tmp_path, 4))
    with pytest.raises(RunDirectoryError, match=words):
        open_run(tmp_path, resume="checkpoint-4")
    assert open_run(tmp_path, resume="latest").resume_from == tmp_path / "checkpoint-2"
    assert words in caplog.text


def test_a_users_own_file_beside_the_rollouts_is_left_as_it_is(tmp_path):
    make_checkpoint(tmp_path, 2)
    notes = tmp_path / "rollouts" / "notes.jsonl"
    append_jsonl(notes, [{"note": 1}, {"step": "none"}])
    append_jsonl(tmp_path / "rollouts" / "000003.jsonl", {"step": 3})
    before = notes.read_text()
    open_run(tmp_path, resume="latest")
    assert notes.read_text() == before and not (tmp_path / "rollouts" / "000003.jsonl").exists()


@pytest.mark.parametrize("given", ["", "  "])
def test_an_empty_output_dir_is_refused_and_nothing_is_claimed(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match="--output_dir is empty"):
        open_run(given)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_and_a_sharded_model_are_whole_checkpoints(tmp_path):
    make_checkpoint(tmp_path / "a", 2, weights="adapter_model.safetensors")
    assert open_run(tmp_path / "a", resume="latest").resume_from.name == "checkpoint-2"
    sharded = make_checkpoint(tmp_path / "b", 2, weights="model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_run(tmp_path / "b", resume="latest").resume_from.name == "checkpoint-2"


def test_resuming_without_a_whole_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(RunDirectoryError, match="no whole checkpoint"):
        open_run(tmp_path / "new", resume="latest")
    tear_state(make_checkpoint(tmp_path, 4))
    with pytest.raises(RunDirectoryError, match="checkpoint-4: its trainer_state"):
        open_run(tmp_path, resume="latest")


def test_a_misspelled_checkpoint_names_its_neighbour(tmp_path):
    make_checkpoint(tmp_path, 40)
    with pytest.raises(RunDirectoryError, match="'checkpoint-40'"):
        open_run(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_continuing_and_replacing_at_once_is_refused(tmp_path):
    make_checkpoint(tmp_path, 4)
    with pytest.raises(RunDirectoryError, match="one of them"):
        open_run(tmp_path, resume="latest", overwrite=True)


def test_a_checkpoint_of_another_run_starts_a_new_directory_only(tmp_path):
    other = make_checkpoint(tmp_path / "other", 4)
    assert open_run(tmp_path / "new", resume=str(other)).resume_from == other
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunDirectoryError, match="no checkpoint of the run"):
        open_run(tmp_path / "held", resume=str(other))
    assert steps(tmp_path / "held" / "metrics.jsonl") == [1]


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 4)
    later = make_checkpoint(tmp_path, 6)
    summary = {"step": 4, "summary": True}
    lines = [{"step": s, "text": f"{s}\u2028line"} for s in (2, 4, 5, 6)] + [summary]
    append_jsonl(tmp_path / "metrics.jsonl", lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')  # killed while writing
    append_jsonl(tmp_path / "rollouts" / "step-4.jsonl", [{"step": 4}, {"step": 4}])
    append_jsonl(tmp_path / "rollouts" / "step-5.jsonl", [{"step": 5}])
    append_jsonl(tmp_path / "rollouts" / "mixed.jsonl", [{"step": 3}, {"step": 5}])
    run = open_run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert steps(run.metrics) == [2, 4]
    assert {p.name: steps(p) for p in run.rollouts.iterdir()} == {"step-4.jsonl": [4, 4], "mixed.jsonl": [3]}
    assert not later.exists()
    assert len(list(tmp_path.glob("superseded-checkpoint-6-*/model.safetensors"))) == 1


def test_other_processes_get_the_same_paths_and_touch_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "run", 4)
    append_jsonl(tmp_path / "run" / "metrics.jsonl", {"step": 9})
    before = sorted(tmp_path.rglob("*"))
    others = open_run(tmp_path / "run", resume="latest", main_process=False)
    open_run(tmp_path / "run", overwrite=True, main_process=False)
    open_run(tmp_path / "new", main_process=False)
    assert sorted(tmp_path.rglob("*")) == before and steps(others.metrics) == [9]
    main = open_run(tmp_path / "run", resume="latest")
    assert (main.path, main.resume_from) == (others.path, others.resume_from) == (tmp_path / "run", checkpoint)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(RunDirectoryError, match="--output_dir"):
            open_run(path)


def test_records_hold_json_alone(tmp_path):
    record = {
        "step": 1,
        "nan": float("nan"),
        "inf": [-math.inf, 1.5],
        "tensor": torch.tensor(2.0),
        "scalar": np.float32(0.5),
        "array": np.arange(2),
        "path": Path("a"),
        "text": "ü\n",
        "none": None,
    }
    append_jsonl(tmp_path / "deep" / "a.jsonl", record)
    append_jsonl(tmp_path / "deep" / "a.jsonl", [{"step": 2}, {"step": 3}])
    first, *rest = (tmp_path / "deep" / "a.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "step": 1,
        "nan": None,
        "inf": [None, 1.5],
        "tensor": 2.0,
        "scalar": 0.5,
        "array": [0, 1],
        "path": "a",
        "text": "ü\n",
        "none": None,
    }
    assert rest == ['{"step": 2}', '{"step": 3}']


def test_a_value_without_a_form_in_json_leaves_the_old_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError, match="object"):
        write_json_atomic(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
