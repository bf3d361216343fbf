"""From rows to prompts: a hub id, local files or a task module in, `Prompt`s out.

A data set is named in one of three ways:

* a task module, `path/to/task.py`, that defines `load(split) -> list of rows` (a row is a dict);
* local files: a json, jsonl, csv or parquet file, a folder of such files, or several files joined by commas.
  In a folder, files named after a split (`train.csv`, `validation-00.jsonl`) are that split;
* anything else is taken for a Hugging Face hub id and loaded by `datasets.load_dataset`.

A data set with the split `train` alone (a single file, say) is divided by the hash of each row's question, its
column `prompt` or else its first: 90% train, 5% validation, 5% test, so that equal questions are never on both sides.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlseq.data_files import check_csv, find_fault, place_of, rows_of
from rlseq.errors import DataError, RlseqError, did_you_mean
from rlseq.types import Prompt

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# To pandas the words "null", "nan" and "NA" are missing values; here only an empty field is.
READ_OPTIONS = {"csv": {"keep_default_na": False, "na_values": [""]}}
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev", "eval"), "train": ("train",), "test": ("test",)}


@contextmanager
def keeping_all() -> Iterator[None]:
    """Without garbage collection: it would go through hundreds of thousands of new rows, again and again, for none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@keeping_all()
def load_rows(dataset_name: str, split: str | None, *, config_name: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of one split as dicts; None: validation, but all rows where there is the split train alone.

    Rows of local files know their file and line, which errors then name (`rlseq.data_files.Row`).

    Raises:
        DataError: the file, split or data set is missing, of an unknown format, malformed or empty.
    """
    if dataset_name.endswith(".py"):
        rows = _ask_task_module(Path(dataset_name), split or "validation")
    else:
        rows = _load_with_datasets(dataset_name, split, config_name)
    if not rows:
        raise DataError(f"the data set {dataset_name!r} has no rows in split {split or 'validation'!r}")
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(f"a row of {dataset_name!r} is {wrong!r}; expected a dict of columns")
    return rows


def _ask_task_module(path: Path, split: str) -> list[Any]:
    try:
        return list(_load_task_module(path)(split))
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
        looks_local = any(n.suffix in FILE_FORMATS or n.is_absolute() or str(n).startswith(".") for n in names)
        if looks_local or in_folder or dataset_name.count("/") > 1:
            raise DataError(f"there is no data file or folder {str(names[0])!r}.{_nearest_file(names[0])}")
        return None
    files = []
    for name in names:
        if not name.exists():
            raise DataError(f"there is no data file {str(name)!r}, named in {dataset_name!r}.{_nearest_file(name)}")
        files += sorted(p for p in name.rglob("*") if p.suffix in FILE_FORMATS) if name.is_dir() else [name]
    unknown = [f for f in files if f.suffix not in FILE_FORMATS]
    if unknown:
        raise DataError(f"{str(unknown[0])!r} is of an unknown format; known are {', '.join(FILE_FORMATS)}")
    if not files:
        raise DataError(f"the folder {dataset_name!r} holds no file ending in {', '.join(FILE_FORMATS)}")
    if len({FILE_FORMATS[f.suffix] for f in files}) > 1:
        raise DataError(f"{dataset_name!r} mixes formats ({', '.join(sorted({f.suffix for f in files}))}); name one")
    return files


def _load_with_datasets(dataset_name: str, split: str | None, config_name: str | None) -> list[dict[str, Any]]:
    files = _data_files(dataset_name)
    by_split: dict[str, list[Path]] = {}
    for file in files or ():
        by_split.setdefault(_split_of_file(file), []).append(file)
        if file.suffix == ".csv":
            check_csv(file)
    try:
        splits = _read(dataset_name, config_name, files, by_split)
        return _rows_of_split(dataset_name, splits, split, by_split)
    except RlseqError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, pandas' and the hub's errors
        cause = error.__cause__ or error
        fault = find_fault(files) if files else None
        reason = fault or (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"cannot load the data set {dataset_name!r}: {reason}") from error


def _read(
    dataset_name: str, config_name: str | None, files: list[Path] | None, by_split: Mapping[str, list[Path]]
) -> dict[str, Any]:
    import datasets

    if files is None:
        return dict(datasets.load_dataset(dataset_name, config_name))
    kind = FILE_FORMATS[files[0].suffix]
    named = {split: [str(file) for file in of_split] for split, of_split in by_split.items()}
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs, too, what it raises
    try:
        return dict(datasets.load_dataset(kind, data_files=named, **READ_OPTIONS.get(kind, {})))
    finally:
        datasets.logging.set_verbosity(verbosity)


def _rows_of_split(
    dataset_name: str, splits: Mapping[str, Any], split: str | None, files: Mapping[str, list[Path]]
) -> list[dict[str, Any]]:
    def rows_in(name: str) -> list[dict[str, Any]]:
        return [*rows_of(splits[name].to_list(), files[name])] if files else splits[name].to_list()

    if split is None:
        if list(splits) == ["train"]:
            return rows_in("train")
        split = "validation"
    if list(splits) == ["train"] and split in SPLIT_ALIASES:
        rows = [row for row in rows_in("train") if _hash_split(row) == split]
        if not rows and len(splits["train"]):
            raise DataError(
                f"the data set {dataset_name!r} has the split train alone, of {len(splits['train'])} rows; divided by "
                f"hash (90% train, 5% validation, 5% test) none of them falls to {split!r}. "
                f"Give more rows, or files named after their splits (train.csv, validation.csv)"
            )
        return rows
    if split in splits:
        return rows_in(split)
    alias = next((s for s in splits if s in SPLIT_ALIASES.get(split, ())), None)
    if alias:
        return rows_in(alias)
    raise DataError(
        f"the data set {dataset_name!r} has no split {split!r}; it has {', '.join(splits)}."
        + did_you_mean(split, splits)
    )


def _split_of_file(file: Path) -> str:
    for split, aliases in SPLIT_ALIASES.items():
        if any(file.stem == a or file.stem.startswith((f"{a}-", f"{a}_", f"{a}.")) for a in aliases):
            return split
    return "train"


def _hash_split(row: Mapping[str, Any]) -> str:
    """Split by the question, the column `prompt` or else the first: rows that share it stay together."""
    question = row["prompt"] if "prompt" in row else next(iter(row.values()))
    bucket = int.from_bytes(_digest(question), "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(_CANONICAL.encode(value).encode(), digest_size=8).digest()


@keeping_all()
def build_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt_column: str = "prompt",
    reference_column: str | None = "references",
    prompt_template: str | None = None,
    reference_template: str | None = None,
    merge_references: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Turn rows into prompts.

    Args:
        rows: dicts that share their columns.
        tokenizer: gives the prompt's ids; chat messages go through its chat template.
        prompt_column: column of the prompt, text or a list of chat messages.
        reference_column: column of the right answer, a text or a list of texts; the prompt's `references` column
            holds it as a list. None, or the default name where no such column exists: no references.
        prompt_template, reference_template: Jinja templates over the row's columns that replace the column's
            text, for example `"{{ word | list | join(' ') }} = "`.
        merge_references: rows with the same prompt become one, with all their references.

    Raises:
        DataError: a column is missing (the message names the nearest), a prompt is empty, without tokens or of a
            wrong type.
    """
    rows = list(rows)
    if not rows:
        raise DataError("the data set is empty")
    columns = list(rows[0])
    if prompt_template is None:
        _require_column(prompt_column, columns, "prompt_column")
    if reference_column is not None and reference_template is None and reference_column not in columns:
        if reference_column != "references":
            _require_column(reference_column, columns, "reference_column")
        reference_column = None
    render_prompt = _template(prompt_template, "prompt_template")
    render_reference = _template(reference_template, "reference_template")

    merged: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            prompt = _as_prompt(render_prompt(row) if render_prompt else row.get(prompt_column))
            if records and isinstance(prompt, str) != isinstance(records[0]["prompt"], str):
                raise DataError(f"the prompt is {_shown(prompt)}; text and chat messages cannot be mixed")
            references = row.get(reference_column) if reference_column else []
            references = _as_texts(render_reference(row) if render_reference else references)
        except DataError as error:
            raise DataError(f"{place_of(row, number)}: {error}") from error.__cause__
        record = {**row, "prompt": prompt, "references": references}
        if merge_references:
            same = merged.setdefault(_digest(prompt).hex(), record)
            if same is not record:
                same["references"] = list(dict.fromkeys(same["references"] + record["references"]))
                continue
        records.append(record)

    all_ids = _tokenize([record["prompt"] for record in records], tokenizer, dict(chat_template_kwargs or {}))
    seen: Counter[str] = Counter()
    prompts = []
    for record, ids in zip(records, all_ids, strict=True):
        if not ids:
            raise DataError(f"the prompt {_shown(record['prompt'])} has no tokens; a completion needs one to follow")
        key = _digest([record["prompt"], record["references"]]).hex()
        seen[key] += 1
        if seen[key] > 1:
            key = f"{key}-{seen[key]}"
        prompt = record.pop("prompt")
        prompts.append(Prompt(key=key, messages_or_text=prompt, prompt_ids=tuple(ids), columns=record))
    return prompts


def load_prompts(
    dataset_name: str, tokenizer: Any, *, split: str, limit: int | None = None, **options: Any
) -> list[Prompt]:
    """Load one split of a data set as prompts: `load_rows` then `build_prompts` (which takes `options`).

    `limit` keeps the first rows only.
    """
    rows = load_rows(dataset_name, split, config_name=options.pop("config_name", None))
    return build_prompts(rows[:limit], tokenizer, **options)


def reference_ids(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the token ids of a prompt's distinct references as completions, each ended by one stop id.

    Prompt and reference are tokenised as one string, as teacher forcing sees them; where that moves the boundary
    between the two, the reference is tokenised by itself. Of chat data, the answer is rendered by the chat template.
    """
    start = list(prompt.prompt_ids)
    found = []
    for reference in prompt.columns.get("references", ()):
        if isinstance(prompt.messages_or_text, str):
            whole = tokenizer(text=prompt.messages_or_text + reference)["input_ids"]
        else:
            answer = {"role": "assistant", "content": reference}
            whole = tokenizer.apply_chat_template([*prompt.messages_or_text, answer], tokenize=True, return_dict=True)
            whole = whole["input_ids"]
        if list(whole[: len(start)]) == start:
            ids = list(whole[len(start) :])
        else:
            ids = tokenizer(text=reference, add_special_tokens=False)["input_ids"]
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        found.append(tuple(ids[: end + 1]) if end is not None else (*ids, stop_ids[0]))
    return list(dict.fromkeys(found))


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return a hash of what is evaluated: the prompts' keys and token ids, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.key}:{','.join(map(str, prompt.prompt_ids))};".encode())
    return digest.hexdigest()


def _require_column(name: str, columns: Sequence[str], flag: str) -> None:
    if name not in columns:
        raise DataError(
            f"the data has no column {name!r} (--{flag}); its columns are {', '.join(columns)}."
            + did_you_mean(name, columns)
        )


def _as_prompt(prompt: Any) -> Any:
    if not prompt or not isinstance(prompt, (str, list)):
        raise DataError(f"the prompt is {_shown(prompt)}; expected text or a list of chat messages")
    for message in () if isinstance(prompt, str) else prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"the prompt has the message {_shown(message)}; expected a mapping of role and content")
    return _in_unicode(prompt, "prompt")


def _as_texts(references: Any) -> list[str]:
    if references is None:
        return []
    if isinstance(references, float) and not math.isfinite(references):
        raise DataError(f"the reference is {references}; expected a text or a list of texts")
    if isinstance(references, (str, int, float)):
        return [_in_unicode(str(references), "reference")]
    if isinstance(references, Sequence) and all(isinstance(r, str) for r in references):
        return [_in_unicode(r, "reference") for r in dict.fromkeys(references)]
    raise DataError(f"the reference is {_shown(references)}; expected a text or a list of texts")


def _in_unicode(value: Any, what: str) -> Any:
    """Refuse half of a surrogate pair, which Python's strings hold and no tokenizer reads."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the {what} is {_shown(value)}, with half of a surrogate pair; expected Unicode text"
        ) from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _template(source: str | None, flag: str) -> Callable[[Mapping[str, Any]], str] | None:
    if source is None:
        return None
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        template = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    except TemplateError as error:
        raise DataError(f"--{flag} is not a valid template: {error}") from error

    def render(row: Mapping[str, Any]) -> str:
        try:
            return template.render(**row)
        except Exception as error:  # jinja's own, and whatever an operation on a value raises
            raise DataError(f"--{flag} {source!r}: {error}; the columns are {', '.join(row)}") from error

    return render


def _tokenize(prompts: list[Any], tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> list[list[int]]:
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the prompts are chat messages, but the tokenizer has no chat template")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **chat_template_kwargs}
    try:
        return tokenizer.apply_chat_template(prompts, **options)["input_ids"]
    except Exception as error:  # a template refuses conversations by any error
        raise DataError(
            f"the tokenizer's chat template refuses {_refused(prompts, tokenizer, options)}: {error}"
        ) from error


def _refused(prompts: list[Any], tokenizer: Any, options: Mapping[str, Any]) -> str:
    for prompt in prompts:
        try:
            tokenizer.apply_chat_template([prompt], **options)
        except Exception:
            return f"the prompt {_shown(prompt)}"
    return "the prompts"
