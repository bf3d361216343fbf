"""Two processes give what one does: every study, what is tuned on validation, every number of results.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import word_tokenizer
from tiny import tiny_model

from rlseq.cli.main import main
from rlseq.evaluation.studies.table import STUDIES

ROOT = Path(__file__).parents[2]
REWARD = """def letters(completion, references):
    return float(sum(word in completion for word in references[0].split()))
"""


def rows_of(letters):
    return [
        {"prompt": f"{a} {b} = ", "references": [f"{a} {b}".upper(), a.upper()]} for a in letters for b in "abcdefg"
    ]


@pytest.fixture
def task(tmp_path):
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "data").mkdir()
    for split, letters in (("test", "abcd"), ("validation", "ef")):
        text = "".join(json.dumps(row) + "\n" for row in rows_of(letters)[:27])
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def leaves(node, place=""):
    """By place every number, text and null of nested dicts and lists."""
    if isinstance(node, dict):
        return {p: v for key, child in node.items() for p, v in leaves(child, f"{place}/{key}").items()}
    if isinstance(node, list):
        return {p: v for i, child in enumerate(node) for p, v in leaves(child, f"{place}/{i}").items()}
    return {place: node}


@pytest.mark.soak  # three processes that load torch
def test_every_study_and_choice_gives_in_two_processes_what_it_gives_in_one(task):
    arguments = [
        "--models", f"base={task}/one", f"rl={task}/two", f"rl={task}/one", "--dataset_name", f"{task}/data",
        "--eval_split", "test", "--reward_funcs", f"{task}/reward.py:letters", "--samples_per_row", "2",
        "--strategies", "greedy", "sample:temperature=0.5/1", "--max_new_tokens", "4", "--resamples", "50",
        "--studies", *STUDIES, "--coverage_samples", "4", "--temperatures", "0.5", "1", "--prefix_lengths", "1",
        "--study_rows", "25",
    ]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu-2proc.yaml"]
    ended = subprocess.run(
        [sys.executable, *launch, "recipes/evaluate.py", *arguments, "--output_dir", str(task / "two_processes")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert main(["evaluate", *arguments, "--output_dir", str(task / "one_process")]) == 0
    two, one = (json.loads((task / name / "results.json").read_text()) for name in ("two_processes", "one_process"))
    assert set(one["studies"]) == set(STUDIES) and one["studies"]["lookahead"]["rows_held_out"] > 0
    assert one["tuned"]["strategies"]["sample:temperature=0.5/1.0"]["models"]["base"]["values"]
    two, one = leaves(two), leaves(one)
    assert list(two) == list(one)
    for place, value in one.items():
        if isinstance(value, float):  # log-probs round otherwise in other batches
            assert two[place] == pytest.approx(value, rel=1e-4, abs=1e-5), place
        else:
            assert two[place] == value, place
