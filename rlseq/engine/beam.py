"""Beam search by `generate`: the hypotheses of each prompt, with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from rlseq.engine.decoding.backends import select_backend
from rlseq.engine.likelihood import score
from rlseq.engine.model.info import base_of, eval_mode
from rlseq.engine.stop_strings import StopStrings, StopStringsCriteria
from rlseq.engine.strategies import Beam
from rlseq.errors import ConfigError
from rlseq.types import Prompt, Rollout


@contextmanager
def only_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` read `config` alone: what a checkpoint's own generation_config sets would leak into it."""
    owner = base_of(model)
    original = owner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = original


def beam(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    strategy: Beam,
    stop_ids: Collection[int],
    stop_strings: Sequence[str] = (),
    tokenizer: Any | None = None,
    batch_rows: int = 256,
    progress: Callable[[int], Any] | None = None,
) -> list[list[Rollout]]:
    """Return the best hypothesis of beam search for each prompt (a list of one), by `transformers.generate`.

    Log-probs are the model's own, by teacher forcing of the hypothesis. Arguments as `rlseq.engine.sampling.sample`.

    Raises:
        ConfigError: no stop ids, a prompt has no tokens, or a stop string cannot be met.
    """
    if not stop_ids or any(len(prompt.prompt_ids) == 0 for prompt in prompts):
        raise ConfigError(f"beam: {'a prompt' if stop_ids else 'stop_ids'} is empty; expected at least one id")
    stops, strings = sorted(stop_ids), StopStrings(stop_strings, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=strategy.width,
        length_penalty=strategy.length_penalty,
        # log-probs only fall, so without a length penalty stopping at this bound loses nothing
        early_stopping=False if strategy.length_penalty == 0 else "never",
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    device = next(model.parameters()).device
    found: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), eval_mode(model), only_generation_config(model, config):
        backend = select_backend(model)
        config.use_cache = backend != "uncached"
        padded = backend in ("cuda_graph", "padded")
        for batch in _batches([len(p.prompt_ids) for p in prompts], batch_rows, padded=padded):
            width = max(len(prompts[i].prompt_ids) for i in batch)
            input_ids = torch.full((len(batch), width), stops[0])  # (P, L)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                ids = prompts[i].prompt_ids
                input_ids[row, width - len(ids) :] = torch.tensor(ids)
                attention_mask[row, width - len(ids) :] = 1
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([StopStringsCriteria(strings, width)] if strings else []),
            )
            for row, i in enumerate(batch):
                completion = output[row, width:].tolist()
                end = next((t + 1 for t, token in enumerate(completion) if token in stop_ids), len(completion))
                found[i] = completion[: strings.end(completion[:end]) or end] if strings else completion[:end]
            if progress is not None:
                progress(len(batch))
    logprobs = score(model, [p.prompt_ids for p in prompts], found)
    return as_rollouts(prompts, found, logprobs, stop_ids, tokenizer, strategy.spec, strings)


def _batches(lengths: Sequence[int], batch_rows: int, *, padded: bool) -> Iterator[list[int]]:
    """Yield places of prompts, shortest first: at most `batch_rows`, and unless `padded` of one length."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_rows or (not padded and lengths[place] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def as_rollouts(
    prompts: Sequence[Prompt],
    found: Sequence[Sequence[int]],
    logprobs: Sequence[torch.Tensor],
    stop_ids: Collection[int],
    tokenizer: Any | None,
    strategy: str,
    strings: StopStrings,
) -> list[list[Rollout]]:
    """The one completion found for each prompt, as a list of one."""
    rollouts = []
    for prompt, ids, row_logprobs in zip(prompts, found, logprobs, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else ""
        ended = (ids and ids[-1] in stop_ids) or (strings and strings.end(ids) is not None)
        rollouts.append(
            [
                Rollout.from_ids(
                    prompt.key,
                    ids,
                    strings.text(ids, text),
                    logprobs=row_logprobs.tolist(),
                    text_with_special_tokens=tokenizer.decode(ids) if tokenizer is not None else "",
                    chat=not isinstance(prompt.prompt, str),
                    finish_reason="stop" if ended else "length",
                    strategy=strategy,
                )
            ]
        )
    return rollouts
