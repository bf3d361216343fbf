"""From rows to prompts: columns and templates make text or messages, the tokenizer makes ids, and each has its key."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlseq.data.files import place_of, rows_of_dataset
from rlseq.errors import DataError, did_you_mean
from rlseq.types import Prompt

IMAGE_COLUMNS = ("image", "images")
IMAGE_PARTS = ("image", "image_url")
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)


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


def digest(value: Any) -> bytes:
    """Return a hash of a value of JSON's types, 8 bytes, that depends on neither run nor order of keys."""
    return hashlib.blake2b(_CANONICAL.encode(value).encode(), digest_size=8).digest()


def prompt_digest(prompt: Any) -> bytes:
    """Return the hash by which splits tell prompts apart: prompts that differ only in whitespace have the same."""
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
    """Return what becomes each row's prompt, text or messages, as `build_prompts` makes it, unchecked.

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
    """The names that stand in any of the rows, as each may lack some."""
    return list(dict.fromkeys(name for row in rows for name in row))


def describe_shared(prompts: Iterable[Any], split: str, others: Iterable[Any], other: str) -> str:
    """Say how many of the distinct prompts of a split are also in another, in words; whitespace distinguishes none.

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
            wrong type, or a row holds an image.
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
                raise DataError(f"the prompt is {_shown(prompt)}; text and chat messages cannot be mixed")
            _refuse_images(row, prompt)
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
    all_ids = tokenize_prompts([record["prompt"] for record in records], tokenizer, options)
    seen: Counter[str] = Counter()
    prompts = []
    for record, ids in zip(records, all_ids, strict=True):
        if not ids:
            raise DataError(f"the prompt {_shown(record['prompt'])} has no tokens; a completion needs one to follow")
        key = digest([record["prompt"], record["references"]]).hex()
        seen[key] += 1
        if seen[key] > 1:
            key = f"{key}-{seen[key]}"
        prompt = record.pop("prompt")
        prompts.append(Prompt(key=key, prompt=prompt, prompt_ids=tuple(ids), columns=record, template_options=options))
    return prompts


def reference_ids(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the token ids of a prompt's distinct references: the keys of `reference_texts`."""
    return list(reference_texts(prompt, tokenizer, stop_ids))


def reference_texts(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int]) -> dict[tuple[int, ...], str]:
    """Return a prompt's references by their token ids as completions, each ended by one stop id.

    Of texts that the tokenizer cannot tell apart the first stands for all.

    Prompt and reference are tokenised as one string, as teacher forcing sees them; where that moves the boundary
    between the two, what follows the prompt is tokenised by itself. For chat data, the answer is rendered by the chat
    template as the prompt was, with the same options: as a message of its own, or the rest of the one that the prompt
    begins.
    """
    start = list(prompt.prompt_ids)
    chat, options = not isinstance(prompt.prompt, str), prompt.template_options
    found: dict[tuple[int, ...], str] = {}
    for reference in prompt.columns.get("references", ()):
        if chat:
            messages = answered(prompt.prompt, reference, options)
            whole = _rendered([messages], tokenizer, options, whole=True)[0]
        else:
            whole = tokenizer(text=prompt.prompt + reference)["input_ids"]
        if list(whole[: len(start)]) == start:
            ids = list(whole[len(start) :])
        else:
            rest = reference
            if chat:
                (asked,) = _rendered([prompt.prompt], tokenizer, options, tokenize=False)
                (text,) = _rendered([messages], tokenizer, options, whole=True, tokenize=False)
                rest = text[len(asked) :] if text.startswith(asked) else reference
            ids = tokenizer(text=rest, add_special_tokens=False)["input_ids"]
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        found.setdefault(tuple(ids[: end + 1]) if end is not None else (*ids, stop_ids[0]), reference)
    return found


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


def _refuse_images(row: Mapping[str, Any], prompt: Any) -> None:
    """Refuse a row with an image, which would silently be left out."""
    where = next((f"column {name!r}" for name in IMAGE_COLUMNS if row.get(name)), None)
    for message in () if isinstance(prompt, str) else prompt:
        parts = message["content"] if isinstance(message["content"], list) else []
        if any(isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS for part in parts):
            where = where or f"a message of the role {message['role']!r}"
    if where is not None:
        raise DataError(
            f"{where} holds an image, and text alone is served, of multimodal models too. Leave the column out, or "
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


def _template(source: str | None, flag: str, columns: Iterable[str]) -> Any:
    """What renders a row; None without a template.

    A column that other rows have and this one lacks is false, and an error only where it would be printed; a name that
    no row has is an error wherever it stands.
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


def continues(messages: Any, template_options: Mapping[str, Any]) -> bool:
    """Whether a completion continues the prompt's last message, the assistant's, rather than start a new one."""
    if isinstance(messages, str) or messages[-1]["role"] != "assistant":
        return False
    return template_options.get("continue_final_message", not template_options.get("add_generation_prompt", False))


def answered(messages: Sequence[Any], answer: str, template_options: Mapping[str, Any]) -> list[Any]:
    """The messages with an answer as the assistant's: the rest of the last one where the prompt begins it."""
    if not continues(messages, template_options):
        return [*messages, {"role": "assistant", "content": answer}]
    begun = messages[-1]["content"]
    more = [{"type": "text", "text": answer}] if isinstance(begun, list) else answer
    return [*messages[:-1], {**messages[-1], "content": begun + more if begun else more}]


def tokenize_prompts(prompts: list[Any], tokenizer: Any, template_options: Mapping[str, Any]) -> list[list[int]]:
    """The ids of prompts, all text or all chat: what a completion follows.

    Raises:
        DataError: there is no chat template, or it refuses a conversation.
    """
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the prompts are chat messages, but the tokenizer has no chat template")
    try:
        return _rendered(prompts, tokenizer, template_options)
    except Exception as error:  # a template refuses conversations by any error
        raise DataError(
            f"the tokenizer's chat template refuses {_refused(prompts, tokenizer, template_options)}: {error}"
        ) from error


def _rendered(
    conversations: list[Any],
    tokenizer: Any,
    template_options: Mapping[str, Any],
    *,
    whole: bool = False,
    tokenize: bool = True,
) -> list[Any]:
    """The ids of conversations, or their texts: as prompts, or `whole`, with their answers."""
    found: dict[int, Any] = {}
    for continued in (False, True):
        places = [i for i, messages in enumerate(conversations) if continues(messages, template_options) == continued]
        options = {"add_generation_prompt": not continued, "continue_final_message": continued} | dict(template_options)
        if whole or not continued:
            options["continue_final_message"] = False
        if whole:
            options["add_generation_prompt"] = False
        if places:
            chosen = [conversations[i] for i in places]
            made = tokenizer.apply_chat_template(chosen, tokenize=tokenize, return_dict=tokenize, **options)
            found |= dict(zip(places, made["input_ids"] if tokenize else made, strict=True))
    return [found[i] for i in range(len(conversations))]


def _refused(prompts: list[Any], tokenizer: Any, options: Mapping[str, Any]) -> str:
    for prompt in prompts:
        try:
            _rendered([prompt], tokenizer, options)
        except Exception:
            return f"the prompt {_shown(prompt)}"
    return "the prompts"
