"""From a data set's name to rows and prompts: a hub id, local files or a task module in, `Prompt`s out.

A data set is named in one of three ways:

* a task module, `path/to/task.py`, that defines `load(split) -> list of rows` (a row is a dict);
* local files: a json, jsonl, csv or parquet file, a folder of such files, or several files joined by commas;
  json, jsonl and csv may be compressed by gzip (`.jsonl.gz`).
  In a folder, files named after a split (`train.csv`, `validation-00.jsonl`) are that split;
* anything else is taken for a Hugging Face hub id and loaded by `datasets.load_dataset`.

A data set with only the split `train` (a single file, for example) is divided by the hash of each row's prompt, as
`--prompt_column` or `--prompt_template` makes it: 90% train, 5% validation, 5% test, so that equal prompts, and those
that differ only in whitespace, are never on both sides.
`rlseq.data.prompts` makes prompts of the rows.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.common.mixture import parse_mixture
from rlseq.data.files import read_rows, rows_of, rows_of_dataset, seems_data
from rlseq.data.mixture import joined, mixed
from rlseq.data.parse import FORMATS, format_of, parquet_fault
from rlseq.data.prompts import build_prompts, keeping_all, made_prompts, prompt_digest
from rlseq.errors import DataError, RlseqError, did_you_mean
from rlseq.types import Prompt

SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev", "eval"), "train": ("train",), "test": ("test",)}


@keeping_all()
def load_rows(
    dataset_name: str,
    split: str | None,
    *,
    config_name: str | None = None,
    prompt_column: str = "prompt",
    prompt_template: str | None = None,
    weighted: bool = False,
) -> list[dict[str, Any]]:
    """Return the rows of one split as dicts; None: validation, but all rows where there is the split train alone.

    `prompt_column` and `prompt_template` are those of `build_prompts`: where there is the split train alone, it is
    divided by the prompts that they make.

    Of several data sets, `math.jsonl:0.7 code.jsonl:0.3`, all rows are returned, or `weighted` a mixture by the weights
    (`rlseq.data.mixture`); the column `dataset` then says which one a row is of.

    Rows of local files know their file and line, which errors then name (`rlseq.data.files.Row`).

    Raises:
        DataError: the file, split or data set is missing, of an unknown format, malformed or empty.
    """
    weights = parse_mixture(dataset_name)
    if weights is not None:
        options: dict[str, Any] = {
            "config_name": config_name,
            "prompt_column": prompt_column,
            "prompt_template": prompt_template,
        }
        parts = {name: load_rows(name, split, **options) for name in weights}
        return mixed(parts, weights) if weighted else joined(parts)
    if dataset_name.endswith(".py"):
        rows = _ask_task_module(Path(dataset_name), split or "validation")
    else:
        split_of = functools.partial(_hash_split, prompt_column, prompt_template)
        rows = _load_with_datasets(dataset_name, split, config_name, split_of)
    if not rows:
        raise DataError(f"the data set {dataset_name!r} has no rows in split {split or 'validation'!r}")
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(f"a row of {dataset_name!r} is {wrong!r}; expected a dict of columns")
    return rows


def load_prompts(
    dataset_name: str, tokenizer: Any, *, split: str, limit: int | None = None, **options: Any
) -> list[Prompt]:
    """Load one split of a data set as prompts: `load_rows` then `build_prompts` (which takes `options`).

    `limit` keeps the first rows only.
    """
    made_by: dict[str, Any] = {name: options[name] for name in ("prompt_column", "prompt_template") if name in options}
    for name in ("config_name", "weighted"):
        if name in options:
            made_by[name] = options.pop(name)
    rows = load_rows(dataset_name, split, **made_by)
    return build_prompts(rows[:limit], tokenizer, **options)


def _ask_task_module(path: Path, split: str) -> list[Any]:
    try:
        return rows_of_dataset(_load_task_module(path)(split))
    except RlseqError:
        raise
    except Exception as error:  # whatever the module's own code raises
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise DataError(
            f"the task module {str(path)!r}{where}: {type(error).__name__}: {error}; "
            "expected `load(split) -> list of rows` to return"
        ) from error


def _load_task_module(path: Path) -> Callable[[str], Sequence[dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"there is no task module {str(path)!r}.{_nearest_file(path)}")
    state = path.stat()
    return _run_task_module(path, path.resolve(), state.st_mtime_ns, state.st_size)


@functools.cache  # a module may keep what it reads, for the next split
def _run_task_module(path: Path, *version: Any) -> Callable[[str], Sequence[dict[str, Any]]]:
    spec: Any = importlib.util.spec_from_file_location(f"rlseq_task_{path.stem}", path)  # it ends in .py: not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if not callable(getattr(module, "load", None)):
        raise DataError(f"the task module {str(path)!r} defines no function `load(split) -> list of rows`")
    return module.load


def _nearest_file(path: Path) -> str:
    return did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""


def _data_files(dataset_name: str) -> list[Path] | None:
    """Return the local files a name stands for, or None when it names nothing local."""
    names = [Path(part.strip()) for part in dataset_name.split(",")]
    if not any(name.exists() for name in names):
        in_folder = any(n.parent != Path(".") and n.parent.is_dir() for n in names)
        looks_local = any(seems_data(n) or n.is_absolute() or str(n).startswith(".") for n in names)
        if looks_local or in_folder or dataset_name.count("/") > 1:
            raise DataError(f"there is no data file or folder {str(names[0])!r}.{_nearest_file(names[0])}")
        return None
    files = []
    for name in names:
        if not name.exists():
            raise DataError(f"there is no data file {str(name)!r}, named in {dataset_name!r}.{_nearest_file(name)}")
        files += sorted(p for p in name.rglob("*") if seems_data(p)) if name.is_dir() else [name]
    unknown = [f for f in files if format_of(f) is None]
    if unknown:
        raise DataError(
            f"{str(unknown[0])!r} is of an unknown format; known are {', '.join(FORMATS)}, and of the first three "
            "those that gzip compresses (.jsonl.gz)"
        )
    if not files:
        raise DataError(f"the folder {dataset_name!r} holds no file ending in {', '.join(FORMATS)}")
    formats = sorted({str(format_of(f)) for f in files})
    if len({suffix.replace("jsonl", "json") for suffix in formats}) > 1:
        raise DataError(f"{dataset_name!r} mixes formats ({', '.join(formats)}); name one")
    found = set(files)
    if twice := next((f for f in files if f.suffix == ".gz" and f.with_suffix("") in found), None):
        raise DataError(f"{str(twice)!r} stands beside {twice.stem!r}, and both would be read; leave one of them out")
    return files


def _load_with_datasets(
    dataset_name: str, split: str | None, config_name: str | None, split_of: Callable[[Sequence[Mapping]], list[str]]
) -> list[dict[str, Any]]:
    files = _data_files(dataset_name)
    by_split: dict[str, list[Path]] = {}
    for file in files or ():
        by_split.setdefault(_split_of_file(file), []).append(file)
    try:
        ours = files is not None and format_of(files[0]) != ".parquet"
        splits = {} if ours else _read(dataset_name, config_name, by_split)
        return _rows_of_split(dataset_name, splits, split, by_split, split_of)
    except RlseqError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, pandas' and the hub's errors
        cause = error.__cause__ or error
        fault = next(
            filter(None, map(parquet_fault, [f for f in files or () if format_of(f) == ".parquet"])), None
        )  # slow: it reads the files again
        reason = fault or (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"cannot load the data set {dataset_name!r}: {reason}") from error


def _read(dataset_name: str, config_name: str | None, by_split: Mapping[str, list[Path]]) -> dict[str, Any]:
    """Load a hub set, or where there are any, parquet files."""
    import datasets

    if not by_split:
        return dict(datasets.load_dataset(dataset_name, config_name))
    named = {split: [str(file) for file in of_split] for split, of_split in by_split.items()}
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs, too, what it raises
    try:
        return dict(datasets.load_dataset("parquet", data_files=named))
    finally:
        datasets.logging.set_verbosity(verbosity)


def _rows_of_split(
    dataset_name: str,
    splits: Mapping[str, Any],
    split: str | None,
    files: Mapping[str, list[Path]],
    split_of: Callable[[Sequence[Mapping]], list[str]],
) -> list[dict[str, Any]]:
    def rows_in(name: str) -> list[dict[str, Any]]:
        if name in splits:
            rows = rows_of_dataset(splits[name])
            return [*rows_of(rows, files[name])] if files else rows
        try:
            return [*read_rows(files[name])]
        except DataError as error:
            raise DataError(f"cannot load the data set {dataset_name!r}: {error}") from None

    names = [*(splits or files)]
    if split is None:
        if names == ["train"]:
            return rows_in("train")
        split = "validation"
    if names == ["train"] and split in SPLIT_ALIASES:
        whole = rows_in("train")
        rows = [row for row, own in zip(whole, split_of(whole), strict=True) if own == split]
        if not rows and whole:
            raise DataError(
                f"the data set {dataset_name!r} has the split train alone, of {len(whole)} rows; divided by "
                f"hash (90% train, 5% validation, 5% test) none of them falls to {split!r}. "
                f"Give more rows, or files named after their splits (train.csv, validation.csv)"
            )
        return rows
    if split in names:
        return rows_in(split)
    alias = next((name for name in names if name in SPLIT_ALIASES.get(split, ())), None)
    if alias:
        return rows_in(alias)
    raise DataError(
        f"the data set {dataset_name!r} has no split {split!r}; it has {', '.join(names)}." + did_you_mean(split, names)
    )


def _split_of_file(file: Path) -> str:
    for split, aliases in SPLIT_ALIASES.items():
        if any(file.stem == a or file.stem.startswith((f"{a}-", f"{a}_", f"{a}.")) for a in aliases):
            return split
    return "train"


def _hash_split(prompt_column: str, prompt_template: str | None, rows: Sequence[Mapping]) -> list[str]:
    """Name the split of each row by what becomes its prompt: prompts that differ only in whitespace stay together."""
    names = {0: "test", 1: "validation"}
    prompts = made_prompts(rows, prompt_column, prompt_template)
    return [names.get(int.from_bytes(prompt_digest(prompt), "big") % 20, "train") for prompt in prompts]
