"""A user's own reward file, in a folder of its own, through `accelerate launch recipes/grpo.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from forks import ROOT
from tiny_task import LETTERS, write_task

FREE_PORT = ("--main_process_port", "0")  # other launches may begin at the same time
MORE = """
from pathlib import Path


def patient(completion):
    return float(len(completion.split()))


def judged(completion):
    with Path(__file__).with_name("calls.txt").open("a") as calls:
        calls.write(f"{completion}\\n")
    return 0.5 if "A" in completion else None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows and rewards; nothing of it in the repository, and no package."""
    folder = tmp_path_factory.mktemp("theirs")
    write_task(folder)
    return folder


@pytest.mark.parametrize(("processes", "config"), [(1, "accelerate_config"), (2, "recipes/accelerate/cpu-2proc")])
def test_a_reward_file_in_another_folder_works_with_accelerate_launch(folder, tmp_path, processes, config):
    rewards = tmp_path / "elsewhere" / "my rewards.py"
    rewards.parent.mkdir()
    rewards.write_text(LETTERS + MORE)
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "reward_funcs": [
            f"{rewards}:letters",
            {"func": f"{rewards}:patient", "timeout": 30, "weight": 0.5},
            {"func": f"{rewards}:judged", "cache": str(tmp_path / "judged.sqlite")},
        ],
        "per_device_train_batch_size": 8 // processes,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "evaluate": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(settings))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"{config}.yaml", *FREE_PORT, "recipes/grpo.py"]
    ended = subprocess.run(
        [sys.executable, *launcher, "--config", str(tmp_path / "grpo.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    logs = sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert len(records) == 2 * 8
    for record in records:  # by hand
        said, wanted = record["completion"].split(), record["references"][0].split()
        letters, judged = sum(letter in said for letter in wanted) / len(wanted), 0.5 if "A" in said else None
        assert record["values"] == {"letters": letters, "patient": len(said), "judged": judged}
        # weights 1, 0.5, 1: an abstention hands its share to the others
        total = letters + 0.5 * len(said)
        assert record["total"] == pytest.approx(total * 2.5 / 1.5 if judged is None else total + judged)
    assert any(record["status"]["judged"] == "abstained" for record in records)
    # two processes may meet a text at the same time; what one has kept, none asks for again
    calls = (rewards.parent / "calls.txt").read_text().splitlines()
    assert {record["completion"] for record in records} <= set(calls)
    assert max(map(calls.count, calls)) <= processes
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = [line["rewards/judged/abstained"] for line in metrics if "rewards/judged/abstained" in line]
    assert sum(counted) == sum(record["status"]["judged"] == "abstained" for record in records)
