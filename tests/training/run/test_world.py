"""A recipe does not run in another world than `accelerate launch` was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlseq.errors import ConfigError
from rlseq.training.run import launch
from rlseq.training.run.launch import asked_of, compare, cpu_threads

ROOT = Path(__file__).parents[3]
TWO = str(ROOT / "recipes/accelerate/cpu-2proc.yaml")
FSDP2 = str(ROOT / "recipes/accelerate/fsdp2.yaml")

COMMANDS = {
    "the command": (["/bin/python", "/bin/accelerate", "launch", "--config_file", TWO, "x.py"], 2, "MULTI_GPU"),
    "its other name": (["/bin/python", "/bin/accelerate-launch", "--num_processes", "4", "x.py"], 4, "NO"),
    "the module": (["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "x.py"], 2, "NO"),
    "a file for FSDP": (["python", "accelerate", "launch", "--config_file", FSDP2, "x.py"], 8, "FSDP"),
    "FSDP by flags": (["python", "accelerate", "launch", "--use_fsdp", "--num_processes", "2", "x.py"], 2, "FSDP"),
    "flags over the file": (
        ["python", "accelerate", "launch", "--config_file", TWO, "--num_processes", "3", "x.py"],
        3,
        "MULTI_GPU",
    ),
    "flags of the script": (
        ["python", "accelerate", "launch", "--config_file", TWO, "x.py", "--num_processes", "7"],
        2,
        "MULTI_GPU",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_was_asked_for_is_read_off_the_launchers_command_line(case):
    command, processes, kind = COMMANDS[case]
    assert asked_of(command) == {"processes": processes, "kind": kind, "threads": None}


def test_several_cpu_processes_are_read_off_a_file_of_their_kind(tmp_path):
    text = Path(TWO).read_text(encoding="utf-8").replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU")
    (tmp_path / "cpus.yaml").write_text(text, encoding="utf-8")
    command = ["accelerate", "launch", "--config_file", str(tmp_path / "cpus.yaml"), "x.py"]
    assert asked_of(command) == {"processes": 2, "kind": "MULTI_CPU", "threads": None}


@pytest.mark.parametrize("command", [[], ["/bin/bash"], ["python", "-m", "pytest"], ["torchrun", "--nproc", "2"]])
def test_other_parents_ask_for_nothing(command):
    assert asked_of(command) is None


def test_another_world_is_refused_with_what_gives_the_one_asked_for():
    two = {"processes": 2, "kind": "MULTI_CPU"}
    with pytest.raises(ConfigError, match=r"asked for 2 processes \(MULTI_CPU\), but 1 runs\..*use_cpu: true"):
        compare(two, {}, accelerators=False)
    with pytest.raises(ConfigError, match=r"but 1 runs\. Give --multi_gpu"):
        compare(two, {}, accelerators=True)
    compare(two, {"WORLD_SIZE": "2"}, accelerators=False)
    compare({"processes": None, "kind": "NO"}, {}, accelerators=False)
    compare({"processes": 1, "kind": "NO"}, {}, accelerators=True)
    fsdp = {"processes": 2, "kind": "FSDP"}
    with pytest.raises(ConfigError, match="FSDP, but there is no accelerator"):
        compare(fsdp, {"WORLD_SIZE": "2"}, accelerators=False)
    compare(fsdp, {"WORLD_SIZE": "2"}, accelerators=True)
    with pytest.raises(ConfigError, match="a model without weights"):
        compare(fsdp, {"WORLD_SIZE": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, accelerators=True)


def test_two_cpu_processes_that_accelerate_makes_one_are_refused(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    recipe = ["recipes/grpo.py", "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launcher, *recipe], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert ended.returncode != 0
    assert "error: accelerate launch was asked for 2 processes (NO), but 1 runs." in ended.stderr
    assert not (tmp_path / "run").exists()


LAUNCH = ["python", "/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("flag", "command", "launcher_environment", "own", "expected"),
    [
        (3, [*LAUNCH, "x.py"], {"OMP_NUM_THREADS": "1"}, "1", (3, "--num_cpu_threads")),
        (None, ["bash"], {}, "1", (1, "OMP_NUM_THREADS")),  # the user's: no launcher is there to have set it
        (None, ["bash"], {}, "4,2", (4, "OMP_NUM_THREADS")),  # one number for each nested level
        (None, [*LAUNCH, "x.py"], {"OMP_NUM_THREADS": "2"}, "2", (2, "OMP_NUM_THREADS")),
        (None, [*LAUNCH, "x.py"], {}, "1", (6, "all cores")),  # accelerate's own 1
        (None, ["python", "-m", "torch.distributed.run", "x.py"], {}, "1", (6, "all cores")),
        (None, [*LAUNCH, "--num_cpu_threads_per_process", "5", "x.py"], {}, "5", (5, "--num_cpu_threads_per_process")),
        (None, ["bash"], {}, None, (6, "all cores")),
        (None, ["bash"], {}, "many", (6, "all cores")),
    ],
)
def test_threads_are_those_that_the_user_asked_for(flag, command, launcher_environment, own, expected, monkeypatch):
    monkeypatch.setattr(launch, "_parent", lambda: (command, launcher_environment))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert cpu_threads(flag, 1) == expected


def test_cores_are_divided_among_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(launch, "_parent", lambda: ([], {}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [cpu_threads(None, processes)[0] for processes in (1, 2, 4, 8)] == [6, 3, 1, 1]


LEAVING = """
import os, sys
from pathlib import Path
import torch
from rlseq.training.run.launch import run_recipe

class Trainer: pass

def main():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    trainer = Trainer()
    trainer.itself, trainer.group = trainer, torch.distributed.group.WORLD
    del trainer
    torch.distributed.all_gather_object([None], "the last collective")
    return 1 // int(sys.argv[1])

try:
    run_recipe(main)
finally:
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    print(torch.distributed.is_initialized(), sum("gloo" in name for name in names))
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads that Linux lists in /proc")
@pytest.mark.parametrize(("divisor", "left"), [(1, True), (0, False)], ids=["ends well", "fails"])
def test_a_recipe_that_ends_well_leaves_no_thread_of_gloo_behind(divisor, left):
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING, str(divisor)], capture_output=True, text=True, check=True, timeout=240
    )
    initialized, threads = ended.stdout.split()
    assert (initialized == "False", int(threads) == 0) == (left, left), ended.stdout
