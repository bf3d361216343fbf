"""Rejection-sampling fine-tuning: the data of teacher forcing on a model's own samples that scored best.

Also called best-of-n distillation, and expert iteration when repeated (Anthony et al. 2017; Touvron et al. 2023,
section 3.2.3). Completions that this recipe samples all come from the model at the start: what on-policy training gains
over that is the worth of sampling from the model as it changes. (Those that a run has logged come from the model as it
changed.) Samples are known here by their texts, as a run logs them, and are tokenised again for training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.config.arguments import DataArguments
from rlseq.data.lengths import within_length
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import Sample
from rlseq.errors import DataError
from rlseq.scoring import RewardSuite
from rlseq.scoring.replay import read_rollouts
from rlseq.training.run.rollout_log import calls_tools, rollout_records
from rlseq.types import Prompt, columns_of

Record = Mapping[str, Any]  # of a rollout, as a run's rollouts/*.jsonl has it
CHUNK_ROWS = 1024  # completions sampled and scored together


def best_completions(records: Iterable[Record], *, keep: int = 1, min_total: float | None = None) -> list[Record]:
    """Each prompt's distinct completions with the highest totals.

    Completions that every reward abstained from (total None) or that were cut at the limit (finish_reason "length")
    are never kept; equal texts of a prompt count once, with the highest of their totals.

    Args:
        records: rollouts in any order; prompts are distinguished by `prompt_key` (or `key`), else by themselves.
        keep: completions kept a prompt, at most. Of equal totals the one that came first is kept.
        min_total: the lowest total that is kept, itself included; None keeps any.

    Returns:
        The records kept: prompts as first met, the best completion of each first.
    """
    prompts: dict[str, dict[str, Record]] = {}
    for record in records:
        total = record["total"]
        if total is None or record.get("finish_reason") == "length" or (min_total is not None and total < min_total):
            continue
        completions = prompts.setdefault(key_of(record), {})
        known = completions.get(record["completion"])
        if known is None or total > known["total"]:
            completions[record["completion"]] = record
    return [
        record
        for completions in prompts.values()
        for record in sorted(completions.values(), key=lambda r: -r["total"])[:keep]
    ]


def require_survivors(kept: Sequence[Record], records: Sequence[Record], min_total: float | None) -> None:
    """Refuse to train on nothing.

    Raises:
        DataError: nothing was kept; the message has the best total seen, and why the rest fell out.
    """
    if kept:
        return
    seen = [r["total"] for r in records if r["total"] is not None]
    whole = [r["total"] for r in records if r["total"] is not None and r.get("finish_reason") != "length"]
    cut = sum(r.get("finish_reason") == "length" for r in records)
    raise DataError(
        f"none of {len(records):,} completions survives the selection. The best total seen is "
        f"{f'{max(seen):g}' if seen else 'none'}"
        + (f", {max(whole):g} of those not cut" if whole else "")
        + (f"; --min_reward is {min_total:g}" if min_total is not None else "")
        + f"; {cut:,} were cut at the length limit, {len(records) - len(seen):,} have no total. Lower --min_reward, "
        "let completions be longer (--max_new_tokens), or generate more of them."
    )


def read_candidates(paths: Sequence[str]) -> list[Record]:
    """Read scored rollouts from run directories (their rollouts/*.jsonl) and jsonl files, in the order given.

    Raises:
        RlseqError: a path has no rollouts, a line is no record of a rollout (the message has its number), has no
            total or calls tools, or text prompts and chat prompts are mixed.
    """
    records: list[Record] = []
    for path in map(Path, paths):
        files = sorted((path / "rollouts").glob("*.jsonl")) if path.is_dir() else []
        for file in files or [path]:
            for number, record in enumerate(read_rollouts(file).records, 1):
                total = record.get("total", "nothing")
                if total is not None and not (isinstance(total, int | float) and math.isfinite(total)):
                    raise DataError(
                        f"{file}, record {number}: total is {total!r}; expected a number, or null where every reward "
                        "abstained. `rlseq reward score --output` gives rollouts totals."
                    )
                if calls_tools(record.get("messages")):
                    raise DataError(
                        f"{file}, record {number}: tools were called in it. Its last answer alone would be trained, as "
                        "if it could be known without the calls. Take rollouts of runs without tools and environment."
                    )
                records.append(record)
    if len({isinstance(record["prompt"], str) for record in records}) > 1:
        raise DataError(f"{', '.join(paths)} mix text prompts and chat prompts; train on one kind")
    return records


def fitting_candidates(
    candidates: list[Record], data: DataArguments, tokenizer: Any, template_options: Mapping[str, Any] | None
) -> tuple[list[Record], str]:
    """Those whose prompts are as `data` wants them, and a sentence on those left out or "".

    Raises:
        DataError: they were logged without the system prompt, or a prompt is too long and is not to be left out.
    """
    if data.system_prompt is not None:
        first = {"role": "system", "content": data.system_prompt}
        other = sum(isinstance(c["prompt"], str) or c["prompt"][0] != first for c in candidates)
        if other:
            raise DataError(
                f"{other:,} of {len(candidates):,} logged prompts do not begin with --system_prompt, which is put "
                "before the rows of --dataset_name alone; leave it out, or take rollouts that were sampled with it"
            )
    options = {"chat_template_kwargs": template_options}
    return within_length(candidates, [tokenizer], "logged", **data.length_options(), prompt_options=options)


def prompts_together(num_samples: int) -> int:
    """Prompts whose completions a process samples and scores together."""
    return max(1, CHUNK_ROWS // num_samples)


def sample_candidates(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    suite: RewardSuite,
    tokenizer: Any,
    *,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    stop_strings: Sequence[str] | None = None,
) -> list[Record]:
    """Sample and score completions of each prompt, with a progress bar; every process samples a share and gets all.

    Args:
        model: what is sampled from, on this process's device.
        prompts: the P prompts.
        suite: the rewards; what they are worth together is the total that selects.
        tokenizer: the model's.
        num_samples: samples per prompt.
        temperature, max_new_tokens, seed, stop_strings: of the sampling.

    Returns:
        P · num_samples records in the order of the prompts, as GRPO logs them, of step 0 and without advantages.

    Raises:
        Exception: a reward failed, or anything else; what one process raises, all raise.
    """
    state = PartialState()
    mine = list(range(state.process_index, len(prompts), state.num_processes))
    stops = stop_ids_of(model, tokenizer)
    size = prompts_together(num_samples)
    scored: list[tuple[int, Record]] = []  # (place of the prompt, record)
    with (
        raise_on_all_ranks(),
        tqdm(
            total=len(mine) * num_samples,
            desc="sampling",
            unit="sample",
            disable=not state.is_main_process,
            leave=False,
        ) as bar,
    ):
        for places in (mine[start : start + size] for start in range(0, len(mine), size)):
            chunk = [prompts[place] for place in places]
            groups = sample(
                model,
                chunk,
                num_samples=num_samples,
                max_new_tokens=max_new_tokens,
                strategy=Sample(temperature=temperature),
                seed=seed,
                stop_ids=stops,
                stop_strings=stop_strings or (),
                tokenizer=tokenizer,
            )
            places_of = [place for place in places for _ in range(num_samples)]
            scored += zip(places_of, _scored(chunk, groups, suite), strict=True)
            bar.update(len(places_of))
    return [record for _, record in sorted(gather_object(scored), key=lambda pair: pair[0])]


def _scored(prompts: Sequence[Prompt], groups: Sequence[Sequence[Any]], suite: RewardSuite) -> list[Record]:
    flat = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    scored = suite.score([rollout for _, rollout in flat], columns_of([prompt for prompt, _ in flat])).scored
    return rollout_records(0, [prompt for prompt, _ in flat], scored, [None] * len(flat))


def key_of(record: Record) -> str:
    """What distinguishes a record's prompt."""
    key = record.get("prompt_key", record.get("key"))
    return str(key) if key is not None else json.dumps(record["prompt"], sort_keys=True, ensure_ascii=False)


__all__ = [
    "best_completions",
    "key_of",
    "prompts_together",
    "read_candidates",
    "require_survivors",
    "sample_candidates",
]
