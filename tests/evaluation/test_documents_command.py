"""`rlseq evaluate --likelihood_dataset`: what is measured and reported, what is refused, and two processes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from forks import run_ranks
from test_data import word_tokenizer
from test_documents import CODINGS, ROWS, TEXTS, by_hand, ids_of, settings
from tiny_bytes import CONTEXT, byte_model, byte_tokenizer
from tokenizers.processors import ByteLevel

import rlseq.evaluation.run as contrast_module
from rlseq.cli.main import main as command_line
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.measure.documents import (
    check_windows,
    load_documents,
    measure_documents,
)
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast
from rlseq.evaluation.statistics import rows_as_json, rows_from_json
from rlseq.evaluation.studies.compression import lzma_bits
from rlseq.scoring import load_rewards


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        byte_model(seed=seed, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer = byte_tokenizer(eos_token="<eos>")
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)  # a prompt may not end in <eos>
        tokenizer.save_pretrained(folder / name)
    byte_model(dtype=torch.float32).save_pretrained(folder / "lossy")
    word_tokenizer().save_pretrained(folder / "lossy")
    return {name: str(folder / name) for name in ("one", "two", "lossy")}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_the_command_measures_whole_documents_and_reports_them(checkpoints, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [TEXTS[0], TEXTS[3], "not read"])
    prompts = tmp_path / "task.py"
    prompts.write_text(f"def load(split):\n    return {ROWS!r}\n")
    arguments = ["evaluate", "--models", *(f"{name}={checkpoints[name]}" for name in ("one", "two"))]
    arguments += ["--dataset_name", str(prompts), "--reward_funcs", "constant", "--output_dir", str(tmp_path / "out")]
    arguments += ["--strategies", "greedy", "--max_new_tokens", "2", "--resamples", "400", "--studies", "none"]
    arguments += ["--likelihood_dataset", data, "--likelihood_rows", "2", "--likelihood_stride", "5"]
    assert command_line(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    block = results["documents"]
    sizes = [len(text.encode()) for text in (TEXTS[0], TEXTS[3])]
    assert (block["documents"], block["bytes"]) == (2, sum(sizes))
    assert results["spec"]["settings"]["likelihood_stride"] == 5
    bits = {}
    for seed, name in enumerate(("one", "two")):
        model = byte_model(seed=seed)
        bits[name] = [-sum(by_hand(model, ids_of(t), CODINGS[0])) / math.log(2) for t in (TEXTS[0], TEXTS[3])]
        each = [b / size for b, size in zip(bits[name], sizes, strict=True)]
        entry = block["models"][name]
        assert entry["bits_per_byte"]["value"] == pytest.approx(sum(bits[name]) / sum(sizes), rel=1e-5)
        # of two documents half the resamples hold one alone
        assert entry["bits_per_byte"]["ci95"] == pytest.approx(sorted(each), rel=1e-5)
        assert entry["perplexity"]["value"] == pytest.approx(2 ** (sum(bits[name]) / sum(sizes)), rel=1e-5)  # bytes
        assert entry["round_trips"]["value"] == 1
        assert [entry[k] for k in ("tokens", "context", "stride", "start")] == [sum(sizes), CONTEXT, 5, "<eos>"]
    (difference,) = block["comparisons"]
    gaps = [b - a for a, b in zip(bits["one"], bits["two"], strict=True)]
    possible = [sum(gaps) / sum(sizes), *(gap / size for gap, size in zip(gaps, sizes, strict=True))]
    assert (difference["a"], difference["b"], difference["metric"]) == ("one", "two", "bits_per_byte")
    assert difference["difference"] == pytest.approx(possible[0], rel=1e-4)
    assert difference["ci95"] == pytest.approx([min(possible), max(possible)], rel=1e-4)
    alone = [lzma_bits(text.encode()) for text in (TEXTS[0], TEXTS[3])]
    assert block["lzma"]["alone"]["value"] == pytest.approx(sum(alone) / sum(sizes))
    assert block["lzma"]["together"] == pytest.approx(lzma_bits((TEXTS[0] + TEXTS[3]).encode()) / sum(sizes))
    kept = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert [(row["model"], row["document"]) for row in kept] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert [row["bits"] for row in kept] == pytest.approx(bits["one"] + bits["two"], rel=1e-5)
    for page in ("report.html", "report.md"):
        text = (tmp_path / "out" / page).read_text()
        assert "Text without prompts" in text and f"{sum(bits['two']) / sum(sizes):.3f}" in text
        assert "does not give back" not in text


def test_neither_files_nor_terminal_show_raw_characters_that_hide_text(checkpoints, tmp_path, capsys):
    name, text = "o\u202ene", "a\x1b[31m \u2067b\rc"
    prompts = tmp_path / "task.py"
    prompts.write_text(f"def load(split):\n    return {[{'prompt': text, 'references': [text]}]!r}\n")
    arguments = ["evaluate", "--models", f"{name}={checkpoints['one']}", "--strategies", "greedy", "--studies", "none"]
    arguments += ["--dataset_name", str(prompts), "--reward_funcs", "constant", "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_new_tokens", "2", "--resamples", "100"]
    assert command_line([*arguments, "--likelihood_dataset", write_jsonl(tmp_path / "text.jsonl", [text])]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_bytes().splitlines())
    assert row["model"] == name
    files = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".jsonl", ".json", ".md", ".html", ".svg")]
    assert len(files) >= 5
    for path in files:
        raw = {c for c in path.read_bytes().decode() if c in "\x1b\r\u202e\u2067"}
        assert not raw, (path.name, raw)
    other = [
        argument.replace(f"{name}={checkpoints['one']}", f"{name}2={checkpoints['two']}") for argument in arguments
    ]
    other[other.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert command_line([*other, "--likelihood_dataset", str(tmp_path / "text.jsonl")]) == 0
    first = capsys.readouterr().out
    apart = [str(tmp_path / "out"), str(tmp_path / "other")]
    join = ["evaluate", "--compare", *apart, "--output_dir", str(tmp_path / "joined")]
    assert command_line(join) == 0 and command_line(join) == 0  # the second replaces the first, and says so by name
    joined = capsys.readouterr().out
    assert "holds an earlier evaluation" in joined
    for printed in (first, joined):
        assert "o\\u202ene" in printed and not set(printed) & set("\x1b\r\u202e\u2067")


def test_a_tokenizer_that_loses_text_is_said_to(checkpoints, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", ["a b", "a  b", "unheard of"])  # two spaces, then unknown words
    chosen = {name: checkpoints[name] for name in ("one", "lossy")}
    with load_rewards(["constant"]) as suite:
        results = contrast(chosen, ROWS, suite, settings=settings(likelihood_dataset=data), quiet=True)
    assert results["documents"]["models"]["one"]["round_trips"]["value"] == 1
    assert results["documents"]["models"]["lossy"]["round_trips"]["value"] == pytest.approx(1 / 3)
    (note,) = (note for note in results["notes"] if "does not give back" in note)
    assert "lossy does not give back 2 of the 3 documents" in note


def test_without_documents_nothing_is_added(checkpoints, tmp_path):
    with load_rewards(["constant"]) as suite:
        plain = settings(likelihood_dataset=None)
        results = contrast({"one": checkpoints["one"]}, ROWS, suite, settings=plain, output_dir=tmp_path, quiet=True)
    assert "documents" not in results and not (tmp_path / "documents.jsonl").exists()
    assert not any(name.startswith("likelihood_") for name in results["spec"]["settings"])


WRONG = [
    ({"likelihood_column": "body"}, "no column 'body'.*its columns are text"),
    ({"likelihood_dataset": "empty.jsonl"}, "row 1 of 'empty.jsonl': 'text' is ''"),
    ({"likelihood_dataset": "missing.jsonl"}, "row 1 of 'missing.jsonl': 'text' is None"),
    ({"likelihood_dataset": "half.py"}, "row 0 of 'half.py'.*UTF-8: surrogates"),
    ({"likelihood_dataset": "empty.txt"}, "row 0.*'empty.txt' is empty"),
    ({"likelihood_dataset": "latin.txt"}, "not UTF-8: .* at byte 1"),
    ({"likelihood_dataset": "emtpy.txt"}, r"no text file 'emtpy.txt'.*empty\.txt"),
    ({"likelihood_dataset": "good.txt", "likelihood_split": "test"}, "no split 'test'"),
    ({"likelihood_rows": 0}, "--likelihood_rows is 0"),
    ({"likelihood_stride": 0}, "--likelihood_stride is 0"),
    ({"likelihood_context": 1}, "--likelihood_context is 1"),
    ({"likelihood_stride": 8, "likelihood_context": 8}, "--likelihood_stride is 8, and --likelihood_context 8"),
    ({"likelihood_stride": CONTEXT}, "--likelihood_stride is 16, and the context of 'one' 16"),
    (
        {"likelihood_dataset": None, "likelihood_rows": 3},
        "--likelihood_rows is 3, which has no effect without",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_cannot_work_is_refused_before_a_model_loads(changes, message, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contrast_module, "measure_checkpoint", lambda *a, **k: pytest.fail("a model was loaded"))
    write_jsonl(Path("good.jsonl"), TEXTS)
    write_jsonl(Path("empty.jsonl"), ["a", ""])
    Path("missing.jsonl").write_text('{"text": "a"}\n{"other": "b"}\n')
    Path("half.py").write_text("def load(split):\n    return [{'text': chr(0xD800)}]\n")
    Path("empty.txt").touch()
    Path("good.txt").write_text("text")
    Path("latin.txt").write_bytes("né".encode("latin-1"))
    wrong = settings(**{"likelihood_dataset": "good.jsonl", **changes})
    with load_rewards(["constant"]) as suite, pytest.raises((ConfigError, DataError), match=message):
        contrast({"one": checkpoints["one"]}, ROWS, suite, settings=wrong)
    with load_rewards(["constant"]) as suite, pytest.raises((ConfigError, DataError), match=message):
        check_settings(wrong, suite)  # and before a run that ends with it
        check_windows(wrong, {"one": checkpoints["one"]})


def test_documents_come_from_files_of_every_kind_and_from_modules(tmp_path):
    import datasets

    def load(name, **changes):
        return load_documents(settings(likelihood_dataset=str(tmp_path / name), **changes))

    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = datasets.Dataset.from_dict({"text": TEXTS, "body": TEXTS[::-1]})
    data.to_parquet(tmp_path / "a.parquet")
    data.to_csv(tmp_path / "a.csv")
    data.to_json(tmp_path / "a.json")
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.json"):
        assert load(name) == TEXTS  # all of it, though there is no split but one
    assert load("a.parquet", likelihood_column="body", likelihood_rows=2) == TEXTS[:1:-1]
    (tmp_path / "module.py").write_text("def load(split):\n    return [{'text': split}]\n")
    assert load("module.py") == ["validation"] and load("module.py", likelihood_split="test") == ["test"]
    for number, text in enumerate(TEXTS):
        path = tmp_path / "folder" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    assert load("folder") == TEXTS and load("folder", likelihood_rows=1) == TEXTS[:1]
    assert load(f"folder/1.txt,{tmp_path}/folder/0.txt") == [TEXTS[1], TEXTS[0]]


def test_recipes_take_the_same_settings():
    from rlseq.config.training import EvaluationArguments  # TRL, which the two processes have no use for

    taken = {"dataset": "d", "config": "c", "split": "s", "column": "t", "rows": 1, "stride": 2, "context": 3}
    named = {f"likelihood_{name}": value for name, value in taken.items()}
    made = dataclasses.asdict(ContrastSettings.of(EvaluationArguments(**named)))
    assert {name: made[name] for name in named} == named


class Watched:
    """The byte tokenizer, keeping the texts it was given in a file."""

    def __init__(self, path):
        self.inner, self.path = byte_tokenizer(eos_token="<eos>"), path

    def __call__(self, text, **options):
        self.path.write_text(json.dumps(text))
        return self.inner(text=text, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_two_processes_code_each_document_once_and_have_the_same_numbers(tmp_path):
    run_ranks(2, lambda: measure_on_a_rank(tmp_path), tmp_path / "log")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    alone = measure_documents(byte_model(), byte_tokenizer(eos_token="<eos>"), TEXTS[:3], settings()).rows
    for row, expected in zip(rows_from_json(ranks[0], "document"), alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    texts = [json.loads((tmp_path / f"{rank}.texts").read_text()) for rank in (0, 1)]
    assert texts == [[TEXTS[0], TEXTS[2]], [TEXTS[1]]]


def measure_on_a_rank(folder: Path) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    found = measure_documents(byte_model(), Watched(folder / f"{rank}.texts"), TEXTS[:3], settings())
    (folder / f"{rank}.json").write_text(json.dumps(rows_as_json(found.rows, "document")))
