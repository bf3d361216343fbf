"""The checks of prompts and references: how they begin and end, what they leave room for, what the tokenizer loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.doctor.check import FAILED, OK, SKIPPED, WARNING, Problem, Result, judge, named
from rlseq.types import Prompt

SAMPLED = 500


def check_bos(tokenizer: Any, prompts: Sequence[Prompt] = ()) -> Result:
    """Prompts, as rlseq builds them, begin with BOS once where the tokenizer has texts begin so, and end without EOS.

    Without prompts, one text and (where there is a template) one chat are built.
    """
    prompts = prompts or _sample_prompts(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    intended = bos is not None and tokenizer(text="a")["input_ids"][:1] == [bos]
    counts = [_leading(bos, prompt.prompt_ids) for prompt in prompts]
    of = f"of {len(prompts):,} prompts"
    problems: list[Problem] = []
    if twice := sum(count > 1 for count in counts):
        todo = "leave BOS out of the text (or pass chat messages): the tokenizer adds it"
        problems.append((FAILED, f"{twice:,} {of} begin with more than one {named(tokenizer, bos)}", todo))
    if intended and (without := sum(count == 0 for count in counts)):
        found = f"{without:,} {of} lack {named(tokenizer, bos)}, with which the tokenizer begins a text"
        problems.append((WARNING, found, "put {{ bos_token }} at the start of the chat template, if it was trained so"))
    text = [prompt.prompt_ids for prompt in prompts if isinstance(prompt.prompt, str)]
    if ended := sum(len(ids) > 1 and ids[-1] == eos for ids in text):
        todo = "set add_eos_token to false in tokenizer_config.json: a completion would follow the end"
        problems.append((FAILED, f"{ended:,} {of} end with {named(tokenizer, eos)}", todo))
    fine = "none, as the tokenizer intends" if not any(counts) else f"{named(tokenizer, bos)} once"
    return judge("BOS", problems, lambda: fine)


def check_context(
    config: Any, prompts: Sequence[Prompt], completion_tokens: int, *, setting: str | None = "max_completion_length"
) -> Result:
    """Prompt and completion fit the positions that the model has; `setting` bounds the completion, None: the data."""
    values = config.get_text_config().to_dict()
    known = ("max_position_embeddings", "n_positions", "max_seq_len")
    context = next((values[name] for name in known if values.get(name)), None)
    switch = _rotary_switch(values)
    if context is not None and switch is not None:
        context = min(context, switch)
    if context is None:
        return Result("context", OK, "the configuration states no limit")
    if not prompts:
        return Result("context", SKIPPED, f"{context:,} tokens; no data to hold against it (--dataset_name)")
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    longest = max(lengths)
    over = sum(length + completion_tokens > context for length in lengths)
    said = f"the longest prompt {longest:,} + completion {completion_tokens:,}"
    if not over:
        return Result("context", OK, f"{said} of {context:,} tokens")
    relative = values.get("alibi") or any(name.startswith("rope") for name in values)
    found = f"{over:,} of {len(prompts):,} rows may exceed {context:,} tokens ({said})"
    if context == switch:
        todo = (
            "shorten or leave out what is longer: one such sequence changes the rotary frequencies of its whole batch"
        )
        return Result("context", FAILED, f"{found}, where LongRoPE switches", todo)
    if longest >= context:
        return Result("context", FAILED, found, "shorten those prompts or leave them out: some have no room to answer")
    todo = "shorten the prompts or the references"
    if setting is not None:
        todo = f"lower {setting} to {context - longest:,}, or shorten the prompts"
    if relative:
        return Result("context", WARNING, found, f"{todo}: beyond it the model was not trained")
    return Result("context", FAILED, found, f"{todo}: positions beyond it do not exist, a run would crash")


def reference_pairs(
    prompts: Sequence[Prompt], tokenizer: Any, stop_ids: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(reference, ids) of at most `SAMPLED` rows, evenly spaced: the first reference of each."""
    if not stop_ids:
        return
    answered = [prompt for prompt in prompts if prompt.columns.get("references")]
    for prompt in answered[:: -(-len(answered) // SAMPLED) or 1]:
        reference = prompt.columns["references"][0]
        single = dataclasses.replace(prompt, columns={"references": [reference]})
        yield reference, reference_ids(single, tokenizer, stop_ids)[0]


def check_references(
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[str, tuple[int, ...]]],
    tokenizer: Any,
    stop_ids: Sequence[int],
    *,
    needed: bool = True,
) -> Result:
    """The tokenizer can write prompts and references: no <unk>, no special token inside, decoded they are themselves.

    Args:
        prompts: all of them.
        pairs: (reference, its ids as a completion), a sample.
        tokenizer, stop_ids: as `rlseq.data.chat.reference_ids` took them.
        needed: whether more than half of the references in trouble is a failure rather than a warning.
    """
    if not prompts:
        return Result("references", SKIPPED, "no data (--dataset_name)")
    unk = tokenizer.unk_token_id if tokenizer.unk_token_id not in stop_ids else None
    special = set(tokenizer.all_special_ids) - {unk}
    problems: list[Problem] = []
    unknown = [prompt for prompt in prompts if unk is not None and unk in prompt.prompt_ids]
    if unknown:
        status = FAILED if 2 * len(unknown) > len(prompts) else WARNING
        found = f"{len(unknown):,} of {len(prompts):,} prompts hold <unk>: {_short(unknown[0].text)}"
        problems.append((status, found, "write the prompt in what the tokenizer knows (--prompt_template)"))
    texts = [text for text, _ in pairs]
    alone = tokenizer(text=texts, add_special_tokens=False)["input_ids"] if texts else []
    cases = {
        "become <unk>": [t for t, ids in zip(texts, alone, strict=True) if unk in ids],
        "hold a special token": [t for t, ids in zip(texts, alone, strict=True) if special & set(ids)],
    }
    said = {text for found in cases.values() for text in found}
    chat = not isinstance(prompts[0].prompt, str)
    changed: list[str] = []
    opened: list[str] = []  # what the template puts before an answer, such as an empty block of thought
    for text, ids in pairs:
        own, decoded = text.strip(), _decoded(ids, tokenizer, stop_ids)
        if chat and own and decoded != own and decoded.endswith(own):
            opened.append(decoded.removesuffix(own))
        elif decoded != own and text not in said:
            changed.append(text)
    cases["decode to another text"] = changed
    if opened:
        found = f"the chat template puts {_short(opened[0])} before {len(opened):,} of {len(pairs):,} references"
        todo = (
            "it is learnt and scored as a part of the completion; training and evaluation have it in the prompt by "
            """--chat_template_kwargs '{"enable_thinking": false}'"""
        )
        problems.append((WARNING, found, todo))
    for what, found in cases.items():
        if found:
            status = FAILED if needed and 2 * len(found) > len(pairs) else WARNING
            example = f"{len(found):,} of {len(pairs):,} references {what}: {_short(found[0])}"
            problems.append((status, example, "no completion can equal them: clean them (--reference_template)"))
    fine = f"{len(pairs):,} looked at, all decode to themselves" if pairs else "the data has none"
    return judge("references", problems, lambda: fine)


def _rotary_switch(values: Mapping[str, Any]) -> int | None:
    """Tokens beyond which LongRoPE takes its other frequencies, for all of a batch and not for what a cache holds."""
    parameters = values.get("rope_parameters") or {}
    by_layer_type = [one for one in parameters.values() if isinstance(one, Mapping)]  # as some have them
    name = "original_max_position_embeddings"
    long = [one for one in (parameters, *by_layer_type) if one.get("rope_type") == "longrope"]
    return min(filter(None, (one.get(name) or values.get(name) for one in long)), default=None)


def _sample_prompts(tokenizer: Any) -> list[Prompt]:
    prompts = build_prompts([{"prompt": "a a"}], tokenizer)
    if getattr(tokenizer, "chat_template", None):
        prompts += build_prompts([{"prompt": [{"role": "user", "content": "a"}]}], tokenizer)
    return prompts


def _leading(token: int | None, ids: Sequence[int]) -> int:
    return next((n for n, i in enumerate(ids) if i != token), len(ids))


def _decoded(ids: Sequence[int], tokenizer: Any, stop_ids: Sequence[int]) -> str:
    return tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids, skip_special_tokens=True).strip()


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
