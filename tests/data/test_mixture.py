"""`--dataset_name a:0.7 b:0.3`: which rows an epoch holds, in which order, and what is refused."""

import json
from collections import Counter

import pytest
from tiny_task import tiny_tokenizer, tiny_trainer

from rlseq.cli.evaluate import ARGUMENTS
from rlseq.cli.main import main
from rlseq.common.mixture import parse_mixture
from rlseq.config.groups.rows import RowsArguments
from rlseq.config.parsing.parser import RecipeParser
from rlseq.data.files import place_of
from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_prompts, load_rows
from rlseq.errors import ConfigError, DataError


def length(completion: str) -> float:
    return float(len(completion))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("math", 10), ("code", 30)):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            lines = [json.dumps({"prompt": f"{name} {split} {n}", "references": ["a"]}) for n in range(count)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_an_epoch_of_training_holds_the_weights_and_repeats_evenly(data):
    rows = load_rows("math:0.75 code:0.25", "train", weighted=True)
    # 40 rows: 30 of 10 in math, each three times; 10 of 30 in code, every third
    assert Counter(row["dataset"] for row in rows) == {"math": 30, "code": 10}
    counts = Counter(row["prompt"] for row in rows)
    assert counts == {f"math train {n}": 3 for n in range(10)} | {f"code train {n}": 1 for n in range(0, 30, 3)}
    for start in range(0, 40, 4):  # any run of four has three of math and one of code
        assert [row["dataset"] for row in rows[start : start + 4]].count("code") == 1
    assert rows == load_rows("math:3 code:1", "train", weighted=True)  # weights are shares
    assert place_of(rows[0], 0) == "math/train.jsonl, line 1"


def test_shares_that_do_not_divide_take_rows_once_more_or_less(data):
    rows = load_rows("math:0.6 code:0.4", "train", weighted=True)
    counts = Counter(row["prompt"] for row in rows)
    assert Counter(row["dataset"] for row in rows) == {"math": 24, "code": 16}
    assert {counts[f"math train {n}"] for n in range(10)} == {2, 3}
    assert len({key for key in counts if key.startswith("code")}) == 16


def test_evaluation_reads_every_row_once(data):
    rows = load_rows("math:0.75 code:0.25", "validation")
    assert [row["prompt"] for row in rows] == [
        f"{name} validation {n}" for name, count in (("math", 10), ("code", 30)) for n in range(count)
    ]


def test_repeated_rows_have_keys_of_their_own(data):
    prompts = build_prompts(load_rows("math:0.75 code:0.25", "train", weighted=True), tiny_tokenizer())
    assert len({prompt.key for prompt in prompts}) == 40
    assert [p.key for p in prompts] == [
        p.key for p in build_prompts(load_rows("math:0.75 code:0.25", "train", weighted=True), tiny_tokenizer())
    ]


def test_flags_and_yaml_name_it_in_words(data):
    (data / "own.yaml").write_text("dataset_name: math:0.75 code:0.25\n")
    for line in (
        ["--dataset_name", "math:0.75", "code:0.25"],
        ["--config", "own.yaml"],
        ["--dataset_name=math:0.75 code:0.25"],
    ):
        _, arguments, *_ = RecipeParser(ARGUMENTS).parse(line)
        assert arguments.dataset_name == "math:0.75 code:0.25"


def test_commands_take_it_in_words_too(data, capsys):
    words = ["evaluate", "--dataset_name", "math:0.75", "code", "--models", "m=x", "--reward_funcs", "exact_match"]
    assert main(words) == 2
    assert "--dataset_name: 'code' has no weight" in capsys.readouterr().err
    words = ["reward", "check", "exact_match", "--dataset_name", "math:0.75", "code:0.25", "--train_rows", "4"]
    assert main(words) in (0, 1)
    assert "4 rows" in capsys.readouterr().out
    prompts = load_prompts("math:3 code:1", tiny_tokenizer(), split="train", limit=4, weighted=True)
    assert Counter(prompt.columns["dataset"] for prompt in prompts) == {"math": 3, "code": 1}


def test_a_run_trains_on_the_mixture_and_rewards_of_one_part_score_its_rows(data):
    rows = load_rows("math:0.75 code:0.25", "train", weighted=True)
    spec = {"func": length, "where": {"dataset": "code"}}
    trainer = tiny_trainer(data / "run", rewards=(spec,), rows=rows, group_column="dataset", max_steps=1)
    trainer.train()
    for index, scored in zip(trainer.batch.indices, trainer.batch.scored, strict=True):
        of_code = trainer.prompts[index].columns["dataset"] == "code"
        assert scored.status["length"] == ("ok" if of_code else "abstained")


def test_one_name_is_no_mixture():
    for name in (None, "math.jsonl", "owner/name", "a file with spaces.jsonl", "a.jsonl,b.jsonl", "C:1"):
        assert parse_mixture(name) is None
    assert parse_mixture("a.py:2 owner/name:.5 c:1.5") == {"a.py": 0.5, "owner/name": 0.125, "c": 0.375}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl:0.5 b.jsonl", "'b.jsonl' has no weight; name each as NAME:WEIGHT"),
        ("a.jsonl:0 b.jsonl:1", "'a.jsonl:0' has weight 0"),
        ("a.jsonl:1 a.jsonl:2", "names 'a.jsonl' twice"),
    ],
)
def test_what_is_no_mixture_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        RowsArguments(dataset_name=name)


def test_what_a_mixture_cannot_be_with_is_refused(data):
    with pytest.raises(ConfigError, match="--merge_references makes rows with equal prompts one"):
        RowsArguments(dataset_name="math:1 code:1", merge_references=True)
    (data / "math" / "train.jsonl").write_text('{"prompt": "a", "dataset": "b"}\n')
    with pytest.raises(DataError, match="the data set 'math' has a column 'dataset'"):
        load_rows("math:1 code:1", "train", weighted=True)
    with pytest.raises(DataError, match=r"there is no data file .*nothing.jsonl"):
        load_rows("math:1 ./nothing.jsonl:1", "train", weighted=True)
