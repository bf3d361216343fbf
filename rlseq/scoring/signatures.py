"""The signatures that a reward may have, detected by parameter names, and the arguments each is called with.

    one at a time   f(completion, **fields and columns) -> number | None | one number per token | (these, dict)
    TRL's batch     f(prompts, completions, completion_ids, **columns) -> list of those
    verl's          compute_score(data_source, solution_str, ground_truth, extra_info=None) -> number | dict
    OpenRLHF's      reward_func(queries, prompts, labels) -> tensor | dict
    verifiers'      f(completion, **fields and columns), where `completion` is read as a list of messages

A *call* is (row indices, keyword arguments). One-at-a-time, verl's and verifiers' functions are called for each row;
the two batch functions for all rows, for each group, or (under `split`) for each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.calls.copies import as_messages
from rlseq.scoring.reward import RewardInfo
from rlseq.scoring.thoughts import THOUGHT_FIELDS
from rlseq.types import ABSENT, Rollout

Call = tuple[Sequence[int], dict[str, Any]]

SIGNATURES_HELP = """\
  one at a time   f(completion, **any dataset column or field) -> number | None | one number per token | (these, dict)
  TRL's batch     f(prompts, completions, completion_ids, **columns) -> list of these
  verl's          compute_score(data_source, solution_str, ground_truth, extra_info=None) -> number | dict
  OpenRLHF's      reward_func(queries, prompts, labels) -> tensor | dict
  verifiers'      f(completion, **columns), with completion read as a list of messages"""

# What a reward may ask for by name. A column of the same name wins, except over the reserved ones.
FIELDS: dict[str, Callable[[Rollout], Any]] = {
    "completion": lambda rollout: rollout.text,
    "completion_ids": lambda rollout: list(rollout.completion_ids),
    "raw_completion": lambda rollout: rollout.text_with_special_tokens,
    "finish_reason": lambda rollout: rollout.finish_reason,
    "messages": lambda rollout: as_messages(rollout.messages),
    "logprobs": lambda rollout: list(rollout.logprobs),
    "prompt_key": lambda rollout: rollout.prompt_key,
    "sample": lambda rollout: rollout.sample,
}
RESERVED = ("prompt", "completion", "completion_ids", "raw_completion", "finish_reason")
# What a column cannot replace, and the one pair of `columns` that says how it is passed.
SAMPLED = frozenset(
    ("completion", "completions", "completion_ids", "raw_completion", "finish_reason", "solution_str", "queries")
)
AS_MESSAGES = ("completion", "messages")
ONE_AT_A_TIME = ("single", "verl", "verifiers")
CONTEXT = ("trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a reward: those it must get, those it may get, and whether it takes any name."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool

    @property
    def named(self) -> tuple[str, ...]:
        return self.required + self.optional


def parameters_of(function: Callable) -> Parameters:
    """Read a function's parameters. Rewards are called by name, so none may be positional-only.

    Raises:
        RewardError: for positional-only parameters, or a callable without a readable signature.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RewardError(f"{function!r} has no readable signature: {error}. Wrap it in a def.") from error
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise RewardError(f"{function!r} has positional-only parameters; rewards are called by name.")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters(
        required=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def detect_signature(parameters: Parameters, name: str) -> str:
    """Return "single", "batch", "verl" or "openrlhf".

    Raises:
        RewardError: listing the signatures, when the parameter names match none.
    """
    names = set(parameters.named)
    if "solution_str" in names:
        return "verl"
    if "queries" in names:
        return "openrlhf"
    both = names & {"completions", "prompts"}
    if "completion" in names and both:
        raise RewardError(
            f"reward {name!r} asks for 'completion', of one row, and for {', '.join(sorted(both))}, of many; keep one "
            f"kind.\n{SIGNATURES_HELP}"
        )
    if both:
        return "batch"
    if "completion_ids" in names and parameters.takes_any and "completion" not in names:
        return "batch"  # TRL's documented f(completion_ids, **kwargs)
    if names & {"completion", *FIELDS}:
        return "single"
    given = ", ".join([*parameters.named, *["**any name"] * parameters.takes_any]) or "no parameters"
    near = [did_you_mean(n, ("completion", "completions", "solution_str", "queries")) for n in parameters.named]
    if names & {*THOUGHT_FIELDS} and not any(near):
        return "single"
    raise RewardError(
        f"reward {name!r} takes ({given}), which matches no signature of a reward.{next(filter(None, near), '')} "
        f"A reward is one of\n{SIGNATURES_HELP}"
    )


def missing_columns(
    signature: str, parameters: Parameters, given: Iterable[str], available: Iterable[str]
) -> list[str]:
    """Names that a reward requires and that are neither a field nor a keyword argument of its spec nor a column."""
    have = {*given, *available, *FIELDS, "prompt"}
    if signature == "batch":
        have |= {"prompts", "completions", *CONTEXT}
    elif signature == "verl":
        have |= {"solution_str", "data_source", "extra_info"}
        if "reward_model" in have:
            have.add("ground_truth")
    elif signature == "openrlhf":
        have |= {"queries", "prompts"}
        if "label" in have:
            have.add("labels")
    return [name for name in parameters.required if name not in have]


@dataclass(frozen=True)
class Rows:
    """N rollouts and the columns of their prompts: lists of N values, `prompt` among them.

    `absent` are fields that the rollouts were read without; no reward gets them. With `think_end` there are the fields
    `thought` and `answer`; a column of the same name wins (`Reward.check_columns` refuses what is ambiguous).
    """

    rollouts: Sequence[Rollout]
    columns: Mapping[str, Sequence[Any]]
    absent: Collection[str] = ()
    think_end: str | None = None

    def values(self, name: str) -> Sequence[Any]:
        """The N values of a field or column."""
        if self.think_end is not None and name in THOUGHT_FIELDS and name not in self.columns:
            part = THOUGHT_FIELDS[name]
            return [part(rollout.text, self.think_end) for rollout in self.rollouts]
        if name in FIELDS and name not in self.absent and (name in RESERVED or name not in self.columns):
            read = FIELDS[name]
            return [read(rollout) for rollout in self.rollouts]
        return list(map(as_messages, self.columns[name])) if name == "prompt" else self.columns[name]

    def knows(self, name: str) -> bool:
        split = self.think_end is not None and name in THOUGHT_FIELDS
        return name in self.columns or split or (name in FIELDS and name not in self.absent)

    def prompt_texts(self) -> list[str]:
        """The prompts as text; for chat data, the contents of the messages, one per line."""
        return [
            p if isinstance(p, str) else "\n".join(str(message.get("content", "")) for message in p)
            for p in self.columns["prompt"]
        ]

    def completions(self, as_text: bool) -> list[Any]:
        """The completions: text, or (as TRL hands them over) message lists for chat data."""
        if as_text:
            return [rollout.text for rollout in self.rollouts]
        return [r.text if r.messages is None else as_messages(r.messages) for r in self.rollouts]

    def replies(self) -> list[list[Any]]:
        """The completions as messages of the assistant, for text data, too."""
        alone = [[{"role": "assistant", "content": rollout.text}] for rollout in self.rollouts]
        said = [as_messages(rollout.messages) for rollout in self.rollouts]
        return [one if turns is None else turns for one, turns in zip(alone, said, strict=True)]

    def groups(self) -> list[list[int]]:
        """Row indices by prompt; a prompt met twice with the same sample number makes two groups."""
        seen: dict[tuple[str, int], int] = {}
        groups: dict[tuple[str, int], list[int]] = {}
        for row, rollout in enumerate(self.rollouts):
            turn = seen[rollout.prompt_key, rollout.sample] = seen.get((rollout.prompt_key, rollout.sample), -1) + 1
            groups.setdefault((rollout.prompt_key, turn), []).append(row)
        return list(groups.values())


def make_calls(
    signature: str,
    parameters: Parameters,
    info: RewardInfo,
    rows: Rows,
    *,
    kwargs: Mapping[str, Any],
    split: bool = False,
    context: Mapping[str, Any] | None = None,
) -> list[Call]:
    """Return the calls that score all rows; `split` calls batch functions of scope "sample" with one row
    at a time."""
    read = {"single": _single, "batch": _batch, "verl": _verl, "openrlhf": _openrlhf, "verifiers": _verifiers}[
        signature
    ]
    lists = {name: values for name, values in read(parameters, info, rows).items() if name not in kwargs}
    if signature in ONE_AT_A_TIME:
        names = tuple(lists)
        if not names:
            return [((row,), dict(kwargs)) for row in range(len(rows.rollouts))]
        if any(value is ABSENT for values in lists.values() for value in values):
            return [
                ((row,), {**_there(dict(zip(names, values, strict=True)), parameters), **kwargs})
                for row, values in enumerate(zip(*lists.values(), strict=True))
            ]
        return [
            ((row,), {**dict(zip(names, values, strict=True)), **kwargs})
            for row, values in enumerate(zip(*lists.values(), strict=True))
        ]
    if info.scope == "group":
        index_sets: list[Sequence[int]] = list(rows.groups())
    elif split and info.scope == "sample":
        index_sets = [(row,) for row in range(len(rows.rollouts))]
    else:
        index_sets = [range(len(rows.rollouts))]
    extra = (
        {**(context or {}), **kwargs}
        if parameters.takes_any
        else {name: value for name, value in {**(context or {}), **kwargs}.items() if name in parameters.named}
    )
    return [
        (indices, {name: [_or_none(values[i]) for i in indices] for name, values in lists.items()} | extra)
        for indices in index_sets
    ]


def _there(arguments: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    """The arguments that a row has: a parameter's default holds where it lacks the column, None where there is none."""
    return {
        name: _or_none(value) for name, value in arguments.items() if value is not ABSENT or name in parameters.required
    }


def _or_none(value: Any) -> Any:
    """A value in a list of many rows, where a lacking one is None, as TRL gives it."""
    return None if value is ABSENT else value


def _wanted(parameters: Parameters, rows: Rows, fields: Iterable[str] = FIELDS) -> list[str]:
    if parameters.takes_any:
        return list(dict.fromkeys([*fields, *parameters.named, *rows.columns]))
    return list(parameters.named)


def _single(parameters: Parameters, info: RewardInfo, rows: Rows) -> dict[str, Sequence[Any]]:
    return {name: rows.values(name) for name in _wanted(parameters, rows) if rows.knows(name)}


def _verifiers(parameters: Parameters, info: RewardInfo, rows: Rows) -> dict[str, Sequence[Any]]:
    return {**_single(parameters, info, rows), "completion": rows.replies()}


def _batch(parameters: Parameters, info: RewardInfo, rows: Rows) -> dict[str, Sequence[Any]]:
    made = {
        "prompts": lambda: rows.values("prompt"),
        "completions": lambda: rows.completions(as_text=info.marked),
    }
    names = _wanted(parameters, rows, ("prompts", "completions", "completion_ids"))
    # TRL passes every column but these three to **kwargs
    names = [n for n in names if n in parameters.named or n not in ("prompt", "completion")]
    return {
        name: made[name]() if name in made else rows.values(name) for name in names if name in made or rows.knows(name)
    }


def _verl(parameters: Parameters, info: RewardInfo, rows: Rows) -> dict[str, Sequence[Any]]:
    lists: dict[str, Sequence[Any]] = {"solution_str": rows.completions(as_text=True)}
    if "data_source" not in rows.columns:
        lists["data_source"] = [""] * len(rows.rollouts)
    if "ground_truth" not in rows.columns and "reward_model" in rows.columns:
        lists["ground_truth"] = [
            ABSENT if value is ABSENT else value["ground_truth"] for value in rows.columns["reward_model"]
        ]
    if "extra_info" not in rows.columns:
        lists["extra_info"] = [None] * len(rows.rollouts)
    four = ("data_source", "ground_truth", "extra_info")
    lists |= {name: rows.values(name) for name in (*four, *parameters.named) if name not in lists and rows.knows(name)}
    return {
        name: values
        for name, values in lists.items()
        if name in parameters.named or (name in four and parameters.takes_any)
    }


def _openrlhf(parameters: Parameters, info: RewardInfo, rows: Rows) -> dict[str, Sequence[Any]]:
    prompts = rows.prompt_texts()
    lists: dict[str, Sequence[Any]] = {
        "queries": [
            prompt + rollout.text_with_special_tokens for prompt, rollout in zip(prompts, rows.rollouts, strict=True)
        ],
        "prompts": prompts,
    }
    if "labels" in rows.columns or "label" in rows.columns:
        lists["labels"] = rows.columns["labels" if "labels" in rows.columns else "label"]
    lists |= {name: rows.values(name) for name in parameters.named if name not in lists and rows.knows(name)}
    return {n: v for n, v in lists.items() if n in parameters.named or parameters.takes_any}
