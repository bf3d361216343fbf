"""A checkpoint is on the disk before it is marked as whole, and a second save of a step never costs the first."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator, PartialState
from forks import end_of, fork, run_ranks
from test_faults import checkpointed, contents, ppo, tiny_sft
from test_run_directory import make_checkpoint, open_run, steps, tear_state
from transformers import TrainerState, trainer

from rlseq.errors import RunDirectoryError, TrainingError
from rlseq.training.run.callbacks import GracefulStop
from rlseq.training.run.checkpoints import find_defect, newest_whole_checkpoint
from rlseq.training.run.directory import append_jsonl, prepare
from rlseq.training.run.recipe import finish


@pytest.mark.parametrize("make", [ppo, tiny_sft])
def test_all_of_a_checkpoint_is_flushed_before_its_mark_and_the_mark_before_older_ones_go(make, tmp_path, monkeypatch):
    events, fsync, write, rotate = [], os.fsync, TrainerState.save_to_json, trainer.rotate_checkpoints

    def recorded_fsync(descriptor):
        found = os.fstat(descriptor)
        events.append((found.st_ino, found.st_mtime_ns))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(TrainerState, "save_to_json", lambda *a: (events.append("mark"), write(*a)))
    monkeypatch.setattr(trainer, "rotate_checkpoints", lambda **a: (events.append("rotate"), rotate(**a)))
    checkpointed(tmp_path, make).train()
    assert [e for e in events if isinstance(e, str)] == ["mark", "rotate"] * 2
    mark = max(i for i, e in enumerate(events) if e == "mark")
    before = set(events[events.index("rotate") : mark])
    after = set(events[mark : len(events) - 1])
    assert events[-1] == "rotate"

    checkpoint = tmp_path / "checkpoint-2"
    state = checkpoint / "trainer_state.json"
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path != state]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= {path.name for path in files}
    assert make is tiny_sft or {"value_head.safetensors", "rank-0.pt"} <= {path.name for path in files}
    for path in files:  # flushed, and not written to afterwards
        assert (path.stat().st_ino, path.stat().st_mtime_ns) in before, path
    folders = [path for path in checkpoint.rglob("*") if path.is_dir()]
    assert {path.stat().st_ino for path in folders} <= {e[0] for e in before if isinstance(e, tuple)}
    assert (state.stat().st_ino, state.stat().st_mtime_ns) in after
    assert {checkpoint.stat().st_ino, tmp_path.stat().st_ino} <= {e[0] for e in after if isinstance(e, tuple)}


def test_a_disk_that_fails_to_flush_a_file_ends_the_run_and_one_that_flushes_no_folders_does_not(tmp_path, monkeypatch):
    fsync, failing = os.fsync, []

    def broken(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        if path.name in failing:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    run = checkpointed(tmp_path, max_steps=1)
    run.train()
    whole = contents(tmp_path / "checkpoint-1")
    failing.append("optimizer.pt")
    with pytest.raises(TrainingError, match=r"checkpoint-1: Input/output error"):
        run._save_checkpoint(run.model, None)
    assert contents(tmp_path / "checkpoint-1") == whole and find_defect(tmp_path / "checkpoint-1") is None


# -- a second save of a step


def saved_twice(run, second):
    """A run with checkpoints 2 and 4, killed in a second save of 4; the first is where `saving` moves it."""
    make_checkpoint(run, 2)
    first = make_checkpoint(run, 4)
    (first / "first").touch()
    first.rename(run / ".checkpoint-4.earlier")
    if second != "not begun":
        make_checkpoint(run, 4)
    if second == "truncated":
        tear_state(run / "checkpoint-4")
    append_jsonl(run / "metrics.jsonl", [{"step": s} for s in (2, 4, 5)])


@pytest.mark.parametrize("asked", ["latest", "checkpoint-4"])
@pytest.mark.parametrize("second", ["not begun", "truncated"])
def test_the_first_save_of_a_step_comes_back_where_the_second_was_killed(tmp_path, caplog, second, asked):
    saved_twice(tmp_path, second)
    others = open_run(tmp_path, resume=asked, main_process=False)  # looks, and touches nothing
    assert others.resume_from == tmp_path / ".checkpoint-4.earlier" and others.resume_from.is_dir()
    run = open_run(tmp_path, resume=asked)
    assert run.resume_from == tmp_path / "checkpoint-4" and (run.resume_from / "first").exists()
    assert "checkpoint-4 was being saved a second time when the run ended: the first is restored" in caplog.text
    assert not list(tmp_path.glob(".checkpoint*")) and steps(run.metrics) == [2, 4]
    assert open_run(tmp_path, resume=asked, main_process=False).resume_from == run.resume_from


def test_a_second_save_that_is_whole_stays(tmp_path, caplog):
    saved_twice(tmp_path, "whole")
    run = open_run(tmp_path, resume="latest")
    assert run.resume_from == tmp_path / "checkpoint-4" and not (run.resume_from / "first").exists()
    assert not list(tmp_path.glob(".checkpoint*")) and not caplog.text


def test_where_neither_save_is_whole_the_run_goes_on_from_the_checkpoint_before(tmp_path, caplog):
    saved_twice(tmp_path, "truncated")
    tear_state(tmp_path / ".checkpoint-4.earlier")
    with pytest.raises(RunDirectoryError, match=r"trainer_state\.json was cut short"):
        open_run(tmp_path, resume="checkpoint-4")
    assert open_run(tmp_path, resume="latest").resume_from == tmp_path / "checkpoint-2"
    assert "trainer_state.json was cut short" in caplog.text


def test_resuming_from_an_older_checkpoint_sets_the_first_save_aside_with_the_later_ones(tmp_path):
    saved_twice(tmp_path, "truncated")
    open_run(tmp_path, resume="checkpoint-2")
    assert not list(tmp_path.glob(".checkpoint*")) and not (tmp_path / "checkpoint-4").exists()
    assert len(list(tmp_path.glob("superseded-checkpoint-4-*/first"))) == 1


def test_a_process_killed_in_a_second_save_costs_nothing(tmp_path):
    def killed_in_a_second_save():
        run = checkpointed(tmp_path, max_steps=2, save_total_limit=None)
        run.train()
        TrainerState.save_to_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run._save_checkpoint(run.model, None)

    assert end_of(fork(killed_in_a_second_save, tmp_path / "log")) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert find_defect(tmp_path / "checkpoint-2") == "it has no trainer_state.json"
    whole = contents(tmp_path / ".checkpoint-2.earlier")
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / ".checkpoint-2.earlier", [])
    run = prepare(tmp_path, resume="latest", overwrite=False, main_process=True)
    assert run.resume_from == tmp_path / "checkpoint-2" and contents(run.resume_from) == whole


def test_no_rank_goes_on_to_evaluate_a_result_that_is_still_being_written(tmp_path):
    result = tmp_path / "weights"

    def slow_save(folder, **_):
        if PartialState().is_main_process:
            time.sleep(0.5)
            result.write_text("whole")

    def act():
        settings = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=False)
        state = SimpleNamespace(global_step=3, best_metric=None, best_model_checkpoint=None)
        ended = SimpleNamespace(args=settings, state=state, accelerator=Accelerator(cpu=True), save_model=slow_save)
        assert finish(ended, None, GracefulStop())
        assert result.read_text() == "whole"

    run_ranks(2, act, tmp_path / "log")
