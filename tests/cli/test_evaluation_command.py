"""What recipes must hear of an evaluation's settings: refused before training or a join, and passed on."""

import dataclasses
import re

import pytest
import yaml
from test_data import word_tokenizer
from test_dry_run import run
from tiny_task import write_task

from rlseq.cli.main import main
from rlseq.errors import ConfigError
from rlseq.evaluation.run import ContrastSettings, check_settings
from rlseq.scoring import load_rewards

ROWS = [{"prompt": f"{a} {b} = ", "references": [a.upper()], "key": a.upper()} for a in "abcd" for b in "efg"]
REWARD = """def keyed(completion, key):
    return float(completion.strip() == key)


def moody(completion, prompt):
    if prompt.startswith("a"):
        raise ValueError("not this one")
    return 1.0
"""


def keyed(completion, key):
    return float(completion.strip() == key)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, rows=ROWS, tokenizer=word_tokenizer(), initializer_range=0.3)
    (folder / "reward.py").write_text(REWARD)
    return folder


def test_an_oracle_by_a_column_of_the_data_is_refused_as_primary_once_the_rows_are_known():
    settings = ContrastSettings(strategies=("greedy", "best_of:n=2,by=keyed"), primary="keyed:best_of:n=2,by=keyed")
    with load_rewards([keyed]) as suite:
        check_settings(settings, suite)  # without rows nobody knows that the data has a key
        with pytest.raises(ConfigError, match="an oracle: it chooses by a reward that reads key"):
            check_settings(settings, suite, ROWS)
        # a family of oracles is one
        n = dataclasses.replace(
            settings,
            strategies=("best_of:n=2/4,by=keyed",),
            primary="keyed:best_of:n=2/4,by=keyed",
            tune_split="validation",
        )
        with pytest.raises(ConfigError, match="an oracle: it chooses by a reward that reads key"):
            check_settings(n, suite, ROWS)
        check_settings(settings, suite, ROWS, {"prompt_column": "key"})  # the prompt tells it


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_recipe_refuses_it_before_it_trains(recipe, task, tmp_path, monkeypatch, capsys):
    arguments = [
        "--model_name_or_path", task / "model", "--dataset_name", task / "data", "--output_dir", tmp_path / "run",
        "--reward_funcs", f"{task}/reward.py:keyed", "--max_completion_length", 4, "--use_cpu", "true",
        "--per_device_train_batch_size", 4, *(["--num_generations", 2] if recipe == "grpo" else []),
        "--strategies", "greedy", "best_of:n=2,by=keyed", "--primary", "keyed:best_of:n=2,by=keyed",
        "--dry_run", "true",
    ]  # fmt: skip
    assert run(monkeypatch, recipe, *arguments) == 2
    assert "an oracle: it chooses by a reward that reads key" in capsys.readouterr().err
    assert run(monkeypatch, recipe, *arguments[:-6], "greedy", "sample:temperature=0.5/1", *arguments[-2:]) == 2
    assert "no rows to tune on; give one value" in capsys.readouterr().err  # a run has none but those evaluated
    assert run(monkeypatch, recipe, *arguments[:-6], "greedy", *arguments[-2:]) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"models": "x=y"},
        {"samples_per_row": 9, "eval_rows": 5},
        {"temperatures": 0.5, "tune_split": "dev"},
        {"study_rows": 5, "dataset_name": "d"},
    ],
)
def test_the_recipe_refuses_settings_beside_a_join_by_name_as_the_command_does(given, tmp_path, monkeypatch, capsys):
    flags = [str(text) for name, value in given.items() for text in (f"--{name}", value)]
    arguments = ["--compare", "a", "b", "--output_dir", str(tmp_path), *flags]
    for code in (run(monkeypatch, "evaluate", *arguments), main(["evaluate", *arguments])):
        assert code == 2
    said = re.findall("evaluated before, and (.*) cannot change it", capsys.readouterr().err)
    assert [set(names.split(", ")) for names in said] == [{f"--{name}" for name in given}] * 2


def test_the_recipes_share_of_failures_is_what_ends_an_evaluation(task, tmp_path, monkeypatch, capsys):
    spec = {"func": f"{task}/reward.py:moody", "on_error": "abstain"}
    settings = {
        "models": [f"one={task}/model"], "dataset_name": f"{task}/data", "reward_funcs": [spec], "studies": ["none"],
        "output_dir": f"{tmp_path}/out", "strategies": ["greedy"], "max_new_tokens": 2, "resamples": 20,
    }  # fmt: skip
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", tmp_path / "settings.yaml"]
    assert run(monkeypatch, "evaluate", *arguments) == 2  # 3 of 12 rows fail
    assert "failed on 3 of 12 completions, more than max_error_rate = 0.05" in capsys.readouterr().err
    assert run(monkeypatch, "evaluate", *arguments, "--max_error_rate", 0.24) == 2
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", *arguments, "--max_error_rate", 0.25) == 0
    first = "rlseq: evaluates 12 rows (12 of 12 validation prompts also in train)"  # two named files with the same rows
    assert first in capsys.readouterr().out.splitlines()
    assert run(monkeypatch, "evaluate", "--compare", "a", "b", "--max_error_rate", 0.25) == 2
    assert "--max_error_rate cannot change it" in capsys.readouterr().err


def test_an_evaluation_says_before_it_starts_what_its_rows_can_detect(task, tmp_path, capsys):
    flags = ["--dataset_name", f"{task}/data", "--reward_funcs", "exact_match", "--output_dir", str(tmp_path / "out")]
    flags += ["--strategies", "greedy", "--max_new_tokens", "2", "--resamples", "20", "--studies", "none"]
    assert main(["evaluate", "--models", f"one={task}/model", f"two={task}/model", *flags]) == 0
    before, _, after = capsys.readouterr().out.partition("2 rows, 95% intervals")
    assert "12 rows detect a paired difference of a rate of 57.2 percentage points with 80% power" in before
    assert "80% power" not in after  # equal models: their rows show no spread
    assert main(["evaluate", "--models", f"one={task}/model", *flags]) == 0
    assert "80% power" not in capsys.readouterr().out  # nothing is compared


def test_an_evaluation_says_that_it_replaces_an_earlier_one_and_leaves_nothing_of_it(task, tmp_path, capsys):
    folder = tmp_path / "out"
    flags = ["--models", f"one={task}/model", "--dataset_name", f"{task}/data", "--reward_funcs", "exact_match"]
    flags += ["--output_dir", str(folder), "--strategies", "greedy", "--max_new_tokens", "2", "--resamples", "20"]
    assert main(["evaluate", *flags, "--studies", "lookahead"]) == 0
    assert "earlier evaluation" not in capsys.readouterr().out
    of_the_study = {path.name for path in (folder / "plots").glob("lookahead*.svg")}
    assert of_the_study and (folder / "studies.jsonl").exists()
    (folder / "plots" / "mine.svg").write_text("<svg/>")
    assert main(["evaluate", *flags, "--studies", "none"]) == 0
    said = f"rlseq: {folder} holds an earlier evaluation (of one on {task}/data (validation)), which this one replaces"
    assert said in capsys.readouterr().out
    names = {path.name for path in (folder / "plots").iterdir()} - {"plane.svg", "pass-at-k.svg"}
    assert names == {"mine.svg"} and not (folder / "studies.jsonl").exists()


def test_an_empty_output_dir_is_refused_before_anything_is_read(capsys):
    assert main(["evaluate", "--models", "missing", "--dataset_name", "missing.jsonl", "--output_dir", " "]) == 2
    assert "--output_dir is empty" in capsys.readouterr().err
