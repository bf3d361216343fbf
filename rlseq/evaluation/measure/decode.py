"""Completions of rows under any decoding strategy, and the choice among samples: best of n, minimum Bayes risk.

A strategy that chooses by a reward is an *oracle* where that reward reads what a reader of the prompt alone does not
know. Its numbers bound what a perfect judge could gain; they are no way to decode.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from rlseq.engine.beam import beam
from rlseq.engine.decoding.kv_budget import rows_within
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import LOGPROB, MBR, Beam, BestOf, Rerank, Sample, Strategy
from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import RewardSuite
from rlseq.types import ABSENT, Prompt, Rollout, column_names

Groups = list[list[Rollout]]
ANSWERS = ("references", "ground_truth", "reward_model", "labels", "label")  # columns that hold answers wherever met
_PAIRS = 2**16  # candidates against pseudo-references that are scored at once


def decode_by_settings(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    strategy: Strategy,
    settings: ContrastSettings,
    *,
    suite: RewardSuite,
    stream: int,
    tokenizer: Any,
    progress: Callable[[int], Any] | None = None,
) -> Groups:
    """`decode` with the numbers of an evaluation's settings, until the model's own stop tokens."""
    return decode(
        model,
        prompts,
        strategy=strategy,
        suite=suite,
        num_samples=settings.samples_per_row,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        stream=stream,
        stop_ids=stop_ids_of(model, tokenizer),
        stop_strings=settings.stop_strings,
        tokenizer=tokenizer,
        batch_rows=settings.eval_batch_size,
        max_kv_gb=settings.max_kv_gb,
        progress=progress,
    )


def decode(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    *,
    strategy: Strategy,
    suite: RewardSuite,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    stream: int,
    stop_ids: Collection[int],
    stop_strings: Sequence[str] | None = None,
    tokenizer: Any,
    batch_rows: int = 256,
    max_kv_gb: float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Groups:
    """Continue each of P prompts as a strategy says.

    Args:
        suite: the rewards that a strategy may choose by.
        num_samples: completions per prompt under strategies that sample; the others give one.
        seed, stream: name the noise of sampling, as in `rlseq.engine.sampling.sample`.
        stop_ids, stop_strings: what ends a completion, as there.
        batch_rows: prompts decoded together.
        max_kv_gb: a budget for the KV cache (`rlseq.engine.decoding.kv_budget.rows_within`); fewer are decoded together
            where it says so.
        progress: called with the number of prompts finished.

    Returns:
        The completions of each prompt.

    Raises:
        RewardError: the reward that is to choose failed.
        ConfigError: the budget does not hold what must be decoded together.
    """
    common = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "tokenizer": tokenizer, "progress": progress}
    common["stop_strings"] = stop_strings or ()
    if isinstance(strategy, Beam):
        if max_kv_gb is not None and prompts:
            tokens = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
            rows = rows_within(model, max_kv_gb, tokens, together=strategy.width)
            batch_rows = min(batch_rows, rows // strategy.width)
        return beam(model, prompts, strategy=strategy, batch_rows=batch_rows, **common)
    reranks = isinstance(strategy, Rerank)
    num_samples = strategy.n if reranks else num_samples if strategy.is_stochastic else 1
    groups = sample(
        model,
        prompts,
        strategy=strategy.sampler if reranks else strategy,
        num_samples=num_samples,
        seed=seed,
        stream=stream,
        batch_rows=batch_rows * num_samples,
        max_kv_gb=max_kv_gb,
        **common,
    )
    if reranks:
        groups = [
            [rollout] for rollout in choose(strategy, _as_candidates(model, prompts, groups, strategy), prompts, suite)
        ]
    return groups


def choose(strategy: Rerank, groups: Groups, prompts: Sequence[Prompt], suite: RewardSuite) -> list[Rollout]:
    """The completion that `BestOf` or `MBR` keeps of each prompt's candidates."""
    if isinstance(strategy, MBR):
        return most_useful(groups, prompts, suite, strategy.utility)
    if strategy.by == LOGPROB:
        return [likeliest(group) for group in groups]
    return best_by_reward(groups, prompts, suite, strategy.by)


def likeliest(group: Sequence[Rollout]) -> Rollout:
    """The candidate of highest log-prob among those that ended (of all, if none did); of equal ones the first sampled.

    A completion that was cut is a prefix: its log-prob is of all that begins with it, and no match for a whole one's.
    """
    ended = [rollout for rollout in group if rollout.finish_reason == "stop"] or group
    best = max(ended, key=lambda rollout: rollout.logprob)
    return next(rollout for rollout in ended if rollout.completion_ids == best.completion_ids)


def best_by_reward(groups: Groups, prompts: Sequence[Prompt], suite: RewardSuite, name: str) -> list[Rollout]:
    """The candidate of each prompt that a reward values most; one it abstains on is kept only if it abstains on all."""
    flat = [(row, rollout) for row, group in enumerate(groups) for rollout in group]
    columns = columns_of(prompts, [row for row, _ in flat])
    found = iter(_alone(suite, name).score([rollout for _, rollout in flat], columns).values[name])
    return [group[_place_of_best([next(found) for _ in group])] for group in groups]


def most_useful(groups: Groups, prompts: Sequence[Prompt], suite: RewardSuite, utility: str) -> list[Rollout]:
    """The candidate of each prompt with the highest expected utility, the other candidates its references in turn.

        U(y_i) = 1/(n−1) Σ_{j≠i} u(y_i, y_j)

    Each pseudo-reference is a list of one text in the place of `references`. Equal samples are scored once and count
    as often as they were sampled; each is a reference for the others. Where u abstains, the mean is over the rest. A
    utility that reads no references is its own expectation.
    """
    alone = _alone(suite, utility)
    places = _reference_places(alone.rewards[0])
    if not places & reads(alone.rewards[0], places):
        return best_by_reward(groups, prompts, suite, utility)
    by_group = alone.rewards[0].info.scope != "sample"  # such a reward needs equal samples, too
    chosen: list[Rollout] = []
    for rows in _parts([len(group) ** 2 for group in groups]):
        candidates = {row: groups[row] if by_group else _distinct(groups[row]) for row in rows}
        texts = {row: Counter(rollout.text for rollout in groups[row]) for row in rows}
        pairs = [(row, text, rollout) for row in rows for text in texts[row] for rollout in candidates[row]]
        columns = columns_of(prompts, [row for row, _, _ in pairs])
        columns |= {place: [[text] for _, text, _ in pairs] for place in places}
        values = alone.score([rollout for _, _, rollout in pairs], columns).values[utility]
        found = iter(values)
        for row in rows:
            table = [[next(found) for _ in candidates[row]] for _ in texts[row]]  # (references, candidates)
            expected = []
            for i, rollout in enumerate(candidates[row]):
                weights = [count - (text == rollout.text) for text, count in texts[row].items()]
                expected.append(_weighted_mean([values[i] for values in table], weights))
            chosen.append(candidates[row][_place_of_best(expected)])
    return chosen


def columns_of(prompts: Sequence[Prompt], rows: Sequence[int]) -> dict[str, list[Any]]:
    """The columns that rewards may ask for, `prompt` among them, of completions of these rows."""
    names = [name for name in column_names(prompts) if name != "prompt"]  # of all, as these rows may all lack one
    columns = {name: [prompts[row].columns.get(name, ABSENT) for row in rows] for name in names}
    return columns | {"prompt": [prompts[row].prompt for row in rows]}


def check_choosers(strategies: Iterable[Strategy], suite: RewardSuite) -> None:
    """Raise ConfigError if a strategy chooses by what is no reward of the evaluation; the message names the nearest."""
    for strategy in strategies:
        one = strategy.members[0]  # those of a sweep choose in the same way
        name = _chooser(one)
        if name is not None and name not in suite.names:
            setting = "utility" if isinstance(one, MBR) else "by"
            also = [LOGPROB] if isinstance(one, BestOf) else []
            raise ConfigError(
                f"strategy {strategy.spec!r}: {setting} names no reward of this evaluation: {name!r}; there are "
                f"{', '.join([*also, *suite.names])}.{did_you_mean(name, [*also, *suite.names])}"
                " Name it in --reward_funcs to measure and to choose by it."
            )


def oracles(
    strategies: Iterable[Strategy], suite: RewardSuite, available: Iterable[str], of_the_prompt: Iterable[str] = ()
) -> dict[str, list[str]]:
    """The strategies that choose by what the prompt does not tell: spec -> columns that their reward reads.

    Args:
        available: the columns of the data.
        of_the_prompt: those of them that the prompt is made of.
    """
    available = set(available)
    found = {}
    for strategy in strategies:
        one = strategy.members[0]
        name = _chooser(one)
        if name is None:
            continue
        reward = suite.rewards[suite.names.index(name)]
        columns = reads(reward, available) - set(of_the_prompt)
        if isinstance(one, MBR):
            columns -= _reference_places(reward)
        if columns:
            found[strategy.spec] = sorted(columns)
    return found


def prompt_columns(options: Mapping[str, Any]) -> set[str]:
    """The columns that the prompt is made of and the reference is not, of options as `build_prompts` takes them."""
    made_of = []
    for side, default in (("prompt", "prompt"), ("reference", "references")):
        template = options.get(f"{side}_template")
        made_of.append(_variables(template) if template else {options.get(f"{side}_column", default)})
    return made_of[0] - made_of[1]


def reads(reward: Any, available: Collection[str]) -> set[str]:
    """Which of these columns a reward gets when it is called; `prompt` does not count."""
    own = set(available) - {"prompt"}
    named, takes_any = set(reward.parameters.named), reward.parameters.takes_any
    read = own & named
    if takes_any and reward.signature in ("single", "verifiers", "batch"):
        read |= own
    if reward.signature == "verl":
        read |= own & {"data_source", "ground_truth", "extra_info"} if takes_any else set()
        if "ground_truth" not in own and (takes_any or "ground_truth" in named):
            read |= own & {"reward_model"}
    if reward.signature == "openrlhf" and (takes_any or "labels" in named):
        read |= own & {"labels", "label"}
    return (read - set(reward.kwargs) - set(reward.columns)) | (set(reward.columns.values()) & own)


def _as_candidates(model: torch.nn.Module, prompts: Sequence[Prompt], groups: Groups, strategy: Rerank) -> Groups:
    """Samples under the strategy's name, with the log-probs of the model's own distribution where another was sampled
    from."""
    groups = [[dataclasses.replace(r, strategy=strategy.spec) for r in group] for group in groups]
    if strategy.sampler == Sample():
        return groups
    places = {(row, r.completion_ids): None for row, group in enumerate(groups) for r in group}
    own = score(model, [prompts[row].prompt_ids for row, _ in places], [ids for _, ids in places])
    logprobs = {place: tuple(values.tolist()) for place, values in zip(places, own, strict=True)}
    return [
        [dataclasses.replace(r, logprobs=logprobs[row, r.completion_ids]) for r in group]
        for row, group in enumerate(groups)
    ]


def _chooser(strategy: Strategy) -> str | None:
    """The reward that a strategy chooses by, if one."""
    if isinstance(strategy, MBR):
        return strategy.utility
    return strategy.by if isinstance(strategy, BestOf) and strategy.by != LOGPROB else None


def _alone(suite: RewardSuite, name: str) -> RewardSuite:
    return RewardSuite([suite.rewards[suite.names.index(name)]], [1.0], suite.max_error_rate)


def _reference_places(reward: Any) -> set[str]:
    """The columns in which a reward finds its `references`."""
    return {"references", reward.columns.get("references", "references")}


def _distinct(group: Sequence[Rollout]) -> list[Rollout]:
    first: dict[tuple[int, ...], Rollout] = {}
    for rollout in group:
        first.setdefault(rollout.completion_ids, rollout)
    return list(first.values())


def _place_of_best(values: Sequence[float | None]) -> int:
    """Where the highest value is, the first of equal ones; None is below every number."""
    return max(range(len(values)), key=lambda i: -math.inf if values[i] is None else values[i])


def _weighted_mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Σ w·v / Σ w over the values present, rounded once, so that equal multisets have equal means."""
    present = [(w, v) for w, v in zip(weights, values, strict=True) if w and v is not None]
    total = sum(w for w, _ in present)
    return math.fsum(v for w, v in present for _ in range(w)) / total if total else None


def _parts(sizes: Sequence[int]) -> Iterable[list[int]]:
    """Runs of consecutive indices whose sizes sum to `_PAIRS` at most, one index at least."""
    part: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if part and total + size > _PAIRS:
            yield part
            part, total = [], 0
        part.append(index)
        total += size
    if part:
        yield part


def _variables(template: str) -> set[str]:
    from jinja2 import Environment, TemplateError, meta

    try:
        return set(meta.find_undeclared_variables(Environment().parse(template)))
    except TemplateError:
        return set()  # whoever renders it says what is wrong
