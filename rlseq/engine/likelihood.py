"""Teacher forcing: the log-probs that a model gives to given sequences, and what is computed from them.

One forward pass over a prompt x and a completion y scores every token given those before it, and by the chain
rule the sum is the log-prob of the whole completion, exactly:

    log p(y | x) = Σ_t log p(y_t | x, y_<t)

So the summed next-token losses are −log of the joint probability. Log-probs are in nats; lengths are in tokens, the
stop token included where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlseq.engine.decoding.common_prefix import compute_common_prefixes, find_common_prefixes, read_only, serves
from rlseq.engine.model.info import attention_of, eval_mode, uncompiled, vocabulary_of
from rlseq.engine.packed.logits import head_is_separate, logits_at
from rlseq.engine.packed.packing import PackedBatch, pack, pad, rows_of_group
from rlseq.engine.packed.self_tests import supports_packing

_ROW_TOKENS = 1024  # attention costs the square of it: beyond, completions of one prompt start another row
_CHUNK_LOGITS = 2**25  # numbers in the largest (tokens, V) tensor that is held: 128 MiB in float32


class Warp(Protocol):
    """What `score` needs of a decoding strategy."""

    def warp(self, logits: Tensor) -> Tensor:
        """Log-probs (..., V) of the distribution the strategy samples from, given logits (..., V)."""


def score(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    strategy: Warp | None = None,
    batch_tokens: int = 16_384,
    share_prompts: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Log-prob of each token of each completion, given its prompt and the tokens before it.

    Runs in eval mode without gradient and restores the mode. Completions of equal prompts share a packed row,
    the prompt computed once, where `supports_packing` finds that exact; else rows are padded on the right.

    Where the model's logits are its head on its decoder's output and nothing more, only completion tokens are
    projected on the vocabulary, in chunks. Other models (soft-capped or scaled logits) run in batches small
    enough that their logits fit a chunk, a single longer row excepted.

    Args:
        model: a causal `transformers` model.
        prompt_ids: B prompts, each of one token at least.
        completion_ids: B completions; an empty one gives an empty tensor.
        strategy: log-probs are those of the distribution that this strategy samples from (−inf for a token it
            cannot produce); None: of the model's own.
        batch_tokens: tokens in a forward pass, padding included; a longer single row runs alone.
        share_prompts: False: no row is packed; for long rows, since a packed row's mask takes the square of its length.
        progress: called with (completions done, B) after each batch.

    Returns:
        B tensors of shape (T_b,), nats, float32 or wider, on the model's device.

    Raises:
        ValueError: unequal numbers of prompts and completions, an empty prompt, batch_tokens below 1, or a
            strategy that samples from no distribution (greedy, beam).
    """
    _check_warp(strategy)

    def measure(logits: Tensor, labels: Tensor) -> Tensor:
        return token_logprobs(logits, labels, strategy)

    return _score(model, prompt_ids, completion_ids, measure, batch_tokens, progress, share_prompts)


@dataclass(frozen=True)
class TeacherForced:
    """What one forward pass gives for a completion of T tokens, each given the true tokens before it.

    Attributes:
        logprobs: (T,) nats, the model's own: those of `score`.
        right: (T,) bool, whether the token is the argmax, found as greedy decoding finds it (ties: the lowest id).
        margins: (T,) the token's logit above the highest other one: at least 0 where it is the argmax, at most 0
            where it is not.
        warped: for each strategy asked for, (T,) nats under the distribution that it samples from (−inf for a token
            that it cannot produce).
    """

    logprobs: Tensor
    right: Tensor
    margins: Tensor
    warped: tuple[Tensor, ...] = ()


def teacher_force(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    strategies: Sequence[Warp] = (),
    batch_tokens: int = 16_384,
    progress: Callable[[int, int], None] | None = None,
) -> list[TeacherForced]:
    """`score` under the model's own distribution and under those of strategies, and argmaxes: in one forward pass.

    Arguments and errors are those of `score`.
    """
    for strategy in strategies:
        _check_warp(strategy)

    def measure(logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best = logits.argmax(-1)
        first, second = wide.topk(2).values.unbind(-1)
        right = best == labels
        margins = wide.gather(-1, labels[:, None])[:, 0] - torch.where(right, second, first)
        warped = [token_logprobs(logits, labels, strategy) for strategy in strategies]
        return torch.stack([token_logprobs(logits, labels), right.to(wide.dtype), margins, *warped], -1)  # (n, 3 + S)

    found = (values.T for values in _score(model, prompt_ids, completion_ids, measure, batch_tokens, progress))
    return [TeacherForced(values[0], values[1] > 0, values[2], tuple(values[3:])) for values in found]


def divergence(
    model: nn.Module,
    other: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 16_384,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """KL and log-ratio of a model p against another model b at each token of given completions.

        kl_t = Σ_v p(v | x, y_<t) · (log p(v | x, y_<t) − log b(v | x, y_<t))
        ratio_t = log p(y_t | x, y_<t) − log b(y_t | x, y_<t)

    Over completions y ~ p the sum over t of either has the KL of the sequences, KL(p ‖ b), as its mean. Both models run
    on the same batches, and no tensor over the vocabulary is larger than in `score`.

    Args:
        model: p.
        other: b, on the same device and with the same vocabulary.
        prompt_ids, completion_ids, batch_tokens, progress: as for `score`.

    Returns:
        B tensors (T_b, 2) of kl and ratio, nats; inf where b rules out what p does not.

    Raises:
        ValueError: as `score`, or vocabularies of different sizes.
    """
    sizes = [vocabulary_of(m) for m in (model, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; expected the same size")

    def measure(logits: Tensor, labels: Tensor, other_logits: Tensor) -> Tensor:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, other_logits))
        p, b = (torch.log_softmax(x, -1) for x in wide)  # (n, V)
        ratios = p - b
        kl = torch.where(p.isneginf(), 0, p.exp() * ratios).sum(-1)  # 0 · log 0 = 0
        return torch.stack([kl, ratios.gather(-1, labels[:, None])[:, 0]], -1)

    return _score(model, prompt_ids, completion_ids, measure, batch_tokens, progress, others=[other])


def _check_warp(strategy: Warp | None) -> None:
    if strategy is not None and not hasattr(strategy, "warp"):
        raise ValueError(f"{strategy} samples from no distribution; pass None for the model's own log-probs")


def _score(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    measure: _Measure,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None,
    share_prompts: bool = True,
    others: Sequence[nn.Module] = (),
) -> list[Tensor]:
    """Measure every completion token from the logits before it: B tensors (T_b,) or (T_b, K), as `measure` gives.

    Of `others`, models with the same vocabulary, `measure` gets the logits too.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"score was given {len(prompt_ids)} prompts and {len(completion_ids)} completions")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
    if not prompt_ids:
        return []
    parameter = next(model.parameters())
    longest = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
    shared = share_prompts and len({tuple(p) for p in prompt_ids}) < len(prompt_ids)
    models = [uncompiled(m) for m in (model, *others)]
    model = models[0]
    attentions = {attention_of(m) for m in models}
    # Models with different attention may take different masks.
    packs = shared and len(attentions) == 1 and all(supports_packing(m, longest)[0] for m in models)
    whole = [not head_is_separate(m) for m in models]
    if any(whole):
        batch_tokens = min(batch_tokens, max(1, _CHUNK_LOGITS // vocabulary_of(model)))

    scores: list[Tensor] = [torch.empty(0)] * len(prompt_ids)
    done = 0
    units = _units(prompt_ids, completion_ids, min(_ROW_TOKENS, batch_tokens) if packs else None)
    with torch.no_grad(), ExitStack() as modes:
        for m in models:
            modes.enter_context(eval_mode(m))
        for group in _batches(units, batch_tokens):
            members = [index for _, indices in group for index in indices]
            prompts = [prompt_ids[indices[0]] for _, indices in group]
            completions = [[completion_ids[index] for index in indices] for _, indices in group]
            if packs:
                groups = list(zip(prompts, completions, strict=True))
                batch = pack(
                    groups,
                    pad_id=0,
                    device=parameter.device,
                    dtype=parameter.dtype,
                    attention=attention_of(model),
                )
                pasts: list[DynamicCache | None] = [None] * len(models)
            else:
                batch, pasts = _padded(models, prompts, [c for (c,) in completions], parameter.device)
            tokens = _score_batch(models, batch, measure, whole, pasts)
            for index, values in zip(members, tokens.split(batch.lengths), strict=True):
                scores[index] = values.clone()  # a view would keep the whole batch alive
            done += len(members)
            if progress is not None:
                progress(done, len(prompt_ids))
    return scores


def token_logprobs(logits: Tensor, labels: Tensor, strategy: Warp | None = None) -> Tensor:
    """log p(label) under each distribution: the gather of a log-softmax, in float32 or wider, differentiable.

    Args:
        logits: (..., V), at the position *before* each label.
        labels: (...) long.
        strategy: as for `score`.

    Returns:
        (...) nats.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = torch.log_softmax(wide, -1) if strategy is None else strategy.warp(wide)
    return logprobs.gather(-1, labels[..., None])[..., 0]


_Unit = tuple[int, list[int]]  # tokens of a row, indices of the completions it holds
_Measure = Callable[..., Tensor]  # logits (n, V), labels (n,), logits of others (n, V) each -> (n,) or (n, K)


def _units(prompts: Sequence, completions: Sequence, row_tokens: int | None) -> list[_Unit]:
    """Rows, longest first: completions of equal prompts together up to row_tokens, or (None) one each."""
    if row_tokens is None:
        units = [(len(p) + len(c), [i]) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
    else:
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(tuple(prompt), []).append(index)
        units = [
            (tokens, [indices[m] for m in members])
            for prompt, indices in by_prompt.items()
            for tokens, members in rows_of_group(prompt, [completions[i] for i in indices], row_tokens)
        ]
    return sorted(units, key=lambda unit: -unit[0])


def _batches(units: list[_Unit], batch_tokens: int) -> Iterator[list[_Unit]]:
    """Consecutive rows, as many as fit batch_tokens when padded to the longest of them, which comes first."""
    start = 0
    while start < len(units):
        rows = max(1, batch_tokens // max(1, units[start][0]))
        yield units[start : start + rows]
        start += rows


def _padded(
    models: Sequence[nn.Module], prompts: Sequence, completions: Sequence, device: torch.device
) -> tuple[PackedBatch, list[DynamicCache | None]]:
    """One sequence a row, without what many prompts begin with; and of that the keys and values in each model."""
    prefixes = find_common_prefixes(prompts) if all(map(serves, models)) else None
    if prefixes is None:
        return pad(prompts, completions, pad_id=0, device=device), [None] * len(models)
    lengths = prefixes.lengths
    rests = [prompt[length:] for prompt, length in zip(prompts, lengths.tolist(), strict=True)]
    batch = pad(rests, completions, pad_id=0, device=device)
    computed = [compute_common_prefixes(model, prefixes) for model in models]
    position_ids = batch.position_ids + torch.from_numpy(lengths).to(device)[:, None]
    of_rests: Any = batch.attention_mask  # of 0 and 1, from `pad`
    mask = torch.cat([computed[0][1], of_rests], dim=1)
    return (
        replace(batch, position_ids=position_ids, attention_mask=mask),
        [read_only(cache, prefixes) for cache, _ in computed],
    )


def _score_batch(
    models: Sequence[nn.Module],
    batch: PackedBatch,
    measure: _Measure,
    whole: Sequence[bool],
    pasts: Sequence[DynamicCache | None],
) -> Tensor:
    """What is measured of the batch's N completion tokens, (N,) or (N, K)."""
    width = batch.input_ids.shape[1]
    # Completions with a common prefix share places: each is projected once.
    places, place_of = torch.unique(batch.token_rows * width + batch.token_columns, return_inverse=True)
    labels = batch.input_ids.flatten()[places]
    step = max(1, _CHUNK_LOGITS // vocabulary_of(models[0]))
    before = places - 1
    each = zip(models, whole, pasts, strict=True)
    logits = [logits_at(model, batch, before, alone, step, past) for model, alone, past in each]
    parts = zip(labels.split(step), *logits, strict=True)
    return torch.cat([measure(first, targets, *others) for targets, first, *others in parts])[place_of]
