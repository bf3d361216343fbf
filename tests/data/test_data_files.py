"""Data files that are cut short, wrong or empty: an error with the file, its line or row, and what was expected."""

import pyarrow
import pyarrow.parquet
import pytest
from test_data import TOKENIZER
from tiny_task import ROWS

from rlseq.data.files import place_of
from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_rows
from rlseq.errors import DataError

JSON_LINES = {
    "cut short": (b'{"prompt": "a"}\n{"prompt": "b"}\n{"prom', "train.jsonl, line 3: not valid JSON"),
    "a list": (b'{"prompt": "a"}\n[1, 2]\n', r"train.jsonl, line 2: \[1, 2\] is not a row; expected a mapping"),
    "a number": (b'{"prompt": "a"}\n3\n', "train.jsonl, line 2: 3 is not a row; expected a mapping"),
    "not UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n', "train.jsonl, line 2: byte 0xff is not UTF-8"),
    "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), "line 1: byte 0xff is not UTF-8; expected text in UTF-8"),
    "a key twice": (b'{"prompt": "a"}\n{"x": 1, "x": 2}\n', r"line 2: not valid JSON \('x' is given twice\)"),
    "half a pair": (b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "line 2: not valid JSON .half of a surrogate pair"),
    "nested": (b'{"prompt": "a"}\n' + b"[" * 200_000 + b"\n", "line 2: not valid JSON .nested too deeply"),
    "no columns": (b"{}\n{}\n", "line 1: the row has no columns"),
    "blank": (b"\n\n \n", "is empty; expected rows"),
    "empty": (b"", "is empty; expected rows"),
}


@pytest.mark.parametrize("case", JSON_LINES)
def test_json_lines(tmp_path, case):
    data, message = JSON_LINES[case]
    (tmp_path / "train.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path), "train")


JSON = {
    "cut short": (b'[{"prompt": "a"},\n {"prom', "train.json, line 2: not valid JSON .* expected a list of mappings"),
    "a number": (b"3", "row 1: 3 is not a row"),
    "a number among rows": (b'[{"prompt": "a"}, 3]', "row 2: 3 is not a row; expected a mapping"),
    "an empty list": (b"[]", "is an empty list; expected rows"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", JSON)
def test_json(tmp_path, case):
    data, message = JSON[case]
    (tmp_path / "train.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path), "train")


CSV = {
    "cut short": (b"prompt,references\na,b\nc", r"train.csv, line 3: 1 field; expected 2 \(prompt, references\)"),
    "a comma too many": (b"prompt,references\na,b\nc,d,e\n", "train.csv, line 3: 3 fields; expected 2"),
    # Without this check pandas would take the first column for the rows' names.
    "a column more in every row": (b"prompt,references\na,b,c\nd,e,f\n", "train.csv, line 2: 3 fields; expected 2"),
    "after a field of two lines": (b'prompt,references\n"a\nb",c\nd\n', "train.csv, line 4: 1 field"),
    "an open quote": (b'prompt,references\na,b\nc,"d\n', "after line [23]: not valid csv .unexpected end of data"),
    "not UTF-8": (b"prompt,references\na,b\n\xff\xfe,c\n", "train.csv, line 3: byte 0xff is not UTF-8"),
    "a name twice": (
        b"prompt,answer,answer\na,b,c\n",
        "train.csv, line 1: 'answer' names two columns; expected a name for each, once",
    ),
    "no rows": (b"prompt,references\n", "has a line of column names and no rows"),
    "empty": (b"", "is empty; expected a line of column names"),
    "semicolons": (
        b"prompt;references\na;b\n",
        "line 1: the one column 'prompt;references'; expected commas",
    ),
}


@pytest.mark.parametrize("case", CSV)
def test_csv(tmp_path, case):
    data, message = CSV[case]
    (tmp_path / "train.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path), "train")


def test_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 10), path)
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train.parquet' is (empty|not a complete parquet file)"):
            load_rows(str(tmp_path), "train")
    path.write_bytes(whole[:40] + bytes(60) + whole[100:])
    with pytest.raises(DataError, match=r"train.parquet, rows 1 to 80: the column 'prompt' cannot be read"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": '{"prompt": "a"}\n\n{"prompt": null}\n'}, "train.jsonl, line 3: the prompt is None"),
        ({"train.jsonl": '{"prompt": "a"}\n{"references": "b"}\n'}, "train.jsonl, line 2: the prompt is None"),
        ({"train.json": '[{"prompt": "a"}, {"prompt": ""}]'}, "train.json, row 2: the prompt is ''"),
        ({"train.csv": 'prompt,x\n"a\nb",1\n,2\n'}, "train.csv, line 4: the prompt is None"),
        (
            {"train-0.csv": "prompt,x\na,1\nb,2\n", "train-1.csv": "prompt,x\na,1\n,2\n"},
            "train-1.csv, line 3: the prompt",
        ),
        ({"train.jsonl": '{"prompt": [{"role": "user"}]}\n'}, "train.jsonl, line 1: the prompt has the message"),
    ],
)
def test_a_row_that_makes_no_prompt_is_named_by_its_file_and_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build_prompts(load_rows(str(tmp_path), "train"), TOKENIZER)


def test_rows_of_a_divided_file_keep_their_lines(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(100)))
    rows = load_rows(str(path), "test")
    assert 0 < len(rows) < 20
    for row in rows:
        assert place_of(row, 0) == f"{path}, line {int(row['prompt'][1:]) + 1}"


def test_rows_without_a_file_are_named_by_their_number():
    with pytest.raises(DataError, match=r"^row 1: the prompt is None"):
        build_prompts([{"prompt": "a"}, {"promt": "b"}], TOKENIZER)  # a task module may leave a column out
    with pytest.raises(DataError, match="row 0: the reference is nan; expected a text"):  # not the text "nan"
        build_prompts([{"prompt": "a", "references": float("nan")}], TOKENIZER)
    with pytest.raises(DataError, match=r"row 0: the prompt is .* half of a surrogate pair"):
        build_prompts([{"prompt": "\ud800"}], TOKENIZER)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def load(split):\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def load(split):\n    return 3\n", "TypeError: 'int' object is not iterable"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError"),
        ("def load(split:\n", "SyntaxError"),
    ],
)
def test_a_task_module_that_fails_is_named_with_its_line(tmp_path, source, message):
    (tmp_path / "task.py").write_text(source)
    with pytest.raises(DataError, match=f"task.py'.*{message}"):
        load_rows(str(tmp_path / "task.py"), "train")


def test_a_template_that_fails_on_a_row_names_it():
    with pytest.raises(DataError, match=r"row 1: --prompt_template .* the columns are word"):
        build_prompts([{"word": "a"}, {"word": 3}], TOKENIZER, prompt_template="{{ word + 'b' }}")
