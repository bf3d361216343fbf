"""What two processes do when something fails in one of them, or when their launcher is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty_run
import pytest
from forks import run_ranks

ROOT = Path(__file__).parents[3]


def launch(kind, out):
    """Start tests/faulty_run.py in two processes, as a user starts a recipe, in a process group of its own."""
    config = ["--config_file", "recipes/accelerate/cpu-2proc.yaml", "--num_cpu_threads_per_process", "1"]
    config += ["--main_process_port", "0"]  # other launches may begin at the same time
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *config, "tests/faulty_run.py", kind, str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def digests(out, rank):
    return [line.split()[1] for line in (out / f"rank-{rank}.txt").read_text().splitlines()]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_both(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tests/faulty_run.py", "loss", str(tmp_path)])
    run_ranks(2, faulty_run.main, tmp_path / "log")
    first, second, third = digests(tmp_path, 0)
    assert [first, second, third] == digests(tmp_path, 1)
    assert first == second != third
    assert (tmp_path / "log").read_text().count("optimizer step 2 was skipped") == 1
    names = sorted(file.name for file in (tmp_path / "skipped" / "step-000002").iterdir())
    assert names == ["rank-0.jsonl", "rank-0.safetensors", "rank-1.jsonl", "rank-1.safetensors"]


def test_a_rank_that_is_killed_ends_the_others_within_a_minute_and_is_named(tmp_path):
    process = launch("die", tmp_path)
    _, stderr = process.communicate(timeout=240)
    ended = time.time() - float((tmp_path / "died").read_text())
    print(f"the launcher ended {ended:.1f} s after the death of rank 1")
    print(stderr[-5000:])
    assert process.returncode != 0 and ended < 60
    assert "rank 0: another process of this run has ended" in stderr
    assert "exitcode  : -9" in stderr and "rank      : 1" in stderr


@pytest.mark.soak
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_to_the_launcher_lets_both_processes_save_and_end(number, to_all, tmp_path):
    """`to_all`: as Ctrl-C in a terminal, which reaches the launcher and its children."""
    process = launch("wait", tmp_path)
    deadline = time.monotonic() + 200
    while not all((tmp_path / f"rank-{rank}-began").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(1.0)
    sent = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=100)
    print(f"{number.name} to {'all' if to_all else 'the launcher'}: ended after {time.monotonic() - sent:.1f} s")
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = checkpoint.name.split("-")[1]
    for rank in (0, 1):
        assert f"rank {rank} stopped by {number.name} at step {step}" in stdout, stderr[-3000:]
    from rlseq.training.run.checkpoints import find_defect

    assert find_defect(checkpoint) is None
    assert len(list((checkpoint / "resume_state").glob("rank-*.pt"))) == 2
