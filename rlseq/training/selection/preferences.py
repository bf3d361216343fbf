"""Preference pairs from logged rollouts, for direct preference optimisation (Rafailov et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from rlseq.errors import DataError
from rlseq.training.selection.rejection import key_of

Record = Mapping[str, Any]  # of a rollout, as a run's rollouts/*.jsonl has it
Pair = tuple[Record, Record]  # chosen, rejected


def preference_pairs(records: Iterable[Record], *, pairs_per_prompt: int = 1, min_margin: float = 0.0) -> list[Pair]:
    """Pairs of completions of one group, the samples of a prompt in one step, that earned different totals.

    In a group of distinct completions, the best is paired with the worst, the second best with the second worst, and
    so on. Completions without a total and those cut at the limit are in no pair: a cut one would be trained with an end
    that it did not have.

    Args:
        records: rollouts in any order.
        pairs_per_prompt: of all groups of a prompt, the pairs with the largest margins are kept, at most this many.
        min_margin: smallest difference of the totals, itself included; a difference of 0 is never a pair.

    Returns:
        (chosen, rejected), prompts as first met, the largest margin of each first.
    """
    groups: dict[str, dict[Any, dict[str, Record]]] = {}  # prompt -> step -> text -> record
    for record in records:
        completions = groups.setdefault(key_of(record), {}).setdefault(record.get("step"), {})
        if record["total"] is None or record.get("finish_reason") == "length":
            continue
        completions.setdefault(record["completion"], record)
    kept: list[Pair] = []
    for steps in groups.values():
        found: list[Pair] = []
        for completions in steps.values():
            ranked = sorted(completions.values(), key=lambda record: -record["total"])
            found += list(zip(ranked, reversed(ranked), strict=True))[: len(ranked) // 2]
        found = [pair for pair in found if margin_of(pair) > 0 and margin_of(pair) >= min_margin]
        kept += sorted(found, key=lambda pair: -margin_of(pair))[:pairs_per_prompt]
    return kept


def margin_of(pair: Pair) -> float:
    """The difference of the totals."""
    return pair[0]["total"] - pair[1]["total"]


def require_pairs(pairs: Sequence[Pair], records: Sequence[Record], min_margin: float) -> None:
    """Refuse to train on nothing.

    Raises:
        DataError: there is no pair; the message says of what.
    """
    if not pairs:
        raise DataError(
            f"{len(records):,} rollouts make no pair: no two distinct, finished completions of a prompt and step have "
            f"totals that differ by more than 0 and at least --min_margin {min_margin:g}. Take a run with several "
            "samples per prompt, or lower --min_margin."
        )


def pair_examples(pairs: Sequence[Pair]) -> datasets.Dataset:
    """Pairs as TRL takes them: texts, or for chat prompts an assistant's message each."""

    def answer(record: Record) -> Any:
        text = record["completion"]
        return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]

    return datasets.Dataset.from_list(
        [
            {"prompt": chosen["prompt"], "chosen": answer(chosen), "rejected": answer(rejected)}
            for chosen, rejected in pairs
        ]
    )


def describe_pairs(pairs: Sequence[Pair], records: Sequence[Record]) -> str:
    """How many pairs there are, of what, and their margins, in words."""
    margins = [margin_of(pair) for pair in pairs]
    prompts = len({key_of(chosen) for chosen, _ in pairs})
    return (
        f"{len(pairs):,} pairs of {prompts:,} prompts from {len(records):,} rollouts (margin {min(margins):.4g} to "
        f"{max(margins):.4g}, mean {sum(margins) / len(margins):.4g})"
    )
