"""Settings and data that nobody would write: every one is refused by an error that rlseq raises, or is valid.

A case mutates a configuration of recipes/g2p/, or a small data file, and gives it to the recipe's own `main` with
--dry_run: it must end with exit code 0, or with 2 and one message, within seconds, and leave no file behind.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import traceback
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tiny_task import ROWS, write_task

from rlseq.config import training as settings
from rlseq.config.parsing.parser import RecipeParser
from rlseq.errors import ConfigError
from rlseq.training.run.launch import run_recipe

ROOT = Path(__file__).parent.parent
SECONDS = 10  # of computing; a case that takes longer hangs, most take a twentieth of one
RECIPES = {
    "grpo": ["grpo", "grpo-base", "expected-accuracy", "expected-accuracy-long"],
    "ppo": ["ppo"],
    "sft": ["sft", "sft-continued"],
}
FIELDS = {
    "grpo": ("TrainingDataArguments", "RewardArguments", "TrainingEvaluationArguments", "RunArguments", "GRPOConfig"),
    "ppo": ("TrainingDataArguments", "RewardArguments", "TrainingEvaluationArguments", "RunArguments", "PPOConfig"),
    "sft": ("DataArguments", "NewModelArguments", "RejectionArguments", "RunArguments", "SFTConfig"),
}
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(10**30), 0.0, 0.5, -0.5, 1e308, 1e-308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "nan", "inf", "none", "1e-4", "0x10", "yes", "latest", "auto", "no", "all", "steps", "{{", "{% for %}"),
    *(
        "ü\u2028\U0001f600",
        "a" * 50_000,
        "..",
        "/",
        "/dev/null",
        "~",
        "a/b",
        "a/b/c",
        "x.py:f",
        "\\0",
        "%s%n",
        "--seed",
    ),
    *([], [None], [[1]], [""], ["a", 1], [float("nan")], list(range(2000)), {}, {"a": None}, {"func": "x"}),
    *({"": {"a": [{}]}}, {"model_type": "llama"}, {"model_type": "llama", "hidden_size": -1}),
]
FRAGMENTS = [
    *("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}"),
    *("&a [*a]", "&a {b: *a}", "*nowhere", "<<: {seed: 1}", "!!float x", "!unknown 1", "2026-01-01", "!!omap [a: 1]"),
    *("[" * 2000, "{" * 500, "\t", ": ", "- ", "? a", "---\n", "...\n", "%YAML 9.9\n", "|\n", "'", '"', "#", "\x00"),
    *("\x85", "\ufeff", "\u2028", "\U0001f600", "1: 2\n", "null: 1\n", "env: {A: b}\n", "seed: 1\n", "!!timestamp x"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOUBLED = [f"&{b} [*{a}, *{a}]" for a, b in itertools.pairwise(LETTERS)]
LAUGHS = f"reward_funcs: [{', '.join(['&a [x, x]', *DOUBLED])}]\n"  # 2^26 elements in a line


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a tiny model, data and a reward; the cases write beside them."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_task(folder, initializer_range=0.4)
    (folder / "build.py").write_text("from tiny_task import tiny_tokenizer as build\n")
    (folder / "cwd").mkdir()
    return folder


def base_config(recipe: str, name: str, task: Path) -> dict:
    """A configuration of the demonstration, on the tiny model and data."""
    values = yaml.safe_load((ROOT / "recipes/g2p" / f"{name}.yaml").read_text())
    values |= {"dataset_name": str(task / "data"), "per_device_train_batch_size": 8, "primary": "exact_match:greedy"}
    if recipe == "sft":
        values.pop("primary")
    else:
        values |= {"reward_funcs": ["exact_match"]}
    if "new_model" in values:
        values["new_tokenizer"] = f"{task}/build.py:build"
    else:
        values["model_name_or_path"] = str(task / "model")
    if values.get("num_generations", 1) > 4:
        values["num_generations"] = 4
    return values


def dump(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def alike(rng: random.Random, hint):
    """A value of a field's type, as wrong as values of it come; of any type where it has none of YAML's."""
    hint = rng.choice(get_args(hint)) if get_origin(hint) in (Union, UnionType) else hint
    kind = get_origin(hint) or hint
    if kind is Literal:
        return rng.choice(get_args(hint))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return rng.choice(list(kind)).value
    if kind is list:
        return [alike(rng, (get_args(hint) or (str,))[0]) for _ in range(rng.randrange(4))]
    fitting = [value for value in VALUES if type(value) is kind]
    return rng.choice(fitting or VALUES)


def fuzzed_config(rng: random.Random, recipe: str, values: dict) -> bytes:
    """The YAML of a configuration with one to three things wrong, or changed."""
    classes = [getattr(settings, name) for name in (*FIELDS[recipe], "ModelArguments")]
    types = {f.name: get_type_hints(cls)[f.name] for cls in classes for f in fields(cls) if f.init}
    names = list(types)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        kind = rng.randrange(6)
        key = rng.choice(list(values))
        if kind <= 2:
            name = rng.choice((key, *rng.sample(names, 3)))
            values[name] = rng.choice(VALUES) if rng.random() < 0.4 else alike(rng, types[name])
        elif kind == 3:
            del values[key]
        elif kind == 4:
            place = rng.randrange(len(key))
            values[key[:place] + rng.choice("aeiou_- ") + key[place + 1 :]] = values.pop(key)
        else:
            values[key] = rng.choice(([values[key]], {key: values[key]}, str(values[key]), [values[key], values[key]]))
    text = dump(values)
    for _ in range(rng.choice((0, 0, 1, 1))):
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines.insert(at, rng.choice(lines))
        elif kind == 1:
            lines[at] = re.sub(r":.*", lambda _: f": {rng.choice(FRAGMENTS)}", lines[at], count=1)
        elif kind == 2:
            lines.insert(at, rng.choice(FRAGMENTS))
        elif kind == 3:
            lines = [text[: rng.randrange(len(text))]]
        elif kind == 4:
            lines.append(LAUGHS)
        else:
            data = bytearray(text.encode())
            data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
        text = "".join(lines)
    return text.encode("utf-8", "surrogatepass")


CELLS = [
    *(None, True, 0, -1, 3.5, 10**30, float("nan"), float("inf"), "", " ", "a b", "\n", "ü\u2028", "a,b", '"', "\x00"),
    *("a" * 50_000, "\ud800", [], ["A"], ["A", 1], [None], {}, {"role": "user"}, [{"role": "user", "content": "a"}]),
    *([{"role": "user"}], [{"content": 1}], [["a"]], [1], {"a": {"b": [1, {"c": None}]}}),
]


def fuzzed_data(rng: random.Random, folder: Path) -> Path:
    """A small data file with a few cells, columns, rows or bytes changed."""
    rows: list = [dict(row, level=i) for i, row in enumerate(ROWS)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        row = rng.randrange(len(rows))
        kind = rng.randrange(6)
        column = rng.choice(("prompt", "references", "level"))
        if kind <= 2 and isinstance(rows[row], dict):
            rows[row][column] = rng.choice(CELLS)
        elif kind == 3:
            rows = [{k: v for k, v in r.items() if k != column} if isinstance(r, dict) else r for r in rows]
        elif kind == 4:
            rows[row] = rng.choice(CELLS)
        elif isinstance(rows[row], dict):
            rows[row].pop(column, None)
    path = folder / f"{rng.choice(('train', 'validation', 'rows'))}.{rng.choice(('json', 'jsonl', 'csv', 'parquet'))}"
    if path.suffix == ".json":
        data = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    elif path.suffix == ".jsonl":
        data = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows)
    elif path.suffix == ".csv":
        values = [[str(v) for v in r.values()] if isinstance(r, dict) else [str(r)] for r in rows]
        quoted = [",".join(f'"{v}"' if rng.random() < 0.5 else v for v in row) for row in values]
        data = "\n".join(["prompt,references,level", *quoted]) + "\n"
    else:
        try:
            table = pyarrow.Table.from_pylist([r if isinstance(r, dict) else {"prompt": r} for r in rows])
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
            table = pyarrow.Table.from_pylist(ROWS)  # of cells that no table holds
        pyarrow.parquet.write_table(table, path)
        data = path.read_bytes()
    data = bytearray(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    kind = rng.randrange(8)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        at = rng.randrange(len(data))
        data[at:at] = rng.choice((b"\xff\xfe", b"\x00", b"\n\n", b"{}\n", b"[]", b",,,", b'"', b"NaN", b"\xef\xbb\xbf"))
    elif kind == 3 and rng.random() < 0.3:
        data = bytearray()
    path.write_bytes(bytes(data))
    return path


def load_recipe(name):
    return importlib.import_module(f"rlseq.recipes.{name}")


class TooLong(BaseException):
    """A case that hangs."""


def ring(*_):
    raise TooLong


def outcome(main, argv: list[str]) -> tuple[int | None, str]:
    """Run a recipe's main as its process does: its exit code and stderr, or None and the traceback."""
    err = io.StringIO()
    environment, old = dict(os.environ), sys.argv
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(20 * SECONDS)  # of waiting, on a busy machine
    sys.argv = argv
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            run_recipe(main)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    except BaseException:
        return None, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        sys.argv = old
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def offline(monkeypatch, task, tmp_path):
    """No hub, a cache of data that is not the user's, and an empty working directory."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")
    monkeypatch.chdir(task / "cwd")
    datasets.disable_progress_bars()


def run_case(seed: int, task: Path, folder: Path, mains: dict) -> str | None:
    """What is wrong with how a case ended, or None."""
    rng = random.Random(seed)
    recipe = rng.choice(("grpo", "ppo", "sft"))
    values = base_config(recipe, rng.choice(RECIPES[recipe]), task)
    if rng.random() < 0.35:
        values |= {"dataset_name": str(fuzzed_data(rng, folder)), "eval_split": rng.choice(("train", "validation"))}
        text = dump(values).encode()
    else:
        text = fuzzed_config(rng, recipe, values)
    path = folder / "case.yaml"
    path.write_bytes(text)
    run = folder / "run"
    argv = [f"recipes/{recipe}.py", "--config", str(path), "--dry_run", "true", "--output_dir", str(run)]
    code, err = outcome(mains[recipe], argv)
    left = [str(p) for p in (run, *(task / "cwd").iterdir()) if p.exists()]
    messages = err.count("\nerror:") + err.startswith("error:")
    if code not in (0, 2) or "Traceback" in err or (code == 2 and messages != 1) or left or len(err) > 20_000:
        return f"seed {seed}, {recipe}: exit {code}, left {left}, {len(err)} characters\n{err[-3000:]}"
    return None


def fuzz(seeds, task, tmp_path):
    """What went wrong in the cases of these seeds, a text a case."""
    mains = {name: load_recipe(name).main for name in RECIPES}
    wrong = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        wrong += [found for found in [run_case(seed, task, folder, mains)] if found]
    return "\n\n".join(wrong)


def test_no_setting_and_no_data_file_ends_in_a_traceback(task, tmp_path, offline):
    assert not fuzz(range(150), task, tmp_path)


@pytest.mark.soak
def test_a_thousand_more(task, tmp_path, offline):
    assert not fuzz(range(150, 1000), task, tmp_path)


# What the cases found, each by itself


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: !!float x", "a value is not of the type that its tag names"),
        ("seed: !!timestamp x", "a value is not of the type that its tag names"),
        ("new_model: " + "{a: " * 3000, "nested too deeply"),
        ("reward_funcs: &a [*a]", "or for themselves"),
        (LAUGHS, "aliases stand for more than 100,000 values"),
        ("learning_rate: .nan", "learning_rate is nan; expected a number"),
        ("dtype: float33", "dtype is 'float33'; expected one of 'auto', 'bfloat16', 'float16', 'float32'"),
        ("seed: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor for the tag"),
    ],
)
def test_a_setting_that_was_read_or_ended_in_a_traceback_is_refused(text, message, tmp_path):
    (tmp_path / "case.yaml").write_text(text + "\n")
    types = [settings.DataArguments, settings.RewardArguments, settings.NewModelArguments, settings.ModelArguments]
    with pytest.raises(ConfigError, match=re.escape(message)):
        RecipeParser([*types[:1], *types[2:], settings.GRPOConfig]).parse(["--config", str(tmp_path / "case.yaml")])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "case.yaml"]


def test_anchors_of_plain_use_are_read(tmp_path):
    (tmp_path / "case.yaml").write_text("seed: &s 3\nmax_steps: *s\n")
    (config,) = RecipeParser([settings.GRPOConfig]).parse(["--config", str(tmp_path / "case.yaml")])
    assert config.seed == config.max_steps == 3


def test_the_message_of_a_long_value_is_cut_in_the_middle():
    text = str(ConfigError("a" * 50_000 + "; expected b"))
    assert len(text) < 4100 and text.startswith("aaa") and text.endswith("; expected b")


def test_a_name_too_long_for_a_file_is_a_bad_setting():
    code, err = outcome(lambda: Path("a" * 5000).is_dir(), ["recipe"])
    assert code == 2 and err.startswith("error: the name of a file or folder is too long: 'aaa")


def test_one_name_of_a_module_is_what_an_adapter_goes_on():
    # TRL makes a list of one a text, which peft reads as a pattern of whole paths and finds nowhere.
    assert settings.ModelArguments(lora_target_modules=["q_proj"]).lora_target_modules == ["q_proj"]
    assert settings.ModelArguments(lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"


PROCESSES = {
    "a tag that would run code": ("grpo", "seed: !!python/object/apply:os.system ['touch pwned']\n", "constructor"),
    "data that is cut short": ("sft", 'dataset_name: "{folder}/cut.jsonl"\n', "cut.jsonl, line 2"),
    "bytes that are no text": ("ppo", "seed: \x00\n", "line"),
}


@pytest.mark.soak
@pytest.mark.parametrize("case", PROCESSES)
def test_a_real_process_under_the_launcher_ends_with_2_and_one_message(case, task, tmp_path):
    recipe, text, named = PROCESSES[case]
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a"}\n{"prom')
    (tmp_path / "case.yaml").write_text(f"model_name_or_path: {task}/model\n" + text.replace("{folder}", str(tmp_path)))
    flags = ["--config", tmp_path / "case.yaml", "--output_dir", tmp_path / "run", "--dry_run", "true"]
    for launcher in ([], ["-m", "accelerate.commands.launch", "-q"]):
        ended = subprocess.run(
            [sys.executable, *launcher, ROOT / "recipes" / f"{recipe}.py", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == (1 if launcher else 2), ended.stderr  # accelerate makes every failure a 1
        (message,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
        assert named in message and "Traceback" not in ended.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.yaml", "cut.jsonl"]
