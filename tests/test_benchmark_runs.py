"""benchmarks/runs.py makes what is missing, resumes what was stopped, and tables values with their differences."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "runs.py"
PLAN = """
output_dir: table
start: base
evaluations:
  validation: {config: e.yaml}
columns: ["wer:greedy", nll_per_token]
runs:
  reward: {recipe: grpo, config: g.yaml, reward_funcs: [a, b], seeds: [0, 1]}
  teacher: {recipe: sft, config: s.yaml, seeds: [0]}
others:
  few-shot: {dataset_name: few.py}
"""


@pytest.fixture
def runs(monkeypatch, tmp_path):
    found = importlib.util.spec_from_file_location("benchmark_runs", PATH)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return module


def call(runs, monkeypatch, tmp_path, *words, fails_at=None):
    """The commands of a call; training leaves a checkpoint, evaluating leaves results."""
    made = []

    def execute(words, log, threads=1):
        recipe = Path(words[1]).stem
        pairs = " ".join(words[2:])
        out = Path(words[words.index("--output_dir") + 1])
        made.append((recipe, pairs.replace(str(tmp_path), "")))
        if recipe != "evaluate":
            (out / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        elif "--compare" not in words:
            out.mkdir(parents=True, exist_ok=True)
            name = words[words.index("--models") + 1].partition("=")[0]
            cell = {"ci95": [0, 1]}
            model = {
                "likelihood": {"nll_per_token": {"value": 1, **cell}},
                "strategies": {"greedy": {"wer": {"value": 2}}},
            }
            (out / "results.json").write_text(runs.json.dumps({"models": {name: model}}))
        if fails_at is not None and len(made) == fails_at:
            sys.exit("stopped")

    joined = []
    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(runs, "join", lambda name, found, settings, folder: joined.append(found) or RESULTS)
    monkeypatch.setattr(sys, "argv", ["runs.py", str(tmp_path / "plan.yaml"), *words])
    runs.main()
    return made, joined


def cell(value, **more):
    return {"value": value, "ci95": [value, value], **more}


RESULTS = {
    "models": {
        "start": {"likelihood": {"nll_per_token": cell(0.5)}, "strategies": {"greedy": {"wer": cell(0.4)}}},
        "teacher": {"likelihood": {"nll_per_token": cell(0.25)}, "strategies": {"greedy": {"wer": cell(0.3)}}},
    },
    "methods": {
        "reward": {
            "seeds": 2,
            "likelihood": {"nll_per_token": cell(0.6, per_seed=[0.5, 0.7])},
            "strategies": {"greedy": {"wer": cell(0.35, per_seed=[0.3, 0.4])}},
        }
    },
    "comparisons": [
        {"metric": "wer", "strategy": "greedy", "a": "start", "b": "reward", "difference": -0.05, "ci95": [-0.1, 0.01]},
        {
            "metric": "nll_per_token",
            "strategy": None,
            "a": "start",
            "b": "teacher",
            "difference": -0.25,
            "ci95": [-0.3, -0.2],
        },
        {"metric": "wer", "strategy": "greedy", "a": "teacher", "b": "reward", "difference": 0.05, "ci95": [0, 1]},
    ],
}


def test_every_run_and_evaluation_is_made_once(runs, monkeypatch, tmp_path):
    made, joined = call(runs, monkeypatch, tmp_path)
    assert [recipe for recipe, _ in made] == ["grpo", "grpo", "sft"] + ["evaluate"] * 5
    assert made[1][1] == (
        "--config g.yaml --reward_funcs a b --seed 1 --output_dir /table/reward-1 --evaluate false "
        "--overwrite_output_dir true"
    )
    assert made[2][1] == "--config s.yaml --seed 0 --output_dir /table/teacher-0 --overwrite_output_dir true"
    assert made[4][1] == (
        "--config e.yaml --dataset_name few.py --models few-shot=base "
        "--output_dir /table/evaluations/validation/few-shot"
    )
    assert made[6][1].startswith("--config e.yaml --models reward=")
    assert [name for name, _ in joined[0]] == ["start", "reward", "reward", "teacher"]
    again, _ = call(runs, monkeypatch, tmp_path)
    assert again == []


def test_a_run_that_was_stopped_resumes_and_only_what_is_asked_is_made(runs, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="stopped"):
        call(runs, monkeypatch, tmp_path, "--only", "reward", "--seeds", "1", fails_at=1)
    made, _ = call(runs, monkeypatch, tmp_path, "--only", "reward", "--seeds", "1")
    assert [recipe for recipe, _ in made] == ["grpo", "evaluate", "evaluate", "evaluate"]
    assert made[0][1].endswith("--resume_from_checkpoint latest")


def test_a_run_that_another_process_makes_is_left_to_it(runs, monkeypatch, tmp_path):
    with runs.claimed(tmp_path / "table" / "reward-0") as mine:
        assert mine
        made, joined = call(runs, monkeypatch, tmp_path, "--only", "reward")
    assert [words.split("--seed ")[1][0] for recipe, words in made if recipe == "grpo"] == ["1"]
    assert len(joined[0]) == 2


def test_a_run_that_the_file_does_not_name_is_refused(runs, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(runs, monkeypatch, tmp_path, "--only", "rewards")
    assert "has no run 'rewards'; it has reward, teacher" in capsys.readouterr().err


def test_the_table_has_values_differences_to_the_start_and_seeds(runs):
    rows = runs.table(RESULTS, ["wer:greedy", "nll_per_token"], ["start", "reward", "teacher"]).splitlines()
    assert rows[0] == "| | seeds | wer:greedy | nll_per_token |"
    assert rows[2] == "| start |  | 0.4 | 0.5 |"
    assert rows[3] == "| reward | 2 | 0.35 (-0.05, -0.1 to +0.01) [0.3 0.4] | 0.6 [0.5 0.7] |"
    assert rows[4] == "| teacher | 1 | 0.3 | 0.25 (-0.25, -0.3 to -0.2) |"
