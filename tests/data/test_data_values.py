"""What stands in a data file is what arrives, in every format, in prompts and rewards: numbers, dates, absent keys."""

import gzip
import json
import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from test_data import CHAT_TEMPLATE, TOKENIZER, own_cache, word_tokenizer  # noqa: F401

from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_prompts, load_rows
from rlseq.errors import DataError
from rlseq.recipes.sft import examples
from rlseq.scoring import load_rewards
from rlseq.scoring.check.check import make_rollout
from rlseq.scoring.check.smoke_test import smoke_test_rewards
from rlseq.training.grpo import training_rows
from rlseq.types import ABSENT, columns_of

ROWS = [
    {"prompt": "a", "references": 5, "n": 2**63, "date": "2020-01-01", "at": "2020-01-01T10:00:00Z", "on": True},
    {"prompt": "b", "references": 0.5, "n": -(2**70), "date": "2021-05-06", "at": "2021-05-06T00:00:00Z", "on": 1},
    {
        "prompt": "ü",
        "references": [1],
        "n": None,
        "größe": {"tief": [{"x": 1}, {"x": 1.5, "y": None}, {}]},
        "on": "yes",
    },
    {"n": 1.0, "prompt": [{"role": "user", "content": "c"}], "extra": {}, "dates": ["2020-01-01", None]},
]


def as_json(path, rows):
    text = json.dumps(rows, ensure_ascii=False) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return str(path)


def exactly(value):
    """Equal texts are equal values, types, keys and order of keys: 5 is not 5.0, and 1 is not true."""
    return json.dumps(value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_arrives_with_its_types_and_its_keys(tmp_path, suffix):
    (tmp_path / "deeper").mkdir()
    as_json(tmp_path / f"deeper/train-0.{suffix}", ROWS)
    as_json(tmp_path / f"train-1.{suffix}", ROWS[::-1])
    rows = load_rows(str(tmp_path), None)
    assert exactly(rows) == exactly(ROWS + ROWS[::-1])
    assert exactly(load_rows(f"{tmp_path}/train-1.{suffix}", None)) == exactly(ROWS[::-1])


def compressed(path):
    """The file compressed by gzip beside it, and the file gone."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


AS_CSV = 'prompt,n,zip,on,size\r\n"a\r\n""b""",18446744073709551616,007,True,0.5\r\nü,3,12,False,\r\n'


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_gzip_compresses_arrives_as_the_plain_file_does(tmp_path, suffix, encoding):
    path = tmp_path / f"train-0.{suffix}"
    as_json(path, ROWS)
    text = AS_CSV if suffix == "csv" else path.read_text(encoding="utf-8").replace("\n", "\r\n")
    path.write_bytes(text.encode(encoding))
    plain = load_rows(str(path), None)
    packed = compressed(path)
    (tmp_path / f"validation.{suffix}").write_bytes(text.encode(encoding))
    compressed(tmp_path / f"validation.{suffix}")
    by_hand = [
        {"prompt": 'a\r\n"b"', "n": 2**64, "zip": "007", "on": True, "size": 0.5},
        {"prompt": "ü", "n": 3, "zip": "12", "on": False, "size": None},
    ]
    for rows in (
        plain,
        *(load_rows(*of) for of in ((str(packed), None), (str(tmp_path), "train"), (str(tmp_path), "validation"))),
    ):
        assert exactly(rows) == exactly(by_hand if suffix == "csv" else ROWS)


def test_a_folder_may_hold_plain_and_compressed_parts_but_not_one_part_twice(tmp_path):
    as_json(tmp_path / "train-0.jsonl", ROWS[:1])
    as_json(tmp_path / "train-1.jsonl", ROWS[1:])
    packed = compressed(tmp_path / "train-1.jsonl")
    assert exactly(load_rows(str(tmp_path), None)) == exactly(ROWS)
    (tmp_path / "train-1.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.raises(DataError, match=r"train-1.jsonl.gz' stands beside 'train-1.jsonl', and both would be read"):
        load_rows(str(tmp_path), None)


UNREADABLE = [
    ("r.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n{"prompt": }\n'), r"r.jsonl.gz, line 2: not valid JSON"),
    ("r.csv.gz", gzip.compress(b"prompt,n\na,1\nb\n"), r"r.csv.gz, line 3: 1 field; expected 2"),
    ("r.csv.gz", gzip.compress(b"prompt,n\na,\xff\n"), r"r.csv.gz, line 2: byte 0xff is not UTF-8"),
    ("r.jsonl.gz", gzip.compress(b""), r"r.jsonl.gz' is empty; expected rows"),
    ("r.jsonl.gz", b"", r"r.jsonl.gz' is empty; expected rows"),
    (
        "r.jsonl.gz",
        gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9],
        r"r.jsonl.gz' is not a complete gzip file .*truncated",
    ),
    ("r.csv.gz", gzip.compress(b"prompt\na\n" * 99)[:-9], r"r.csv.gz' is not a complete gzip file .*truncated"),
    ("r.json.gz", b'[{"prompt": "a"}]', r"r.json.gz' is not a complete gzip file .Not a gzipped file"),
    ("r.json.gz", gzip.compress(b"[]")[:10] + b"\xff" * 20, r"r.json.gz' is not a complete gzip file"),
    ("r.parquet.gz", gzip.compress(b"x"), r"r.parquet.gz' is of an unknown format; known are .json, .jsonl, .csv"),
    ("r.jsonl.zst", b"x", r"r.jsonl.zst' is of an unknown format"),
    ("r.csv.xz", b"x", r"r.csv.xz' is of an unknown format"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), UNREADABLE, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(UNREADABLE)]
)
def test_a_compressed_file_that_cannot_be_read_is_named_and_never_left_out(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message) as error:
            load_rows(str(given), None)
        assert "\n" not in str(error.value)


def test_an_error_in_a_compressed_file_names_its_line(tmp_path):
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b", None))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    with pytest.raises(DataError, match=r"r.jsonl.gz, line 3: the prompt is None"):
        load_prompts(str(tmp_path / "r.jsonl.gz"), TOKENIZER, split=None)


def test_a_json_file_that_is_one_mapping_on_several_lines_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    assert load_rows(str(tmp_path / "one.json"), None) == ROWS[:1]


def test_references_and_templates_have_the_text_that_stands_in_the_file(tmp_path):
    rows = [{"date": "2020-01-01", "n": 2**64, "references": 5}, {"date": "2020-01-02", "n": 7, "references": 0.5}]
    name = as_json(tmp_path / "rows.jsonl", rows)
    prompts = load_prompts(name, TOKENIZER, split=None, prompt_template="{{ date }} {{ n }}")
    assert [prompt.prompt for prompt in prompts] == ["2020-01-01 18446744073709551616", "2020-01-02 7"]
    assert [prompt.columns["references"] for prompt in prompts] == [["5"], ["0.5"]]


def test_csv_files_of_one_split_may_have_unequal_columns_and_whole_numbers_of_any_size(tmp_path):
    (tmp_path / "train-0.csv").write_text("prompt,n\na,18446744073709551616\n", encoding="utf-8-sig")
    (tmp_path / "train-1.csv").write_text('prompt,size\n"b\n""c""",0.5\nd,\n')
    assert exactly(load_rows(str(tmp_path), None)) == exactly(
        [{"prompt": "a", "n": 2**64}, {"prompt": 'b\n"c"', "size": 0.5}, {"prompt": "d", "size": None}]
    )


UNEQUAL = [
    {"prompt": [{"role": "user", "content": "a", "name": "ann"}], "extra": {"tol": 0.5, "deep": [{"x": 1}]}},
    {"prompt": [{"role": "user", "content": "b"}], "extra": {"unit": "cm", "deep": [{"y": 2}]}, "level": 3},
]


def arrow(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def test_keys_that_a_row_lacks_are_absent_in_every_format_and_from_the_hub(tmp_path, monkeypatch):
    held = arrow(UNEQUAL)
    assert held[1]["prompt"][0]["name"] is None  # Arrow has every key
    pyarrow.parquet.write_table(held.data.table, tmp_path / "r.parquet")
    (tmp_path / "task.py").write_text(
        f"import datasets\ndef load(split):\n    return datasets.Dataset.from_list({held.to_list()!r})\n"
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *_, load=datasets.load_dataset, **more: (
            {"validation": held} if name == "some/set" else load(name, *_, **more)
        ),
    )
    for name in (
        str(tmp_path / "r.parquet"),
        as_json(tmp_path / "r.jsonl", UNEQUAL),
        f"{tmp_path}/task.py",
        "some/set",
    ):
        assert load_rows(name, None) == UNEQUAL, name


def test_a_data_set_of_datasets_makes_the_same_prompts_as_its_rows():
    rows = [{"prompt": "a", "extra": {"x": 1}}, {"prompt": "b", "extra": {"y": 1}, "references": "B"}]
    prompts = build_prompts(arrow(rows), TOKENIZER)
    assert prompts == build_prompts(rows, TOKENIZER)
    assert prompts[1].columns == {"extra": {"y": 1}, "references": ["B"]}  # a column that the first row lacks


def test_a_column_that_a_row_lacks_is_false_in_a_template_and_cannot_be_printed():
    rows = [{"word": "a", "hint": "b"}, {"word": "c"}]
    made = build_prompts(rows, TOKENIZER, prompt_template="{{ word }}{% if hint %} {{ hint }}{% endif %}")
    assert [prompt.prompt for prompt in made] == ["a b", "c"]
    with pytest.raises(DataError, match=r"row 1: .*'hint' is undefined"):
        build_prompts(rows, TOKENIZER, prompt_template="{{ word }} {{ hint }}")
    with pytest.raises(DataError, match=r"row 0: .*'hnit' is undefined"):  # no row has it
        build_prompts(rows, TOKENIZER, prompt_template="{{ word }}{% if hnit %}!{% endif %}")


def with_default(completion, level=10):
    return float(level)


def must_have(completion, level):
    return -1.0 if level is None else float(level)


def with_any(completion, **columns):
    return float(columns.get("level", 10))


def batch(completions, level, **columns):
    return [-1.0 if one is None else float(one) for one in level]


def verl(data_source, solution_str, ground_truth, extra_info=None, level=10):
    return float(level)


@pytest.mark.parametrize("reward", [with_default, must_have, with_any, batch, verl])
def test_a_reward_has_its_default_where_a_row_lacks_the_column(reward):
    rows = [
        {"prompt": p, "ground_truth": "x", "references": "x", **more} for p, more in (("a", {}), ("b", {"level": 3}))
    ]
    rows.append({**rows[0], "prompt": "c", "level": None if reward in (must_have, batch) else 0})  # null stands there
    prompts = build_prompts(rows, TOKENIZER)
    lacking = -1.0 if reward in (must_have, batch) else 10.0
    with load_rewards([reward]) as suite:
        smoke_test_rewards(suite, prompts)
        table = suite.score([make_rollout(prompt, "x") for prompt in prompts], columns_of(prompts))
    assert columns_of(prompts)["level"][0] is ABSENT
    assert list(table.totals) == [lacking, 3.0, -1.0 if reward in (must_have, batch) else 0.0]


def test_messages_keep_their_own_keys_on_the_way_to_the_trainers():
    prompts = build_prompts(UNEQUAL, word_tokenizer(CHAT_TEMPLATE))
    wanted = [row["prompt"] for row in UNEQUAL]
    rows = training_rows(prompts)
    assert [row["prompt"] for row in rows] == wanted == [row["prompt"] for row in rows.__getitems__([0, 1])]
    assert [row["index"] for row in rows] == [0, 1]
    assert [row["prompt"] for row in pickle.loads(pickle.dumps(rows))] == wanted  # as spawned workers read
    assert [row["prompt"] for row in examples([(messages, "x") for messages in wanted])] == wanted
