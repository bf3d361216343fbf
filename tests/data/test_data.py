"""From files, folders and task modules to prompts: splits, keys, templates, references, and what is refused."""

import hashlib
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlseq.data.prompts import describe_shared
from rlseq.data.rows import load_prompts, load_rows
from rlseq.errors import DataError

VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", "=", "<user>", "<answer>", *"abcdefgh", *"ABCDEFGH"]  # 23 ids
EOS = 2
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<answer> ' }}{{ m.content }}"
    "{{ ' <eos> ' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<answer> {% endif %}{% if shout is defined %}= {% endif %}"
)


def word_tokenizer(chat_template=None):
    """One token a word; ids are places in VOCABULARY."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def ids(text):
    return tuple(VOCABULARY.index(word) for word in text.split())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


ROWS = [{"prompt": f"question {i}", "references": f"answer {i}"} for i in range(4)]


def write(path, rows):
    """Write rows in the format that the name asks for, by hand or with pyarrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("".join(",".join(map(str, x)) + "\n" for x in [rows[0], *(row.values() for row in rows)]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


FORMATS = ["json", "jsonl", "csv", "parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_folder_gives_the_files_named_after_a_split(tmp_path, suffix):
    write(tmp_path / f"train-0.{suffix}", ROWS[:1])
    write(tmp_path / f"train-1.{suffix}", ROWS[1:2])
    write(tmp_path / f"deeper/dev.{suffix}", ROWS[2:3])
    write(tmp_path / f"test.{suffix}", ROWS[3:])
    assert load_rows(str(tmp_path), "train") == ROWS[:2]
    assert load_rows(str(tmp_path), "validation") == ROWS[2:3]
    assert load_rows(str(tmp_path), "test") == ROWS[3:]


def test_files_joined_by_commas_are_one_data_set(tmp_path):
    one, two, three = (write(tmp_path / name, [row]) for name, row in zip(("train.csv", "more.csv", "val.csv"), ROWS))  # noqa: B905
    name = f"{one}, {two},{three}"
    assert load_rows(name, "train") == ROWS[:2]
    assert load_rows(name, "validation") == ROWS[2:3]


def test_a_name_that_only_begins_like_a_split_is_not_that_split(tmp_path):
    write(tmp_path / "testimony.jsonl", ROWS[:2])
    write(tmp_path / "validation_part.jsonl", ROWS[2:])
    assert load_rows(str(tmp_path), "train") == ROWS[:2]
    assert load_rows(str(tmp_path), "validation") == ROWS[2:]


def split_by_hand(question):
    digest = hashlib.blake2b(json.dumps(question).encode(), digest_size=8).digest()
    return {0: "test", 1: "validation"}.get(int.from_bytes(digest, "big") % 20, "train")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_single_file_is_divided_with_no_question_on_both_sides(tmp_path, suffix):
    rows = [{"word": f"w{i % 500}", "sound": f"s{i}"} for i in range(1000)]  # every word twice
    path = write(tmp_path / f"words.{suffix}", rows)
    found = {split: load_rows(str(path), split, prompt_column="word") for split in ("train", "validation", "test")}
    for split, part in found.items():
        assert part == [row for row in rows if split_by_hand(row["word"]) == split]
    words = [{row["word"] for row in part} for part in found.values()]
    assert sum(map(len, words)) == 500 == len(set.union(*words))
    assert 400 < len(words[0]) < 480 and min(len(words[1]), len(words[2])) > 10  # 90%, 5%, 5%


def test_the_column_prompt_decides_the_side_wherever_it_stands(tmp_path):
    rows = [{"id": i, "prompt": f"w{i % 100}"} for i in range(400)]
    path = write(tmp_path / "rows.jsonl", rows)
    sides = [{row["prompt"] for row in load_rows(str(path), split)} for split in ("train", "validation", "test")]
    assert sum(map(len, sides)) == 100


SPLITS = ("train", "validation", "test")
MADE = [{"id": i, "question": f"{i % 100} + 2", "unit": "cm" if i % 3 else "m"} for i in range(600)]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("options", "made", "distinct"),
    [
        ({"prompt_column": "question"}, lambda row: row["question"], 100),
        ({"prompt_template": "{{ question }} in {{ unit }}?"}, lambda row: f"{row['question']} in {row['unit']}?", 200),
        ({"prompt_column": "id", "prompt_template": "{{ question[0] }}"}, lambda row: row["question"][0], 10),
    ],
)
def test_what_becomes_the_prompt_decides_the_side_and_not_the_first_column(tmp_path, suffix, options, made, distinct):
    path = write(tmp_path / f"rows.{suffix}", MADE)
    sides = {}
    for split in SPLITS:
        try:
            sides[split] = {made(row) for row in load_rows(str(path), split, **options)}
        except DataError:  # ten prompts may all be on two sides
            sides[split] = set()
    assert sum(map(len, sides.values())) == distinct
    for split, prompts in sides.items():
        assert all(split_by_hand(prompt) == split for prompt in prompts)
    for prompt in load_prompts(str(path), TOKENIZER, split="train", **options):  # the same side by this way in
        assert split_by_hand(prompt.prompt) == "train"


def test_a_hub_set_with_train_alone_is_divided_by_what_becomes_the_prompt(monkeypatch):
    hub = {"train": datasets.Dataset.from_list(MADE)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub)
    sides = [{row["question"] for row in load_rows("some/set", s, prompt_column="question")} for s in SPLITS]
    assert sum(map(len, sides)) == 100 == len(set.union(*sides))


def test_chat_messages_decide_the_side_whatever_the_order_of_their_keys(tmp_path):
    one = [{"role": "user", "content": f"w{i % 50}"} for i in range(300)]
    other = [dict(reversed(message.items())) for message in one]
    rows = [{"id": i, "prompt": [(one, other)[i % 2][i]]} for i in range(300)] + [
        {"id": 0, "prompt": [m]} for m in other
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    sides = [{row["prompt"][0]["content"] for row in load_rows(str(path), split)} for split in SPLITS]
    assert sum(map(len, sides)) == 50


SPACINGS = ("{} + 2", " {} + 2", "{} + 2\n", "{} +  2", "{}\n+\t2 \n", "{}\u00a0+ 2")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_prompts_that_differ_only_in_whitespace_are_on_one_side(tmp_path, suffix):
    rows = [{"prompt": form.format(i)} for form in SPACINGS for i in range(100)]
    path = write(tmp_path / f"rows.{suffix}", rows)
    parts = {split: load_rows(str(path), split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 600  # each row stays, with its own spacing
    assert sorted(row["prompt"] for part in parts.values() for row in part) == sorted(row["prompt"] for row in rows)
    numbers = [{re.match(r"\s*(\d+)", row["prompt"])[1] for row in part} for part in parts.values()]
    assert sum(map(len, numbers)) == 100 and min(map(len, numbers)) > 0
    for split, part in parts.items():
        assert all(split_by_hand(row["prompt"]) == split for row in part if re.fullmatch(r"\d+ \+ 2", row["prompt"]))


def test_chat_messages_that_differ_only_in_whitespace_are_on_one_side(tmp_path):
    chats = [[{"role": "user", "content": form.format(i)}] for form in SPACINGS for i in range(50)]
    parts = [{"role": "user", "content": [{"type": "text", "text": " 1 + 2"}]}]
    assert describe_shared(chats[:50], "validation", chats[50:100], "train") == (
        "50 of 50 validation prompts also in train"
    )
    assert describe_shared(
        [parts], "test", [[{**parts[0], "content": [{"type": "text", "text": "1 + 2\n"}]}]], "train"
    ) == ("1 of 1 test prompts also in train")
    path = write(tmp_path / "rows.jsonl", [{"prompt": chat} for chat in chats])
    sides = [{" ".join(row["prompt"][0]["content"].split()) for row in load_rows(str(path), split)} for split in SPLITS]
    assert sum(map(len, sides)) == 50


def test_what_is_to_be_divided_by_a_column_that_it_lacks_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", MADE)
    with pytest.raises(DataError, match=r"no column 'prompt' .--prompt_column.; its columns are id, question, unit"):
        load_rows(str(path), "train")
    with pytest.raises(DataError, match="Did you mean 'question'"):
        load_rows(str(path), "train", prompt_column="qestion")
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: --prompt_template .*'nothing' is undefined"):
        load_rows(str(path), "train", prompt_template="{{ nothing }}")
    assert len(load_rows(str(path), None)) == 600  # undivided, nothing is asked


def test_prompts_in_two_splits_are_counted_once_each():
    chat = [{"role": "user", "content": "a"}]
    same = [{"content": "a", "role": "user"}]
    assert describe_shared(["a", "b", "b", chat], "validation", ["b", same, "c"], "train") == (
        "2 of 3 validation prompts also in train"
    )
    assert describe_shared(["a"], "test", ["b"], "train") == "0 of 1 test prompts also in train"
    spaced = ["a b", " a b", "a  b\n", "ab"]  # two prompts
    assert describe_shared(spaced, "validation", ["a\tb"], "train") == "1 of 2 validation prompts also in train"


def test_a_file_named_test_is_never_training_data(tmp_path):
    path = write(tmp_path / "test.jsonl", ROWS)
    assert load_rows(str(path), "test") == ROWS
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        load_rows(str(path), "train")


def test_words_that_pandas_takes_for_missing_values_stay_words(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("word,sound\nnull,N AH L\nnan,N AE N\nNA,\n")
    assert load_rows(str(path), "test") == [
        {"word": "null", "sound": "N AH L"},
        {"word": "nan", "sound": "N AE N"},
        {"word": "NA", "sound": None},
    ]


def test_a_number_in_a_csv_is_the_text_that_stands_there(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("zip,price,sum,share,on,off\n00501,1.50,5,1,True,true\n90210,2.25,,0.5,False,false\n")
    assert load_rows(str(path), "test") == [
        {"zip": "00501", "price": "1.50", "sum": 5, "share": 1, "on": True, "off": "true"},
        {"zip": "90210", "price": "2.25", "sum": None, "share": 0.5, "on": False, "off": "false"},
    ]


def test_a_csv_column_of_numbers_may_end_in_a_word(tmp_path):
    rows = 20_000  # pandas settles a column's type on the first of several blocks
    path = tmp_path / "test.csv"
    path.write_text("n\n" + "".join(f"{i}\n" for i in range(rows)) + "many\n")
    assert [row["n"] for row in load_rows(str(path), "test")] == [*map(str, range(rows)), "many"]


def test_a_task_module_is_asked_for_its_split_and_may_hold_dataclasses(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Item:\n    n: int\n"
        "def load(split):\n    return [{'prompt': split, 'n': Item(3).n}]\n"
    )
    assert load_rows(str(path), "anything") == [{"prompt": "anything", "n": 3}]


def bad(tmp_path, case):
    folder = tmp_path / "data"
    write(folder / "train.jsonl", ROWS)
    (folder / "task.py").write_text("rows = []\n")
    (folder / "none.py").write_text("def load(split): return []\n")
    (folder / "texts.py").write_text("def load(split): return ['a b']\n")
    write(folder / "named/val.csv", ROWS)
    write(folder / "mixed/train.csv", ROWS)
    write(folder / "mixed/test.parquet", ROWS)
    write(folder / "few.jsonl", ROWS[:1])
    (folder / "notes.txt").write_text("a\n")
    (folder / "nothing").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.json").write_text('[{"prompt": "a"}, {"prompt": ')
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "broken.parquet").write_text("not parquet")
    return case.replace("DATA", str(folder))


@pytest.mark.parametrize(
    ("name", "split", "messages"),
    [
        ("DATA/trian.jsonl", "train", ["there is no data file or folder", "Did you mean 'train.jsonl'?"]),
        ("DATA/trainjsonl", "train", ["there is no data file or folder", "Did you mean 'train.jsonl'?"]),
        ("DATA/train.jsonl,DATA/fwe.jsonl", "train", ["fwe.jsonl', named in", "Did you mean 'few.jsonl'?"]),
        ("DATA/tsak.py", "train", ["there is no task module", "Did you mean 'task.py'?"]),
        ("DATA/task.py", "train", ["defines no function `load(split) -> list of rows`"]),
        ("DATA/none.py", "train", ["has no rows in split 'train'"]),
        ("DATA/texts.py", "train", ["a row of", "is 'a b'; expected a dict of columns"]),
        ("DATA/notes.txt", "train", ["notes.txt' is of an unknown format; known are .json, .jsonl, .csv, .parquet"]),
        ("DATA/nothing", "train", ["holds no file ending in .json, .jsonl, .csv, .parquet"]),
        ("DATA/mixed", "train", ["mixes formats (.csv, .parquet); name one"]),
        ("DATA/named", "tset", ["has no split 'tset'; it has validation."]),
        ("DATA/named", "validaton", ["has no split 'validaton'", "Did you mean 'validation'?"]),
        ("DATA/few.jsonl", "validation", ["of 1 rows", "none of them falls to 'validation'", "train.csv"]),
        ("DATA/empty.jsonl", "train", ["empty.jsonl'"]),
        ("DATA/broken.json", "train", ["cannot load the data set", "broken.json'"]),
        ("DATA/broken.jsonl", "train", ["cannot load the data set", "broken.jsonl'"]),
        ("DATA/broken.parquet", "train", ["cannot load the data set", "broken.parquet'"]),
    ],
)
def test_data_that_cannot_be_read_is_named_in_one_line(tmp_path, capfd, name, split, messages):
    with pytest.raises(DataError) as error:
        load_rows(bad(tmp_path, name), split)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert "Traceback" not in capfd.readouterr().err


TOKENIZER = word_tokenizer()
