"""`--curriculum`: the rows that it keeps, what it says of the others, and what it refuses."""

import json

import pytest
from test_dry_run import run, table
from tiny_task import ROWS, write_rows, write_task

from rlseq.cli.main import main
from rlseq.config.groups.curriculum import TrainingDataArguments
from rlseq.data.curriculum import rows_in_range
from rlseq.errors import ConfigError, DataError

RATES = (0.0, 0.1, 0.5, 0.9, 1.0, None, 0.3, 0.95)  # 4 of the 8 are from 0.1 to 0.9


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    rated = [{**row, "pass_rate": rate} for row, rate in zip(ROWS, RATES, strict=True)]
    write_rows(folder / "rated/train.jsonl", rated)
    write_rows(folder / "rated/validation.jsonl", ROWS)
    return folder


def recipe(monkeypatch, name, task, *more, data="rated"):
    given = ["--model_name_or_path", task / "model", "--dataset_name", task / data, "--reward_funcs", "exact_match"]
    given += [
        "--max_completion_length",
        4,
        "--use_cpu",
        "true",
        "--per_device_train_batch_size",
        4,
        "--dry_run",
        "true",
    ]
    given += ["--num_generations", 2] if name == "grpo" else []
    return run(monkeypatch, name, *given, *more)


def test_ends_count_and_the_others_are_counted_by_side():
    rows = [{"p": value} for value in (0.0, 0.1, 0.5, None, 0.9, 0.90001, 1)]
    kept, said = rows_in_range(rows, "p", 0.1, 0.9)
    assert kept == [{"p": 0.1}, {"p": 0.5}, {"p": 0.9}]
    assert said == "--curriculum keeps 3 of 7 rows by p: 1 below 0.1, 2 above 0.9, 1 without a value"
    assert rows_in_range(kept, "p", 0, 1) == (kept, "--curriculum keeps 3 of 3 rows by p")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"p": 0.95}, {}], "keeps 0 of 2 rows by p: 1 above 0.9, 1 without a value. Give a wider range"),
        ([{"p": "0.5"}], "row 0: the column 'p' is '0.5'; expected a number"),
        ([{"p": True}], "row 0: the column 'p' is True; expected a number"),
        ([{"pp": 0.5}], "its columns are pp. Did you mean 'p"),
    ],
)
def test_rows_that_cannot_be_chosen_from_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        rows_in_range(rows, "p", 0.1, 0.9)


@pytest.mark.parametrize(
    ("text", "ends"),
    [("0.1-0.9", (0.1, 0.9)), ("0-1", (0, 1)), ("-1--.5", (-1, -0.5)), ("1e-3-1", (0.001, 1)), ("0.5-0.5", (0.5, 0.5))],
)
def test_a_range_is_two_numbers(text, ends):
    assert TrainingDataArguments(curriculum=text).curriculum_range() == ends


@pytest.mark.parametrize("text", ["0.5", "0.9-0.1", "a-b", "0.1-", "", "0.1-0.5-0.9", "nan-1"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected two numbers, the smaller first, as 0\.1-0\.9"):
        TrainingDataArguments(curriculum=text)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_trains_on_the_rows_in_the_range_and_says_how_many_were_dropped(name, task, monkeypatch, capsys):
    assert recipe(monkeypatch, name, task, "--curriculum", "0.1-0.9") == 0
    out = capsys.readouterr().out
    kept = "rlseq: --curriculum keeps 4 of 8 rows by pass_rate: 1 below 0.1, 2 above 0.9, 1 without a value"
    assert kept in out.splitlines() and table(out)["prompts"] == 4
    assert recipe(monkeypatch, name, task, "--curriculum", "0.1-0.9", data="data") == 2
    assert "Write it by `rlseq difficulty DATA --model MODEL`, and give the folder" in capsys.readouterr().err
    assert recipe(monkeypatch, name, task, "--curriculum", "high") == 2
    assert "--curriculum is 'high'; expected two numbers" in capsys.readouterr().err
    assert recipe(monkeypatch, name, task, "--curriculum_column", "rate") == 2
    assert "--curriculum_column is rate, which has no effect without --curriculum" in capsys.readouterr().err


def test_teacher_forcing_trains_on_the_references_of_the_rows_in_the_range(task, monkeypatch, capsys):
    given = ["--model_name_or_path", task / "model", "--dataset_name", task / "rated", "--curriculum", "0.1-0.9"]
    given += ["--use_cpu", "true", "--per_device_train_batch_size", 2, "--dry_run", "true"]
    assert run(monkeypatch, "sft", *given) == 0
    out = capsys.readouterr().out
    assert out.count("--curriculum keeps 4 of 8 rows by pass_rate") == 1  # validation keeps all of its rows
    assert table(out)["examples"] == 4
    assert run(monkeypatch, "sft", *given, "--from_rollouts", task) == 2
    assert "--curriculum chooses rows of the data, and --from_rollouts trains on a log" in capsys.readouterr().err


def test_it_reads_what_the_command_wrote(task, tmp_path, monkeypatch, capsys):
    words = ["difficulty", task / "data", "--model", task / "model", "--output_dir", tmp_path / "out"]
    assert main([*map(str, words), "--max_new_tokens", "4", "--column", "p"]) == 0
    rates = [json.loads(line)["p"] for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    middle = f"{sorted(rates)[4]:.20f}"  # the upper 4 of 8
    chosen = ["--curriculum", f"{middle}-1", "--curriculum_column", "p"]
    assert recipe(monkeypatch, "grpo", task, *chosen, data=tmp_path / "out") == 0
    assert "keeps 4 of 8 rows by p: 4 below" in capsys.readouterr().out
