"""From rows to prompts: columns and templates make text or messages, and each prompt gets a key."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlseq.common.escapes import shortened
from rlseq.data.chat import tokenize_prompts
from rlseq.data.files import place_of, rows_of_dataset
from rlseq.errors import DataError, did_you_mean
from rlseq.types import Prompt

IMAGE_COLUMNS = ("image", "images")
IMAGE_PARTS = ("image", "image_url")
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)


@contextmanager
def keeping_all() -> Iterator[None]:
    """Pause garbage collection, which would traverse hundreds of thousands of new rows many times and free nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def digest(value: Any) -> bytes:
    """Return a hash of a value of JSON's types, 8 bytes, that depends on neither run nor order of keys."""
    return hashlib.blake2b(_CANONICAL.encode(value).encode(), digest_size=8).digest()


def prompt_digest(prompt: Any) -> bytes:
    """Return the hash by which splits distinguish prompts: prompts that differ only in whitespace have the same."""
    return digest(_without_spacing(prompt))


def _without_spacing(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {name: _without_spacing(inner) for name, inner in value.items()}
    return [_without_spacing(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def made_prompts(
    rows: Sequence[Mapping[str, Any]], prompt_column: str = "prompt", prompt_template: str | None = None
) -> list[Any]:
    """Return each row's prompt, text or messages, as `build_prompts` makes it, unchecked and without a system prompt.

    Raises:
        DataError: no row has the column; the template is not valid, or fails on a row.
    """
    columns = columns_of_rows(rows)
    if prompt_template is None:
        _require_column(prompt_column, columns, "prompt_column")
        return [row.get(prompt_column) for row in rows]
    render = _template(prompt_template, "prompt_template", columns)
    made = []
    for number, row in enumerate(rows):
        try:
            made.append(render(row))
        except DataError as error:
            raise DataError(f"{place_of(row, number)}: {error}") from error.__cause__
    return made


def columns_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the columns of any row, as each may lack some."""
    return list(dict.fromkeys(name for row in rows for name in row))


def describe_shared(prompts: Iterable[Any], split: str, others: Iterable[Any], other: str) -> str:
    """Say how many of the distinct prompts of a split are also in another; whitespace does not distinguish prompts.

    Args:
        prompts, others: text or messages, as `made_prompts` gives them.
        split, other: the names of the two splits.
    """
    own = {prompt_digest(prompt) for prompt in prompts}
    shared = len(own & {prompt_digest(prompt) for prompt in others})
    return f"{shared:,} of {len(own):,} {split} prompts also in {other}"


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
    system_prompt: str | None = None,
    chat_template: str | None = None,
) -> list[Prompt]:
    """Turn rows into prompts.

    Args:
        rows: by column the values of each row, which may lack some columns.
        tokenizer: gives the prompt's ids; chat messages go through its chat template.
        prompt_column: column of the prompt, text or a list of chat messages.
        reference_column: column of the right answer, a text or a list of texts; the prompt's `references` column
            holds it as a list. None, or the default name where no such column exists: no references.
        prompt_template, reference_template: Jinja templates over the row's columns that replace the column's
            text, for example `"{{ word | list | join(' ') }} = "`.
        merge_references: merge rows with the same prompt into one, with all their references.
        chat_template_kwargs: further variables of the chat template.
        system_prompt: content of a system message that is put before each prompt's messages.
        chat_template: replaces the tokenizer's own, for good: references, further prompts and the tokenizer that is
            saved with a model then have it too.

    Raises:
        DataError: a column is missing (the message names the nearest), a prompt is empty, without tokens or of a
            wrong type, a row holds an image, or prompts that are text, or have a system message, are given one.
    """
    rows = rows_of_dataset(rows)
    if not rows:
        raise DataError("the data set is empty")
    columns = columns_of_rows(rows)
    if prompt_template is None:
        _require_column(prompt_column, columns, "prompt_column")
    if reference_column is not None and reference_template is None and reference_column not in columns:
        if reference_column != "references":
            _require_column(reference_column, columns, "reference_column")
        reference_column = None
    render_prompt = _template(prompt_template, "prompt_template", columns)
    render_reference = _template(reference_template, "reference_template", columns)

    merged: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            prompt = _as_prompt(render_prompt(row) if render_prompt else row.get(prompt_column))
            if records and isinstance(prompt, str) != isinstance(records[0]["prompt"], str):
                raise DataError(f"the prompt is {shortened(prompt)}; text and chat messages cannot be mixed")
            _validate_no_images(row, prompt)
            prompt = _with_system_prompt(prompt, system_prompt)
            references = row.get(reference_column) if reference_column else []
            references = _as_texts(render_reference(row) if render_reference else references)
        except DataError as error:
            raise DataError(f"{place_of(row, number)}: {error}") from error.__cause__
        record = {**row, "prompt": prompt, "references": references}
        if merge_references:
            same = merged.setdefault(digest(prompt).hex(), record)
            if same is not record:
                same["references"] = list(dict.fromkeys(same["references"] + record["references"]))
                continue
        records.append(record)

    options = dict(chat_template_kwargs or {})
    if chat_template is not None:
        if isinstance(records[0]["prompt"], str):
            raise DataError("--chat_template is for chat messages, but the prompts are text; leave it out")
        tokenizer.chat_template = chat_template
    all_ids = tokenize_prompts([record["prompt"] for record in records], tokenizer, options)
    seen: Counter[str] = Counter()
    prompts = []
    for record, ids in zip(records, all_ids, strict=True):
        if not ids:
            raise DataError(f"the prompt {shortened(record['prompt'])} has no tokens; a completion needs one to follow")
        key = digest([record["prompt"], record["references"]]).hex()
        seen[key] += 1
        if seen[key] > 1:
            key = f"{key}-{seen[key]}"
        prompt = record.pop("prompt")
        prompts.append(Prompt(key=key, prompt=prompt, prompt_ids=tuple(ids), columns=record, template_options=options))
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return a hash of what is evaluated: the prompts' keys and token ids, in order."""
    found = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        found.update(f"{prompt.key}:{','.join(map(str, prompt.prompt_ids))};".encode())
    return found.hexdigest()


def _require_column(name: str, columns: Sequence[str], flag: str) -> None:
    if name not in columns:
        raise DataError(
            f"the data has no column {name!r} (--{flag}); its columns are {', '.join(columns)}."
            + did_you_mean(name, columns)
        )


def _as_prompt(prompt: Any) -> Any:
    if not prompt or not isinstance(prompt, (str, list)):
        raise DataError(f"the prompt is {shortened(prompt)}; expected text or a list of chat messages")
    for message in () if isinstance(prompt, str) else prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"the prompt has the message {shortened(message)}; expected a mapping of role and content")
    return _in_unicode(prompt, "prompt")


def _with_system_prompt(prompt: Any, system_prompt: str | None) -> Any:
    if system_prompt is None:
        return prompt
    if isinstance(prompt, str):
        raise DataError(
            f"--system_prompt is for chat messages, but the prompt is the text {shortened(prompt)}; put it into "
            "--prompt_template, or give messages"
        )
    if any(message["role"] == "system" for message in prompt):
        raise DataError("the prompt has a system message already; leave --system_prompt or that message out")
    return [{"role": "system", "content": system_prompt}, *prompt]


def _validate_no_images(row: Mapping[str, Any], prompt: Any) -> None:
    """Refuse a row with an image, which would silently be left out."""
    where = next((f"column {name!r}" for name in IMAGE_COLUMNS if row.get(name)), None)
    for message in () if isinstance(prompt, str) else prompt:
        parts = message["content"] if isinstance(message["content"], list) else []
        if any(isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS for part in parts):
            where = where or f"a message of the role {message['role']!r}"
    if where is not None:
        raise DataError(
            f"{where} holds an image, but rlseq serves only text, also of multimodal models. Leave the column out, or "
            "give rows without images."
        )


def _as_texts(references: Any) -> list[str]:
    if references is None:
        return []
    if isinstance(references, float) and not math.isfinite(references):
        raise DataError(f"the reference is {references}; expected a text or a list of texts")
    if isinstance(references, (str, int, float)):
        return [_in_unicode(str(references), "reference")]
    if isinstance(references, Sequence) and all(isinstance(r, str) for r in references):
        return [_in_unicode(r, "reference") for r in dict.fromkeys(references)]
    raise DataError(f"the reference is {shortened(references)}; expected a text or a list of texts")


def _in_unicode(value: Any, what: str) -> Any:
    """Refuse half of a surrogate pair, which a Python string can hold and no tokenizer reads."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the {what} is {shortened(value)}, with half of a surrogate pair; expected Unicode text"
        ) from None
    return value


def _template(source: str | None, flag: str, columns: Iterable[str]) -> Any:
    """A function that renders a row; None without a template.

    A column that other rows have and this one lacks is false, and an error only if it is printed. A name that no row
    has is always an error.
    """
    if source is None:
        return None
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    from jinja2.utils import missing

    known = set(columns)

    class Lacking(StrictUndefined):
        def __bool__(self) -> bool:  # type: ignore[override]  # jinja2 says that it never returns
            if self._undefined_obj is missing and self._undefined_name in known:
                return False
            return super().__bool__()

    try:
        template = SandboxedEnvironment(undefined=Lacking, keep_trailing_newline=True).from_string(source)
    except TemplateError as error:
        raise DataError(f"--{flag} is not a valid template: {error}") from error

    def render(row: Mapping[str, Any]) -> str:
        try:
            return template.render(**row)
        except Exception as error:  # jinja's own, and whatever an operation on a value raises
            raise DataError(f"--{flag} {source!r}: {error}; the columns are {', '.join(row)}") from error

    return render
