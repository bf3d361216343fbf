"""A set of rewards that scores rollouts: arguments in, a value and a status for every completion out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.calls.background import submit
from rlseq.scoring.calls.isolation import random_states_held, without_holding
from rlseq.scoring.calls.runner import Reward
from rlseq.scoring.outcome import FAILURES, LARGEST, TOKEN_REWARDS, Outcome, shorten
from rlseq.scoring.reward import CorpusMetric, Ratio
from rlseq.scoring.signatures import Rows
from rlseq.scoring.table import ScoreTable, weighted_sum
from rlseq.types import Rollout, ScoredRollout


@dataclass(frozen=True)
class PendingScores:
    """The futures of rewards that score in the background, by name; made by `RewardSuite.submit`."""

    rollouts: list[Rollout]
    outcomes: Mapping[str, Future] = field(default_factory=dict)


class RewardSuite:
    """Rewards, their weights, and the one way to call them; made by `load_rewards`.

    Attributes:
        rewards: the loaded rewards.
        names: a unique series name for each.
        weights: a weight for each.
        specs: what each was loaded from; None where it was not loaded.
        corpus: corpus metrics by name, each knowing its reward's series name. A metric name met twice becomes
            `<reward>.<metric>`.
        max_error_rate: the largest share of a step (one `score` call, over all processes) that may fail, for each
            reward.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float], max_error_rate: float = 0.05):
        self.rewards = list(rewards)
        self.names = [reward.name for reward in rewards]
        self.weights = list(weights)
        self.specs: list[Any] = [None] * len(self.rewards)
        self.max_error_rate = max_error_rate
        self._held_states = contextlib.ExitStack()  # restores the random states that `submit` holds
        self.corpus: dict[str, CorpusMetric | Ratio] = {}
        for reward in rewards:
            for metric, definition in reward.info.corpus.items():
                key = f"{reward.name}.{metric}" if metric in self.corpus else metric
                said = definition.description
                description = said(**reward.kwargs) if callable(said) else said
                self.corpus[key] = dataclasses.replace(definition, reward=reward.name, description=description)
        _validate_share_names("reward", self.names, "failed")
        _validate_share_names("corpus metric", self.corpus, "present")

    def with_think_end(self, think_end: str | None) -> RewardSuite:
        """The same rewards where `think_end` ends a thought; None: as they are."""
        if think_end is None or all(reward.think_end == think_end for reward in self.rewards):
            return self
        suite = copy.copy(self)
        suite.rewards = [dataclasses.replace(reward, think_end=think_end) for reward in self.rewards]
        return suite

    def __enter__(self) -> RewardSuite:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; they start again when needed, and end by themselves with this process."""
        for reward in self.rewards:
            reward.close()

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise RewardError, listing the columns, if a reward asks for what is neither a field nor a column."""
        available = list(available)
        for reward in self.rewards:
            reward.check_columns(available)

    def fingerprint(self) -> dict[str, Any]:
        """By name, everything that decides a reward's values, with hashes of code and files."""
        return {
            reward.name: {
                "weight": weight,
                "kwargs": dict(reward.kwargs),
                "columns": dict(reward.columns),
                **({"where": {column: list(of) for column, of in reward.where.items()}} if reward.where else {}),
                "scope": reward.info.scope,
                "on_error": reward.on_error,
                **({"think_end": reward.think_end} if reward.reads_thoughts else {}),
                "code": reward.code,
                **({"files": needed} if (needed := reward.needed()) else {}),
            }
            for reward, weight in zip(self.rewards, self.weights, strict=True)
        }

    def submit(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Sequence[Any]], context: Any = None
    ) -> PendingScores:
        """Let rewards in worker processes and on an event loop score N rollouts in the background.

        Takes the arguments of `score`, which takes the result and raises what went wrong. If one of them runs in this
        process, the random states are held until then.
        """
        self._held_states.close()
        rollouts = list(rollouts)
        apart = [reward for reward in self.rewards if reward.executor.in_background]
        if not apart or not rollouts or "prompt" not in columns:
            return PendingScores(rollouts)
        rows = Rows(rollouts, columns)
        if any(reward.executor.uses_rng for reward in apart):
            self._held_states.enter_context(random_states_held())
        acts = {reward.name: partial(without_holding, partial(reward.outcomes, rows, context)) for reward in apart}
        return PendingScores(rollouts, {name: submit(act) for name, act in acts.items()})

    def score(
        self,
        rollouts: Sequence[Rollout],
        columns: Mapping[str, Sequence[Any]],
        context: Any = None,
        *,
        gather: Callable[[Any], list[Any]] | None = None,
        pending: PendingScores | None = None,
        absent: Collection[str] = (),
    ) -> ScoreTable:
        """Score N rollouts.

        Args:
            rollouts: N rollouts. Rewards of scope "group" need all G samples of each prompt among them.
            columns: lists of N values by column name, with `prompt` (as the user wrote it) among them.
            context: for TRL's batch signature, an object with `trainer_state`, `log_extra` and `log_metric`.
            gather: where several processes each score a part of a step: hands a small picklable object to all
                of them and returns everybody's, in the same order everywhere (with accelerate,
                `lambda mine: gather_object([mine])`). It is called exactly once, also where scoring fails here;
                `max_error_rate` is then judged over all parts, and an error in one process is raised in all.
            pending: what `submit` returned for these rollouts; the rewards in it are waited for, not called.
            absent: fields that the rollouts were read without, which no reward then gets.

        Raises:
            RewardError: a reward failed and its `on_error` is "raise"; a batch function returned a wrong number
                of values; more than `max_error_rate` of the rows failed; or the columns do not fit.
        """
        rollouts = list(rollouts)
        futures = {} if pending is None else pending.outcomes
        with self._held_states:
            wait(
                [futures[reward.name] for reward in self.rewards if reward.name in futures and reward.executor.uses_rng]
            )
        outcomes: list[list[Outcome]] = []
        trouble: Exception | None = None
        try:
            rows = Rows(rollouts, columns, absent)
            self._check_lengths(rows)
            if rollouts:
                self.check_columns(columns)
            if pending is not None and pending.rollouts != rollouts:
                futures = {}
            outcomes = [
                futures[reward.name].result() if reward.name in futures else reward.outcomes(rows, context)
                for reward in self.rewards
            ]
            self._check_sums(outcomes)
        except Exception as error:
            if gather is None:
                raise
            trouble = error
        mine = (
            None if trouble is None else str(trouble) or type(trouble).__name__,
            [_failures(column, rollouts) for column in outcomes],
        )
        reports = [mine] if gather is None else gather(mine)
        if trouble is not None:
            raise trouble
        for elsewhere, _ in reports:
            if elsewhere is not None:
                raise RewardError(elsewhere)
        self._judge([failures for _, failures in reports])
        return self._table(rollouts, outcomes)

    def _judge(self, parts: Sequence[Sequence[_Failures]]) -> None:
        """Stop on a broken reward. One failure alone does not show that, unless none is allowed."""
        for name, mine in zip(self.names, zip(*parts, strict=True), strict=True):
            failed, count = sum(part.failed for part in mine), sum(part.scored for part in mine)
            if failed > self.max_error_rate * count and (failed > 1 or self.max_error_rate == 0):
                first = next(part.first for part in mine if part.failed)
                raise RewardError(
                    f"reward {name!r} failed on {failed} of {count} completions, more than max_error_rate = "
                    f"{self.max_error_rate:g} allows. The first: {first}. Fix the reward (`rlseq reward check`), or "
                    "raise max_error_rate."
                )

    def token_rewards(self, scored: ScoredRollout) -> list[float]:
        """Spread a rollout's reward over its T tokens: T numbers whose sum is the reward (`scored.total`).

        A function that gave one value per token keeps each on its token; the value of any other is put on the last
        token. Weights and abstentions count as in the sum.

        Raises:
            ValueError: the reward is None, or there is no token to put a value on.
        """
        if scored.total is None:
            raise ValueError("every reward abstained on this rollout; it has no rewards to spread")
        length = len(scored.rollout.completion_ids)
        present = [
            (name, weight, value)
            for name, weight in zip(self.names, self.weights, strict=True)
            if (value := scored.values[name]) is not None
        ]
        everything, there = sum(map(abs, self.weights)), sum(abs(weight) for _, weight, _ in present)
        scale = everything / there if there else 0.0
        spread = [0.0] * length
        for name, weight, value in present:
            per_token = scored.details[name].get(TOKEN_REWARDS)
            if per_token is not None:
                for place, part in enumerate(per_token):
                    spread[place] += scale * weight * part
            elif length:
                spread[-1] += scale * weight * value
            elif value:
                raise ValueError(f"reward {name!r} gave {value} for a completion without tokens")
        return spread

    def _check_lengths(self, rows: Rows) -> None:
        if "prompt" not in rows.columns:
            given = ", ".join(rows.columns) or "none"
            raise RewardError(
                f"columns are {given}; expected 'prompt' among them.{did_you_mean('prompt', rows.columns)}"
            )
        for name, values in rows.columns.items():
            if len(values) != len(rows.rollouts):
                raise RewardError(
                    f"column {name!r} has {len(values)} values for {len(rows.rollouts)} rollouts; expected one value "
                    "per rollout (repeat a prompt's value for each of its samples)."
                )

    def _check_sums(self, outcomes: list[list[Outcome]]) -> None:
        """Raise RewardError for weights under which allowed values have a sum that is too large."""
        for row in zip(*outcomes, strict=True):
            total = weighted_sum([outcome.value for outcome in row], self.weights)
            if total is not None and not abs(total) <= LARGEST:
                weights = ", ".join(f"{name} {weight:g}" for name, weight in zip(self.names, self.weights, strict=True))
                raise RewardError(
                    f"the reward of a completion, the weighted sum, is {total:g}, which training cannot compute with; "
                    f"expected at most {LARGEST:g} in size. Lower the weights: {weights}"
                )

    def _table(self, rollouts: list[Rollout], outcomes: list[list[Outcome]]) -> ScoreTable:
        scored = []
        for row, rollout in enumerate(rollouts):
            mine = {name: column[row] for name, column in zip(self.names, outcomes, strict=True)}
            scored.append(
                ScoredRollout(
                    rollout,
                    {name: outcome.value for name, outcome in mine.items()},
                    {name: outcome.status for name, outcome in mine.items()},
                    weighted_sum([outcome.value for outcome in mine.values()], self.weights),
                    {name: outcome.details for name, outcome in mine.items()},
                )
            )
        messages = {
            name: {row: outcome.message for row, outcome in enumerate(column) if outcome.message}
            for name, column in zip(self.names, outcomes, strict=True)
        }
        return ScoreTable(self.names, scored, messages)


class _Failures(NamedTuple):
    """How one reward failed on one process's part of a step: what the processes exchange."""

    failed: int
    scored: int
    first: str


def _failures(outcomes: Sequence[Outcome], rollouts: Sequence[Rollout]) -> _Failures:
    failed = [row for row, outcome in enumerate(outcomes) if outcome.status in FAILURES]
    first = describe(rollouts[failed[0]], outcomes[failed[0]]) if failed else ""
    return _Failures(len(failed), len(outcomes), first)


def describe(rollout: Rollout, outcome: Outcome) -> str:
    """One failed completion, for an error message."""
    return (
        f"{outcome.status}: {outcome.message}, on prompt {rollout.prompt_key!r}, sample {rollout.sample}, completion "
        f"{shorten(rollout.text)}"
    )


def _validate_share_names(what: str, names: Collection[str], share: str) -> None:
    """Raise RewardError for a name that the evaluation gives to a share of completions under another of these names."""
    for name in names:
        if f"{name}/{share}" in names:
            raise RewardError(
                f"the {what} {name + '/' + share!r} has the name of a number of the {what} {name!r}: the share of "
                f"completions {'it failed on' if share == 'failed' else 'whose details it is of'}. Give one of them "
                "another name."
            )
