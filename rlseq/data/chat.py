"""From prompts and references to token ids: as text, or by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.common.escapes import shortened
from rlseq.errors import DataError
from rlseq.types import Prompt


def reference_ids(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the token ids of a prompt's distinct references: the keys of `reference_texts`."""
    return list(reference_texts(prompt, tokenizer, stop_ids))


def reference_texts(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int]) -> dict[tuple[int, ...], str]:
    """Return a prompt's references by their token ids as completions, each ended by one stop id.

    Of texts with the same token ids the first is kept.

    Prompt and reference are tokenised as one string, as teacher forcing sees them; if that moves the boundary
    between the two, the text after the prompt is tokenised by itself. For chat data, the answer is rendered by the chat
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


def continues(messages: Any, template_options: Mapping[str, Any]) -> bool:
    """Whether a completion continues the prompt's last message (the assistant's) instead of starting a new one."""
    if isinstance(messages, str) or messages[-1]["role"] != "assistant":
        return False
    return template_options.get("continue_final_message", not template_options.get("add_generation_prompt", False))


def answered(messages: Sequence[Any], answer: str, template_options: Mapping[str, Any]) -> list[Any]:
    """The messages with an answer of the assistant, which continues the last message if the prompt begins it."""
    if not continues(messages, template_options):
        return [*messages, {"role": "assistant", "content": answer}]
    begun = messages[-1]["content"]
    more = [{"type": "text", "text": answer}] if isinstance(begun, list) else answer
    return [*messages[:-1], {**messages[-1], "content": begun + more if begun else more}]


def tokenize_prompts(prompts: list[Any], tokenizer: Any, template_options: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of prompts, all text or all chat.

    Raises:
        DataError: there is no chat template, or it raises on a conversation.
    """
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the prompts are chat messages, but the tokenizer has no chat template; give one (--chat_template FILE)"
        )
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
            return f"the prompt {shortened(prompt)}"
    return "the prompts"
