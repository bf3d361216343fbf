"""How hard each row is for a model: the exact chance of a right answer, or a pass rate of samples.

The measurements of a row are kept on disk as soon as its batch is done, so that a command that was interrupted resumes
from there. A row's measurement depends on neither the batch nor the number of processes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from rlseq.common.escapes import visible
from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_texts
from rlseq.data.files import place_of
from rlseq.data.prompts import build_prompts, digest, made_prompts
from rlseq.engine.sampling import stop_ids_of
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Sample
from rlseq.errors import DataError
from rlseq.evaluation.measure.checks import check_models
from rlseq.evaluation.measure.decode import columns_of, decode_by_settings
from rlseq.evaluation.measure.kept_rows import KeptRows, Measurements
from rlseq.evaluation.measure.loading import load_checkpoint, load_tokenizer
from rlseq.evaluation.measure.partial import checkpoint_fingerprint, versions
from rlseq.evaluation.measure.references import force_references, generation_rows
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import CHANCE
from rlseq.evaluation.stats.estimators import wilson_interval
from rlseq.scoring import RewardSuite
from rlseq.scoring.cache import key_of
from rlseq.types import Prompt

PASS_ROUNDING = 1e-9  # below the threshold, of a weighted sum of rewards


def measure_rows(
    path: str,
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite | None,
    *,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    folder: Path,
    quiet: bool = False,
) -> list[list[float | None]]:
    """Measure a model on R rows under the one strategy of the settings, which is a `Sample`.

    Args:
        path: of the model, or its hub id.
        suite: the rewards; None: the exact chance by teacher forcing.
        prompt_options: how rows become prompts, as `rlseq.data.prompts.build_prompts` takes them. Rows that it merges
            are measured once.
        folder: where measurements are kept until `rlseq.evaluation.measure.kept_rows.remove_kept`.

    Returns:
        By row the rewards of its `samples_per_row` samples, None where every reward abstained or failed. Without
        rewards, one number: the chance that a sample is one of the row's references; None where it has none.

    Raises:
        RlseqError: the model, a column or a reward does not work. What needs no model is checked before it is loaded.
    """
    state, name = PartialState(), Path(path).name
    judged = suite or RewardSuite([], [])
    warnings = check_models({name: path}, rows, prompt_options, settings, judged)
    tokenizer = load_tokenizer(name, path)
    prompts = build_prompts(rows, tokenizer, **prompt_options)
    if suite is None and not any(prompt.columns["references"] for prompt in prompts):
        raise DataError(
            "no row has a reference, so the exact chance of one cannot be computed. Name their column "
            "(--reference_column), or give --reward_funcs to measure a pass rate."
        )
    if state.is_main_process and not quiet:
        for warning in warnings:
            print(visible(f"rlseq: warning: {warning}"), flush=True)
    keys = [key_of(prompt_options.get("chat_template", ""), vars(prompt)) for prompt in prompts]
    kept = KeptRows(folder, _key(path, judged, settings))
    todo = [i for i, key in enumerate(keys) if key not in kept.found]
    if len(todo) < len(prompts) and state.is_main_process and not quiet:
        print(f"rlseq: {len(prompts) - len(todo):,} of {len(prompts):,} rows are measured already", flush=True)
    mine = todo[state.process_index :: state.num_processes]
    new: Measurements = {}
    if todo:
        with raise_on_all_ranks():
            model = load_checkpoint(name, path, settings.allow_missing_weights, settings.quantization, settings.dtype)
        try:
            with raise_on_all_ranks():
                new = _measure_batches(model, tokenizer, prompts, mine, keys, suite, settings, kept, quiet)
        except KeyboardInterrupt:
            if state.is_main_process:
                print(kept.resume_hint(), file=sys.stderr, flush=True)
            raise
    found = kept.found | {key: values for part in gather_object([new]) for key, values in part.items()}
    places = _places_of_prompts(rows, prompt_options) if prompt_options.get("merge_references") else range(len(rows))
    return [found[keys[place]] for place in places]


def _measure_batches(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    mine: Sequence[int],
    keys: Sequence[str],
    suite: RewardSuite | None,
    settings: ContrastSettings,
    kept: KeptRows,
    quiet: bool,
) -> Measurements:
    """Measure this process's rows, batch by batch."""
    found: Measurements = {}
    hidden = quiet or not PartialState().is_main_process
    with tqdm(total=len(mine), desc="measuring", unit="row", disable=hidden, leave=False) as bar:
        for start in range(0, len(mine), settings.eval_batch_size):
            places = mine[start : start + settings.eval_batch_size]
            batch = [prompts[i] for i in places]
            if suite is None:
                values = exact_chances(model, batch, tokenizer, settings)
                bar.update(len(batch))
            else:
                values = sampled_rewards(model, batch, tokenizer, suite, settings, progress=bar.update)
            part = {keys[i]: value for i, value in zip(places, values, strict=True)}
            kept.add(part)
            found |= part
    return found


def exact_chances(
    model: torch.nn.Module, prompts: Sequence[Prompt], tokenizer: Any, settings: ContrastSettings
) -> list[list[float | None]]:
    """By prompt, in a list of one, the chance that a sample is one of its references; None where it has none.

    p = Σ_r q(r | prompt) over the distinct references r that fit into `max_new_tokens`, as
    `rlseq.evaluation.measure.references.generation_rows` computes it.
    """
    (strategy,) = settings.parsed()
    assert isinstance(strategy, Sample)
    stops = stop_ids_of(model, tokenizer)
    references = [list(reference_texts(prompt, tokenizer, stops)) for prompt in prompts]
    forced = force_references(model, prompts, references, [strategy])
    strings = StopStrings(settings.stop_strings or (), tokenizer)
    cut = [[strings.cuts(ids) for ids in found] for found in references]
    rows = generation_rows(strategy, forced, [strategy], settings.max_new_tokens, cut)
    chance = CHANCE("expected_accuracy")
    return [[min(row[chance], 1.0) if chance in row else None] for row in rows]  # a sum of exp rounds above 1


def sampled_rewards(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    suite: RewardSuite,
    settings: ContrastSettings,
    progress: Any = None,
) -> list[list[float | None]]:
    """By prompt the rewards, weighted sums, of its samples; None where every reward abstained or failed."""
    (strategy,) = settings.parsed()
    groups = decode_by_settings(
        model, prompts, strategy, settings, suite=suite, stream=0, tokenizer=tokenizer, progress=progress
    )
    flat = [(row, rollout) for row, group in enumerate(groups) for rollout in group]
    table = suite.score([rollout for _, rollout in flat], columns_of(prompts, [row for row, _ in flat]))
    rewards: list[list[float | None]] = [[] for _ in prompts]
    for (row, _), total in zip(flat, table.totals, strict=True):
        rewards[row].append(total)
    return rewards


def exact_columns(chances: Sequence[float | None], column: str) -> dict[str, Any]:
    """The column of an exact chance."""
    return {column: chances[0]}


def pass_rate_columns(rewards: Sequence[float | None], column: str, threshold: float) -> dict[str, Any]:
    """The share of samples whose reward is at least `threshold`, its 95% Wilson interval, and how many had a reward."""
    present = [reward for reward in rewards if reward is not None]
    passed, n = sum(reward >= threshold - PASS_ROUNDING for reward in present), len(present)
    interval = list(wilson_interval(passed, n)) if n else None
    return {column: passed / n if n else None, f"{column}_ci95": interval, f"{column}_samples": n}


def mean_reward_columns(rewards: Sequence[float | None], column: str) -> dict[str, Any]:
    """The mean reward of the samples, its standard error s/√n (None for fewer than 2), and how many had a reward."""
    present = [reward for reward in rewards if reward is not None]
    n = len(present)
    return {
        column: statistics.fmean(present) if n else None,
        f"{column}_se": statistics.stdev(present) / math.sqrt(n) if n > 1 else None,
        f"{column}_samples": n,
    }


def as_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row as a line of JSON.

    Raises:
        DataError: a row holds what JSON has no form for; names the row and the column.
    """
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(_line(row))
        except (TypeError, ValueError, RecursionError):
            column, value = next((name, value) for name, value in row.items() if not _has_line({name: value}))
            raise DataError(
                f"{place_of(row, number)}: column {column!r} holds a {type(value).__name__} that cannot be written as "
                "JSON. Turn it into text or numbers, or leave the column out."
            ) from None
    return lines


def write_rows(path: Path, lines: Sequence[str]) -> None:
    """Write a jsonl file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _line(row: Mapping[str, Any]) -> str:
    line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
    line.encode()  # half of a surrogate pair is a ValueError
    return line


def _has_line(row: Mapping[str, Any]) -> bool:
    try:
        _line(row)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _key(path: str, suite: RewardSuite, settings: ContrastSettings) -> str | None:
    """A hash of all that decides a measurement beside the row; None where the checkpoint's files are not found."""
    weights = checkpoint_fingerprint(path)
    fields = {
        "weights": weights,
        "rewards": suite.fingerprint(),
        "settings": settings.reproducibility_fields(),
        "versions": versions(),
        "device": PartialState().device.type,
    }
    return None if weights is None else key_of("", fields)


def _places_of_prompts(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
    """By row the place of its prompt where rows with equal prompts were merged."""
    made = made_prompts(rows, **{k: options[k] for k in ("prompt_column", "prompt_template") if k in options})
    places: dict[bytes, int] = {}
    return [places.setdefault(digest(prompt), len(places)) for prompt in made]


__all__ = [
    "as_lines",
    "exact_chances",
    "exact_columns",
    "mean_reward_columns",
    "measure_rows",
    "pass_rate_columns",
    "sampled_rewards",
    "write_rows",
]
