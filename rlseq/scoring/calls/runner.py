"""One loaded reward: from rows to calls, from calls to outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.cache import Cache, key_of
from rlseq.scoring.calls.waiting import still_waiting
from rlseq.scoring.outcome import (
    ABSTAINED,
    FAILURES,
    NO_DETAILS,
    TOKEN_REWARDS,
    Failed,
    Outcome,
    in_range,
    interpret,
    interpret_many,
    interpret_reward_dict,
    interpret_score_dict,
    shorten,
    text_of,
)
from rlseq.scoring.reward import RewardInfo
from rlseq.scoring.signatures import AS_MESSAGES, CONTEXT, FIELDS, Call, Parameters, Rows, make_calls, missing_columns
from rlseq.scoring.specs.fingerprint import hub_commits
from rlseq.scoring.thoughts import THOUGHT_FIELDS


class Executor(Protocol):
    """Makes calls and returns what each gave, or a `Failed`, in order.

    Attributes:
        in_background: whether the calls are made elsewhere than on the caller's thread, which only waits.
        uses_rng: whether the calls use the random states of this process.
    """

    in_background: bool
    uses_rng: bool

    def run(self, calls: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Reward:
    """A reward function with the options of its spec; `options.reward_from_spec` makes it.

    Attributes:
        name: its series name.
        function, signature, parameters, info: the function, its kind of signature, its parameters, and what `@reward`
            says.
        executor: how its calls are made: in this process, on an event loop, or in worker processes.
        code: a hash of the function and its file.
        files: hashes of the files that also determine its values, by name.
        split: whether a batch function of scope "sample" is called with one completion at a time.
        kwargs: arguments from the spec.
        columns: {parameter: column} where the two are called differently.
        where: {column: values} of the rows that it is for; it abstains on all others, without being called.
        on_error: "raise", "abstain" or "floor"; `floor` is the value for the last.
        cache: where values are kept, if anywhere.
        think_end: the text that ends a thought in a completion, which has the fields `thought` and `answer` then.
    """

    name: str
    function: Callable
    signature: str
    parameters: Parameters
    info: RewardInfo
    executor: Executor
    code: str
    files: Mapping[str, str] = field(default_factory=dict)
    split: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    on_error: str = "raise"
    floor: float | None = None
    cache: Cache | None = None
    think_end: str | None = None

    def renamed(self, name: str) -> Reward:
        """The same reward as a series of another name."""
        return self if name == self.name else dataclasses.replace(self, name=name)

    def close(self) -> None:
        """End what runs outside this process."""
        self.executor.close()

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise RewardError if the reward asks for what is neither a field nor one of these columns."""
        available = list(available)
        for parameter, column in self.columns.items():
            if column not in available and (parameter, column) != AS_MESSAGES:
                raise RewardError(
                    f"reward {self.name!r}: columns maps {parameter!r} to {column!r}, which is not a column."
                    f"{did_you_mean(column, available)} The columns are {', '.join(available)}."
                )
        for column in self.where:
            if column not in available:
                raise RewardError(
                    f"reward {self.name!r}: where names {column!r}, which is not a column."
                    f"{did_you_mean(column, available)} The columns are {', '.join(available)}."
                )
        given = [*self.kwargs, *self.columns]
        self._check_thoughts(given, available)
        missing = missing_columns(self.signature, self.parameters, [*given, *self._thought_fields], available)
        if missing:
            near = did_you_mean(missing[0], [*available, *FIELDS, "prompt"])
            raise RewardError(
                f"reward {self.name!r} asks for {', '.join(map(repr, missing))}, which is neither a column nor a "
                f"field.{near} The columns are {', '.join(available) or 'none'}; the fields are prompt, "
                f"{', '.join(FIELDS)}. Map a column to it with columns: {{{missing[0]}: COLUMN}} in the reward's spec, "
                "or give it in kwargs."
            )

    @property
    def _thought_fields(self) -> Iterable[str]:
        return () if self.think_end is None else THOUGHT_FIELDS

    @property
    def reads_thoughts(self) -> bool:
        """Whether the reward is given a completion's thought or answer."""
        given = {*self.kwargs, *self.columns}
        return any(name in self.parameters.named and name not in given for name in self._thought_fields)

    def _check_thoughts(self, given: Collection[str], available: Collection[str]) -> None:
        """Raise RewardError if the reward asks for a thought or answer that is not there, or that a column is too."""
        asked = [name for name in THOUGHT_FIELDS if name in self.parameters.named and name not in given]
        if self.think_end is None:
            of_completion = self.signature != "single" or {*FIELDS} & {*self.parameters.named}
            required = [name for name in asked if name in self.parameters.required]
            if lacking := [name for name in required if name not in available or not of_completion]:
                raise RewardError(
                    f"reward {self.name!r} asks for {' and '.join(map(repr, lacking))}, a part of the completion: give "
                    f"--think_end, the text that ends a thought, or name a column: columns: {{{lacking[0]}: COLUMN}}."
                )
        elif both := [name for name in asked if name in available]:
            raise RewardError(
                f"reward {self.name!r} asks for {both[0]!r}, which is a column of the data and with --think_end "
                f"{self.think_end!r} a part of the completion too: give columns: {{{both[0]}: {both[0]}}} in its spec "
                "to get the column, or rename the column to get the part."
            )

    @property
    def asked(self) -> list[str]:
        """The fields and columns that the reward asks for by name."""
        made_of = {"verl": {"ground_truth": "reward_model"}, "openrlhf": {"labels": "label"}}.get(self.signature, {})
        named = [self.columns.get(name, name) for name in self.parameters.named if name not in self.kwargs]
        return [*named, *(made_of[name] for name in named if name in made_of), *self.where]

    def is_for(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row of these columns is one that the reward scores (`where`)."""
        return all(_is_one_of(columns.get(column), values) for column, values in self.where.items())

    def check_logged(self, absent: Collection[str]) -> None:
        """Raise RewardError if the reward asks by name for what a log of rollouts lacks: these fields, or a trainer."""
        lacks = {*absent, "trainer_state"}
        if self.signature == "openrlhf" and "raw_completion" in absent:
            lacks.add("queries")
        asked = [name for name in self.asked if name in lacks]
        if asked:
            raise RewardError(
                f"reward {self.name!r} asks for {', '.join(map(repr, asked))}, which these rollouts do not hold; any "
                "value would be invented. Training logs token ids, log-probs and raw text; a trainer's state is in no "
                "log. Score rollouts of such a run, or leave this reward out."
            )

    def outcomes(self, rows: Rows, context: Any = None) -> list[Outcome]:
        """Score all rows: one `Outcome` each, in order, `on_error` applied.

        Raises:
            RewardError: under `on_error: raise`, for the first failure; always, for a wrong number of
                values.
        """
        if not rows.rollouts:
            return []
        if self.where:
            return self._outcomes_where(rows, context)
        return self._outcomes(rows, context)

    def _outcomes_where(self, rows: Rows, context: Any) -> list[Outcome]:
        """`outcomes` of the rows that `where` fits; of the others, abstentions."""
        wanted = {column: rows.columns[column] for column in self.where}
        mine = [
            row
            for row in range(len(rows.rollouts))
            if self.is_for({column: values[row] for column, values in wanted.items()})
        ]
        outcomes = [ABSTAINED] * len(rows.rollouts)
        if mine:
            columns = {name: [values[row] for row in mine] for name, values in rows.columns.items()}
            chosen = dataclasses.replace(rows, rollouts=[rows.rollouts[row] for row in mine], columns=columns)
            for row, outcome in zip(mine, self._outcomes(chosen, context), strict=True):
                outcomes[row] = outcome
        return outcomes

    def _outcomes(self, rows: Rows, context: Any) -> list[Outcome]:
        if self.columns:
            pairs = [pair for pair in self.columns.items() if pair != AS_MESSAGES]
            mapped = {parameter: rows.columns[column] for parameter, column in pairs}
            rows = dataclasses.replace(rows, columns={**rows.columns, **mapped})
        rows = dataclasses.replace(rows, think_end=self.think_end)
        extras = NO_CONTEXT if context is None else {name: getattr(context, name, None) for name in CONTEXT}
        calls = make_calls(
            self.signature, self.parameters, self.info, rows, kwargs=self.kwargs, split=self.split, context=extras
        )
        lengths = [len(rollout.completion_ids) for rollout in rows.rollouts]
        outcomes: list[Outcome] = [None] * len(rows.rollouts)  # type: ignore[list-item]
        for (indices, _), answers in zip(calls, self._answers(calls, lengths), strict=True):
            for row, outcome in zip(indices, answers, strict=True):
                outcomes[row] = outcome
        return self._settle(outcomes, rows)

    def needed(self) -> dict[str, str]:
        """What decides the values besides code and arguments: `files`, and the hub commits that are known by now."""
        return {**self.files, **hub_commits(self.kwargs)}

    def _answers(self, calls: list[Call], lengths: Sequence[int]) -> list[list[Outcome]]:
        """Make the calls, or look them up; equal calls of a cached reward are made once."""
        sizes = [[lengths[row] for row in indices] for indices, _ in calls]
        if self.cache is None:
            return [self._read(raw, size) for raw, size in zip(self._make(calls), sizes, strict=True)]
        contents = [{k: v for k, v in arguments.items() if k not in CONTEXT} for _, arguments in calls]
        code = " ".join([self.code, *(f"{name} {digest}" for name, digest in self.needed().items())])
        keys = [key_of(code, content) for content in contents]
        known = self.cache.get(keys)
        # the same text may have other tokens, which cached values per token do not fit
        hits = [known.get(key) for key in keys]
        hits = [hit if hit and _fit(hit, size) else None for hit, size in zip(hits, sizes, strict=True)]
        new = {key: call for key, call, hit in zip(keys, calls, hits, strict=True) if hit is None}
        raws = dict(zip(new, self._make(list(new.values())), strict=True))
        answers = [
            self._read(raws[key], size) if hit is None else hit
            for key, size, hit in zip(keys, sizes, hits, strict=True)
        ]
        self.cache.put({key: answer for key, answer in zip(keys, answers, strict=True) if key in new})
        return answers

    def _make(self, calls: list[Call]) -> list[Any]:
        sizes = [len(indices) for indices, _ in calls]
        if not calls:
            return []
        with still_waiting(self.name, len(calls)):
            return self.executor.run([arguments for _, arguments in calls], sizes)

    def _read(self, raw: Any, lengths: Sequence[int]) -> list[Outcome]:
        if type(raw) is Failed:
            return [Outcome(None, raw.status, NO_DETAILS, raw.message)] * len(lengths)
        try:
            return self._interpret(raw, lengths)
        except RewardError:  # a wrong number of values
            raise
        except Exception as error:  # of the value itself: a sparse tensor, an object whose methods raise
            what = f"returned a {type(raw).__name__} that cannot be read: {type(error).__name__}: {text_of(error)}"
            return [Outcome(None, "invalid", NO_DETAILS, " ".join(what.split()))] * len(lengths)

    def _interpret(self, raw: Any, lengths: Sequence[int]) -> list[Outcome]:
        if self.signature in ("single", "verifiers"):
            return [interpret(raw, lengths[0])]
        if self.signature == "verl":
            return [interpret_score_dict(raw, lengths[0])]
        if self.signature == "openrlhf":
            return interpret_reward_dict(raw, lengths, self.name)
        return interpret_many(raw, lengths, self.name)

    def _settle(self, outcomes: list[Outcome], rows: Rows) -> list[Outcome]:
        """Apply `on_error` to the failures."""
        for row, outcome in enumerate(outcomes):
            outcome = in_range(outcome, self.info.range)
            if outcome.status not in FAILURES:
                continue
            if self.on_error == "raise":
                rollout = rows.rollouts[row]
                raise RewardError(
                    f"reward {self.name!r} {_WHAT[outcome.status]}: {outcome.message}\n"
                    f"  prompt {rollout.prompt_key!r}, sample {rollout.sample}\n"
                    f"  completion {shorten(rollout.text)}\n"
                    "Fix the reward, or choose on_error: abstain (leave such completions out) or on_error: floor "
                    "(give them the lowest value)."
                )
            outcomes[row] = outcome._replace(value=self.floor if self.on_error == "floor" else None)
        return outcomes


def _is_one_of(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value equals one of these; true is not 1."""
    return any(type(value) is type(one) and value == one for one in values) or (
        type(value) in (int, float) and any(type(one) in (int, float) and value == one for one in values)
    )


def _fit(outcomes: Sequence[Outcome], lengths: Sequence[int]) -> bool:
    """Whether values per token, if there are any, are as many as the tokens."""
    return all(
        TOKEN_REWARDS not in outcome.details or len(outcome.details[TOKEN_REWARDS]) == length
        for outcome, length in zip(outcomes, lengths, strict=True)
    )


_WHAT = {"error": "raised", "timeout": "did not return in time", "invalid": "gave no usable value"}


def _log_nothing(*arguments: Any, **more: Any) -> None:
    """What `log_extra` and `log_metric` are outside a trainer."""


NO_CONTEXT = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
