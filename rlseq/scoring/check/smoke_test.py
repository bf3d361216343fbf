"""A smoke test of rewards: a few rows of the data are scored before anything expensive starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.check.probe import make_rollout, reference_of
from rlseq.scoring.suite import RewardSuite
from rlseq.types import ABSENT, Prompt, column_names


def smoke_test_rewards(suite: RewardSuite, prompts: Sequence[Prompt], *, all_used: bool = True) -> None:
    """Score the first row with a value and the first row without one, for each column: a reward may fail on either.

    Likewise the first row that a reward with `where` is for.

    The completion is the row's first reference, or its prompt if there is none. Every process of a run calls this, and
    an error on one is raised on all.

    Args:
        all_used: refuse a reward whose `where` holds a value that no row has.

    Raises:
        RewardError: a reward asks for a column that is not there, or fails; the message names the row and its empty
            columns.
    """
    from rlseq.common.ranks import raise_on_all_ranks

    with raise_on_all_ranks():
        suite.check_columns(column_names(prompts))
        if all_used:
            for said in unused_values(suite, prompts):
                raise RewardError(said)
        for number in sorted({*_differing_rows(prompts), *_first_rows_of(suite, prompts)}):
            _score_row(suite, prompts, number)


def unused_values(suite: RewardSuite, prompts: Sequence[Prompt]) -> list[str]:
    """A sentence on each value in a reward's `where` that no row has."""
    found = []
    for reward in suite.rewards:
        for column, values in reward.where.items():
            there = list(dict.fromkeys(str(prompt.columns.get(column, "nothing")) for prompt in prompts))
            for value in values:
                one = dataclasses.replace(reward, where={column: (value,)})
                if not any(one.is_for(prompt.columns) for prompt in prompts):
                    found.append(
                        f"reward {reward.name!r}: where asks for {column} {value!r}, which none of the "
                        f"{len(prompts):,} rows has.{did_you_mean(str(value), there)} They have {', '.join(there[:8])}"
                        f"{', ...' if len(there) > 8 else ''}."
                    )
    return found


def _first_rows_of(suite: RewardSuite, prompts: Sequence[Prompt]) -> list[int]:
    first = []
    for reward in suite.rewards:
        first += [number for number, prompt in enumerate(prompts) if reward.is_for(prompt.columns)][:1]
    return first


def _score_row(suite: RewardSuite, prompts: Sequence[Prompt], number: int) -> None:
    prompt = prompts[number]
    columns = {name: [prompt.columns.get(name, ABSENT)] for name in column_names(prompts)}
    suite.check_columns(columns)
    try:
        suite.score([make_rollout(prompt, reference_of(prompt) or prompt.text)], columns | {"prompt": [prompt.prompt]})
    except RewardError as error:
        lacks = [name for name, (value,) in columns.items() if name != "prompt" and _nothing(value)]
        without = f", which has nothing in {', '.join(map(repr, lacks))}" if lacks else ""
        raise RewardError(f"tried on row {number + 1:,} of {len(prompts):,}{without}: {error}") from error


def _differing_rows(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the first prompt with a value and of the first without one, for each column."""
    first: dict[tuple[str, bool], int] = {}
    names = [name for name in column_names(prompts) if name != "prompt"]
    for number, prompt in enumerate(prompts):
        for column in names:
            first.setdefault((column, _nothing(prompt.columns.get(column, ABSENT))), number)
    return sorted({0, *first.values()})


def _nothing(value: object) -> bool:
    return value is None or value is ABSENT or value == []
