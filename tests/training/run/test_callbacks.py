"""Metrics on disk, stopping without losing work, and a progress that can be read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_trainer import tiny_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState

from rlseq.training.run.callbacks import GracefulStop, MetricsWriter, Progress
from rlseq.training.run.directory import prepare


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class At(TrainerCallback):
    """Calls a function at the beginning of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            self.action()


def interrupt(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


# Metrics


def test_each_logged_step_is_a_line_and_the_summary_is_marked(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tiny_trainer(tmp_path, [MetricsWriter(path)], max_steps=3, save_strategy="no").train()
    *steps, summary = records(path)
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all({"epoch", "loss", "learning_rate"} <= set(record) for record in steps)
    assert summary["step"] == 3 and summary["summary"] is True and "train_runtime" in summary
    assert not any("summary" in record for record in steps)


def test_a_loss_that_is_not_a_number_is_null_and_other_processes_write_nothing(tmp_path):
    writer, path = MetricsWriter(tmp_path / "m.jsonl"), tmp_path / "m.jsonl"
    state = TrainerState(global_step=4, epoch=0.5, is_world_process_zero=False)
    writer.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    assert not path.exists()
    state.is_world_process_zero = True
    writer.on_log(None, state, TrainerControl(), logs={"loss": float("nan"), "kl": torch.tensor(0.5)})
    assert records(path) == [{"step": 4, "epoch": 0.5, "loss": None, "kl": 0.5, "format_version": 1}]


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_its_step_and_resuming_finishes_the_run(tmp_path, number):
    before = signal.getsignal(number)
    settings = {"max_steps": 6, "save_strategy": "no"}
    stop = GracefulStop()
    trainer = tiny_trainer(tmp_path, [stop, At(3, interrupt(number))], **settings)
    trainer.train()
    assert (stop.stopped, trainer.state.global_step) == (signal.Signals(number).name, 3)
    assert signal.getsignal(number) is before
    checkpoint = prepare(tmp_path, resume="latest", overwrite=False, main_process=True).resume_from
    assert checkpoint.name == "checkpoint-3"

    again, straight = GracefulStop(), tiny_trainer(tmp_path / "straight", [], **settings)
    resumed = tiny_trainer(tmp_path, [again], **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    straight.train()
    assert again.stopped is None and resumed.state.global_step == 6
    assert torch.equal(resumed.model.weight, straight.model.weight)


def test_a_signal_in_the_last_step_ends_the_run_whole(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, [GracefulStop(), At(3, interrupt())], **settings)
    trainer.train()
    resumed = tiny_trainer(tmp_path, [], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 3
    assert torch.equal(resumed.model.weight, trainer.model.weight)


@pytest.mark.parametrize("saving", ["epoch", "best"])
def test_a_stop_within_an_epoch_saves_and_evaluates_no_half_epoch(tmp_path, saving):
    path = tmp_path / "metrics.jsonl"
    callbacks = [GracefulStop(), MetricsWriter(path), At(2, interrupt())]
    best = {"metric_for_best_model": "loss", "eval_strategy": "epoch", "save_strategy": saving}
    tiny_trainer(tmp_path, callbacks, num_train_epochs=2, **best).train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert not any("eval_loss" in record for record in records(path))


def test_a_stop_at_the_end_of_an_epoch_keeps_its_evaluation_in_the_checkpoint(tmp_path):
    # 8 rows, 2 a step: the epoch ends with step 4.
    callbacks = [GracefulStop(), At(4, interrupt())]
    tiny_trainer(
        tmp_path, callbacks, num_train_epochs=2, eval_strategy="epoch", save_strategy="steps", save_steps=100
    ).train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in saved["log_history"] if "eval_loss" in entry] == [4]


def receiver():
    stop = GracefulStop()
    stop.on_train_begin(None, TrainerState(), TrainerControl())
    return stop


def test_a_second_interrupt_ends_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = receiver()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # the launcher passes on what the terminal sent already
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.on_train_end(None, TrainerState(), TrainerControl())


@pytest.mark.parametrize(("launched", "reason"), [(True, "the launcher exited"), (False, None)])
def test_the_death_of_the_launcher_stops_the_run_but_not_that_of_a_shell(monkeypatch, launched, reason):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(os, "getppid", lambda: 4242)
    stop, control = GracefulStop(), TrainerControl()
    args = SimpleNamespace(device=torch.device("cpu"), save_strategy="steps")
    stop.on_step_end(args, TrainerState(), control)
    assert stop.stopped is None and not control.should_training_stop
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stop.on_step_end(args, TrainerState(), control)
    assert stop.stopped == reason
    assert control.should_save is control.should_training_stop is (reason is not None)


def test_a_process_that_is_terminated_saves_and_exits_0(tmp_path):
    script = Path(__file__).parents[2] / "tiny_trainer.py"
    command = [sys.executable, str(script), str(tmp_path), "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "3":
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = int(out.split()[-1])
    assert out.splitlines()[-1] == f"stopped by SIGTERM at {last}" and 4 <= last < 1000
    assert "SIGTERM: saving" in err and "Traceback" not in err
    run = prepare(tmp_path, resume="latest", overwrite=False, main_process=True)
    assert run.resume_from.name == f"checkpoint-{last}"
    assert max(record["step"] for record in records(run.metrics)) == last


def agree(rank, rendezvous, queue):
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    stop = receiver()
    args, seen = SimpleNamespace(device=torch.device("cpu"), save_strategy="steps"), []
    for step in range(3):
        if rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(args, TrainerState(), TrainerControl())
        seen.append(stop.stopped)
    queue.put((rank, seen))
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    processes = [context.Process(target=agree, args=(rank, rendezvous, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    seen = dict(queue.get() for _ in range(2))
    assert seen[0] == seen[1] == [None, "SIGTERM", "SIGTERM"]


# Progress


def test_progress_without_a_terminal_is_a_table_of_about_twenty_rows(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, [], max_steps=100, save_strategy="no", eval_strategy="steps", eval_steps=50)
    capsys.readouterr()
    Progress.replace_default(trainer)
    trainer.train()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    rows = [line.split() for line in lines if line.split()[0].isdigit()]
    assert 18 <= len(rows) <= 25
    assert lines[0].split() == ["step", "loss"] and len({len(line) for line in lines[:2]}) == 1
    assert "eval_loss" in err and "{" not in err


def test_progress_on_a_terminal_is_a_bar_with_the_last_values(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trainer = tiny_trainer(tmp_path, [], max_steps=5, save_strategy="no")
    Progress.replace_default(trainer)
    trainer.train()
    out, err = capsys.readouterr()
    assert out == "" and "5/5" in err and "loss=" in err and "{" not in err


def test_an_evaluation_of_validation_rows_has_a_line_with_what_the_best_is_chosen_by(capsys):
    progress = Progress()
    state = SimpleNamespace(is_world_process_zero=True, global_step=50, max_steps=100)
    args = SimpleNamespace(metric_for_best_model="eval_greedy/wer")
    logs = {"eval_nll_per_token": 0.25, "eval_greedy/reward": 0.5, "eval_greedy/wer": 0.125, "eval_sample/length": 7.0}
    progress.on_log(args, state, None, logs=logs)
    header, row = capsys.readouterr().err.splitlines()
    assert header.split() == ["step", "eval_nll_per_token", "eval_greedy", "reward", "eval_greedy", "wer"]
    assert row.split() == ["50", "0.25", "0.5", "0.125"]
