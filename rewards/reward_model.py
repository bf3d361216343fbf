"""A sequence-classification model as a reward."""

from functools import lru_cache
from typing import Any

from rlseq.scoring import reward

_ANY = 10**30  # tokens, of a model that states no limit; a tokenizer that states none says as many


@reward
def reward_model(
    prompts: list[Any],
    completions: list[str],
    messages: list[Any],
    model: str,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    max_length: int | None = None,
    label: int = 0,
) -> list[float]:
    """The logit `label` of a Hugging Face sequence-classification model, id or path, with its own
    tokenizer.

    Chat data goes through the tokenizer's chat template; text is the prompt with the completion right after
    it. `dtype` is "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; `device` is a GPU where
    there is one, "auto" all of them. Texts over `max_length` tokens (by default the model's own limit) lose
    their start, so that the answer stays.
    """
    network, tokenizer = _load(model, dtype, device)
    sizes = {"batch_size": batch_size, "max_length": max_length, "label": label}
    return scores_of(network, tokenizer, prompts, completions, messages, **sizes)


def scores_of(
    network: Any,
    tokenizer: Any,
    prompts: list[Any],
    completions: list[str],
    messages: list[Any],
    batch_size: int = 8,
    max_length: int | None = None,
    label: int = 0,
) -> list[float]:
    """As `reward_model` scores, by a model and tokenizer that are loaded already."""
    import torch

    # of some models (RoBERTa) the tokenizer alone knows: they have more positions than they can use
    limit = max_length or min(
        getattr(network.config, "max_position_embeddings", None) or _ANY, tokenizer.model_max_length
    )
    rows = [
        _token_ids(tokenizer, prompt, completion, added)[-limit:]
        for prompt, completion, added in zip(prompts, completions, messages, strict=True)
    ]
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt")
            logits = network(**batch.to(network.device)).logits  # (rows, labels)
            if not 0 <= label < logits.shape[-1]:
                raise ValueError(f"label is {label}, but the model has {logits.shape[-1]} labels")
            scores += logits[:, label].float().tolist()
    return scores


def _token_ids(tokenizer: Any, prompt: Any, completion: str, added: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt + completion)["input_ids"]
    chat = [*prompt, *(added or [{"role": "assistant", "content": completion}])]
    # the template writes the special tokens itself
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=2)
def _load(model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlseq.engine.model.load import load_model

    tokenizer = load_tokenizer(model)
    todo = "Give a trained sequence-classification model"
    network = load_model(
        model,
        what="a reward model",
        kind=AutoModelForSequenceClassification,
        dtype=dtype,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        todo=todo,
    )
    return prepared(network, tokenizer), tokenizer


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a reward model, with a token to pad with."""
    from rlseq.engine.model.load import load_tokenizer

    tokenizer = load_tokenizer(model, "the tokenizer of a reward model", padding_side="right")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepared(network: Any, tokenizer: Any) -> Any:
    """A sequence-classification model as it scores: it finds the last token by the padding's id."""
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network.eval().requires_grad_(False)
