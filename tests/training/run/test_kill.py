"""Runs of the recipes that are killed (SIGKILL) again and again, each time gone on with, against an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from forks import end_of, fork, recipe
from safetensors.torch import load_file
from test_recipes import ROOT, read_lines
from test_resume_state import WALL_CLOCK
from tiny_task import LETTERS, save_model, write_rows
from transformers import TrainerState

from rlseq.training.run.checkpoints import find_defect

STEPS = 36
LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu-2proc.yaml"]


def write_task(folder):
    """A tiny model, data, a reward, and configs under which every part of a run's state matters.

    A round of 8 rollouts is 2 minibatches, used twice: 4 steps. Six of the 8 rows are the split train, so GRPO's epoch
    is 3 rounds of 2 prompts, and 24 steps are two epochs; PPO takes 4 prompts a round, an epoch. Steps are logged by
    threes, so logs straddle rounds.
    """
    save_model(folder / "model")
    write_rows(folder / "data" / "train.jsonl")
    (folder / "rewards.py").write_text(LETTERS)
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "reward_funcs": [f"{folder}/rewards.py:letters"],
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "beta": 0.05,
        "ema_decay": 0.8,
        "max_steps": STEPS,
        "save_steps": 1,
        "logging_steps": 3,
        "evaluate": False,
        "disable_tqdm": True,
        "num_cpu_threads": 1,
    }
    (folder / "grpo.yaml").write_text(yaml.safe_dump(config | {"num_generations": 4}))
    more = {"num_generations": 2, "critic_learning_rate": 3e-2, "critic_warmup_steps": 2, "kl_target": 0.5}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(config | more))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


# -- what is compared


def state_of(run):
    """Everything that a run leaves and a later step could depend on, but for wall-clock times."""
    whole = sorted(p.name for p in run.glob("checkpoint-*") if find_defect(p) is None)
    last = run / f"checkpoint-{max(int(name.split('-')[1]) for name in whole)}"
    held = {}
    for path in sorted(last.rglob("*")):
        name = str(path.relative_to(last))
        if path.suffix == ".safetensors":
            held[name] = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            held[name] = torch.load(path, weights_only=False)
        elif path.suffix == ".json":
            held[name] = json.loads(path.read_text())
    return {
        "weights": load_file(run / "model.safetensors"),
        "checkpoints": whole,
        "the last checkpoint": held,
        "metrics": read_lines(run / "metrics.jsonl"),
        "rollouts": {path.name: path.read_text() for path in sorted((run / "rollouts").iterdir())},
    }


def difference(a, b, where="run"):
    """The first place where two states differ, tensors bit for bit; None if nowhere. Wall-clock fields do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({k: v for k, v in x.items() if not str(k).startswith(WALL_CLOCK)} for x in (a, b))
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(a[key], b[key], key) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = [(x, y, i) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif torch.is_tensor(a) or hasattr(a, "dtype"):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return None if same else f"{where}: tensors"
    else:
        return None if a == b or (a != a and b != b) else f"{where}: {a!r} and {b!r}"
    return next((found for x, y, key in pairs if (found := difference(x, y, f"{where} / {key}"))), None)


def check_same(run, undisturbed, checkpoints=STEPS):
    """Nothing differs, nothing is missing, nothing is there twice."""
    expected = state_of(undisturbed)
    assert len(expected["rollouts"]) == STEPS // 4 and expected["metrics"][-1]["summary"]
    assert [line["step"] for line in expected["metrics"][:-1]] == list(range(3, STEPS + 1, 3))
    assert expected["metrics"][-1]["epoch"] > 1 and len(expected["checkpoints"]) == checkpoints
    names = {"model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert names <= expected["the last checkpoint"].keys()
    assert difference(state_of(run), expected) is None
    assert not list(run.glob("rollouts/*.partial")) and not list(run.glob(".checkpoint*"))


# -- how a run is killed


def kill_in_the_save_of(step, act):
    """Do something, to be killed once every file of a checkpoint is written but for the one that marks it as whole."""
    save = TrainerState.save_to_json

    def save_or_die(state, path):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    TrainerState.save_to_json = save_or_die
    act()


def test_a_run_killed_in_a_step_and_in_a_save_ends_as_the_undisturbed_one(task, tmp_path):
    arguments = ["--config", task / "grpo.yaml", "--save_steps", 2, "--output_dir"]
    log, run = tmp_path / "log", tmp_path / "killed"
    continued = recipe("grpo", [*arguments, run, "--resume_from_checkpoint", "latest"])

    pid = fork(recipe("grpo", [*arguments, run]), log)
    while not (run / "checkpoint-6/trainer_state.json").exists():
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert end_of(pid) == -signal.SIGKILL, log.read_text()
    reached = max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
    assert 6 <= reached < 18 and not (run / "model.safetensors").exists()

    assert end_of(fork(lambda: kill_in_the_save_of(18, continued), log)) == -signal.SIGKILL, log.read_text()
    assert find_defect(run / "checkpoint-18") == "it has no trainer_state.json"
    assert (run / "checkpoint-18/resume_state/rank-0.pt").exists()

    assert end_of(fork(continued, log)) == 0, log.read_text()
    assert len(list(run.glob("superseded-checkpoint-18-*"))) == 1
    assert end_of(fork(recipe("grpo", [*arguments, tmp_path / "whole"]), log)) == 0, log.read_text()
    check_same(run, tmp_path / "whole", checkpoints=STEPS // 2)


class Killed:
    """A recipe in real processes, killed at random moments of its life and each time gone on with.

    Attributes:
        in_training, truncated: how many kills fell between a life's first checkpoint and the end of training; how many
            of all left a checkpoint that was being written.
    """

    def __init__(self, name, config, run, launcher, seed):
        self.run, self.launcher, self.rng = run, launcher, random.Random(seed)
        self.command = [f"recipes/{name}.py", "--config", str(config), "--output_dir", str(run)]
        self.log = run.with_name(f"{run.name}.log")
        self.kills = self.in_training = self.truncated = 0

    def start(self, *launcher):
        """Start it, to resume from the last complete checkpoint if there is one."""
        again = ["--resume_from_checkpoint", "latest"] if self.reached() else ["--overwrite_output_dir", "true"]
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, *(launcher or self.launcher), *self.command, *again],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait_for(self, process, path, left=None):
        """Return once a path is there, as another file than `left`."""
        deadline = time.monotonic() + 240
        while (found := inode(path)) is None or found == left:
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.0005)

    def reached(self):
        """The last whole checkpoint's step; 0 without one."""
        steps = [int(p.name.split("-")[1]) for p in self.run.glob("checkpoint-*") if find_defect(p) is None]
        return max(steps, default=0)

    def kill(self, moment, seconds):
        """Start it, kill it a while after a moment of its life, and print where that was.

        Args:
            moment: "start"; "step" or "save": the checkpoint of a step or two later is whole, or its folder there;
                "end": the last checkpoint is whole.
            seconds: the most that is waited then; how long is random.
        """
        before = self.reached()
        target = min(before + self.rng.randint(1, 2), STEPS) if moment in ("step", "save") else STEPS
        folder = self.run / f"checkpoint-{target}"
        sought = {"start": self.run.parent, "save": folder}.get(moment, folder / "trainer_state.json")
        # What an earlier kill left of this checkpoint is set aside first.
        left = None if moment == "start" else inode(sought)
        files = {inode(path) for path in self.run.glob("checkpoint-*")}
        process = self.start()
        self.wait_for(process, sought, left if before < STEPS else None)
        time.sleep(waited := self.rng.uniform(0, seconds))
        where = "after its end" if process.poll() is not None else None
        kill_with_children(process)
        new = [path for path in self.run.glob("checkpoint-*") if inode(path) not in files]
        truncated = [path.name for path in new if find_defect(path) is not None]
        reached = self.reached()
        where = where or ("at the end" if reached == STEPS else "in training" if new else "in start-up")
        self.kills += 1
        self.in_training += where == "in training"
        self.truncated += bool(truncated)
        then = moment if moment == "start" else f"{moment} {target}"
        print(
            f"  kill {self.kills} {where}, {waited:.3f} s after {then}: went from step {before} to {reached}",
            *truncated,
        )


def inode(path):
    return path.stat().st_ino if path.exists() else None


def kill_with_children(process):
    """SIGKILL to a process and all below it, and wait until they are gone."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        parent.suspend()  # so that it starts no more of them
        everyone = [*parent.children(recursive=True), parent]
        for one in everyone:
            one.kill()
        process.wait()
        psutil.wait_procs(everyone, timeout=30)


# What `python -c` runs: a recipe that is killed once all of checkpoint-N is written but its mark.
UNMARKED = """
import pathlib, runpy, sys
sys.path[:0] = map(str, pathlib.Path("tests").glob("**"))
from test_kill import kill_in_the_save_of
del sys.argv[0]
kill_in_the_save_of({step}, lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
"""


@pytest.mark.soak
@pytest.mark.parametrize(("name", "processes"), [("grpo", 1), ("ppo", 1), ("grpo", 2)])
def test_a_run_killed_ten_times_ends_as_the_undisturbed_one(task, tmp_path, name, processes):
    launcher = LAUNCHER if processes > 1 else []
    whole = Killed(name, task / f"{name}.yaml", tmp_path / "whole", launcher, seed=0)
    began = time.monotonic()
    process = whole.start()
    whole.wait_for(process, whole.run / "checkpoint-1")
    start_up = time.monotonic() - began
    assert process.wait(300) == 0, whole.log.read_text()[-3000:]
    in_all = time.monotonic() - began
    a_step = (in_all - start_up) / STEPS  # kills are so close that the run cannot end between them
    print(f"{name}, {processes} process(es): start-up {start_up:.1f} s, in all {in_all:.1f} s")

    run = Killed(name, task / f"{name}.yaml", tmp_path / "killed", launcher, seed=processes)
    moments = ["start"] * 2 + ["step"] * 4 + ["save"] * 3
    run.rng.shuffle(moments)
    for moment in moments:
        run.kill(moment, {"start": start_up, "step": 1.5 * a_step, "save": a_step}[moment])
    if processes == 1:
        step = run.reached() + 2
        code = run.start("-c", UNMARKED.format(step=step)).wait(240)
        assert code == -signal.SIGKILL and find_defect(run.run / f"checkpoint-{step}") == "it has no trainer_state.json"
        print(f"  killed with all of checkpoint-{step} written but its mark")
    run.kill("end", 0.5)
    print(f"  {run.kills} kills: {run.in_training} in training, {run.truncated} in a save")
    # Whether a kill at random falls within a save is up to the machine; that of one process at its mark always does.
    assert run.kills == 10 and run.in_training >= 5 and run.truncated >= (processes == 1)
    process = run.start()
    assert process.wait(300) == 0, run.log.read_text()[-3000:]
    assert ("Skipping a checkpoint that was not written to its end" in run.log.read_text()) == (run.truncated > 0)
    check_same(run.run, whole.run)
