"""One loaded reward: its options, and how its calls are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RewardError, did_you_mean
from .find import find
from .forms import (
    CONTEXT,
    FIELDS,
    FORMS_HELP,
    Call,
    Parameters,
    Rows,
    make_calls,
    missing_columns,
    parameters_of,
    tell_form,
)
from .outcome import (
    FAILURES,
    NO_DETAILS,
    Outcome,
    interpret,
    interpret_many,
    interpret_reward_dict,
    interpret_score_dict,
    shorten,
)
from .reward import SCOPES, RewardInfo, info_of

ON_ERROR = ("raise", "abstain", "floor")


@dataclass(frozen=True)
class Reward:
    """A reward function with the options of its spec; see docs/rewards.md for what each does."""

    name: str
    function: Callable
    form: str
    parameters: Parameters
    info: RewardInfo
    address: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    on_error: str = "raise"
    floor: float | None = None

    def renamed(self, name: str) -> Reward:
        return self if name == self.name else dataclasses.replace(self, name=name)

    def close(self) -> None:
        """End what runs outside this process."""

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise RewardError if the reward asks for what is neither a field nor one of these columns."""
        available = list(available)
        for parameter, column in self.columns.items():
            if column not in available:
                raise RewardError(
                    f"reward {self.name!r}: columns maps {parameter!r} to {column!r}, which is no column."
                    f"{did_you_mean(column, available)} The columns are {', '.join(available)}."
                )
        given = [*self.kwargs, *self.columns]
        missing = missing_columns(self.form, self.parameters, given, available)
        if missing:
            near = "".join(did_you_mean(name, [*available, *FIELDS, "prompt"]) for name in missing[:1])
            raise RewardError(
                f"reward {self.name!r} asks for {', '.join(map(repr, missing))}, which is neither a column "
                "nor a field."
                f"{near} The columns are {', '.join(available) or 'none'}; the fields are prompt, "
                f"{', '.join(FIELDS)}. Map "
                f"a column to it with columns: {{{missing[0]}: COLUMN}} in the reward's spec, or give it in "
                "kwargs."
            )

    def outcomes(self, rows: Rows, context: Any = None) -> list[Outcome]:
        """Score all rows: one `Outcome` each, in order, `on_error` applied.

        Raises:
            RewardError: under `on_error: raise`, for the first failure; always, for a wrong number of values.
        """
        if self.columns:
            mapped = {parameter: rows.columns[column] for parameter, column in self.columns.items()}
            rows = Rows(rows.rollouts, {**rows.columns, **mapped})
        calls = self.calls(rows, context)
        results: list[Outcome | None] = [None] * len(rows.rollouts)
        for (indices, _), raw in zip(calls, map(self.call, calls), strict=True):
            for row, outcome in zip(indices, self.read(raw, len(indices)), strict=True):
                results[row] = outcome
        return self.settle(results, rows)

    def calls(self, rows: Rows, context: Any = None, split: bool = False) -> list[Call]:
        """The calls that score these rows; see `forms.make_calls`."""
        if not rows.rollouts:
            return []
        extras = (
            {name: getattr(context, name, None) for name in CONTEXT} if context is not None else NO_CONTEXT
        )
        return make_calls(
            self.form, self.parameters, self.info, rows, kwargs=self.kwargs, split=split, context=extras
        )

    def call(self, call: Call) -> Any:
        """Make one call; what it raises becomes a `Failed`."""
        try:
            return self.function(**call[1])
        except (Exception, SystemExit) as error:
            return Failed("error", f"{type(error).__name__}: {error}", error)

    def read(self, raw: Any, count: int) -> list[Outcome]:
        """Turn what a call gave into one `Outcome` for each of its rows."""
        if type(raw) is Failed:
            return [Outcome(None, raw.status, NO_DETAILS, raw.message)] * count
        if self.form == "single":
            return [interpret(raw)]
        if self.form == "verl":
            return [interpret_score_dict(raw)]
        if self.form == "openrlhf":
            return interpret_reward_dict(raw, count, self.name)
        return interpret_many(raw, count, self.name)

    def settle(self, outcomes: list[Outcome], rows: Rows) -> list[Outcome]:
        """Apply `on_error` to the failures."""
        for row, outcome in enumerate(outcomes):
            if outcome.status not in FAILURES:
                continue
            if self.on_error == "raise":
                rollout = rows.rollouts[row]
                raise RewardError(
                    f"reward {self.name!r} {WHAT[outcome.status]}: {outcome.message}\n  prompt "
                    f"{rollout.prompt_key!r}, "
                    f"sample {rollout.sample}\n  completion {shorten(rollout.text)}\nFix the reward, or "
                    "choose "
                    "on_error: abstain (leave such completions out) or on_error: floor (give them the lowest "
                    "value)."
                )
            outcomes[row] = outcome._replace(value=self.floor if self.on_error == "floor" else None)
        return outcomes


WHAT = {"error": "raised", "timeout": "did not return in time", "invalid": "gave no usable value"}


@dataclass(frozen=True)
class Failed:
    """A call that gave nothing: its status and what happened."""

    status: str
    message: str
    cause: BaseException | None = None


def _log_nothing(*arguments: Any, **more: Any) -> None:
    """What `log_extra` and `log_metric` are outside a trainer."""


NO_CONTEXT = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}

OPTIONS = ("func", "name", "weight", "kwargs", "columns", "scope", "on_error", "floor")


def reward_from_spec(spec: Any, search_root: Path) -> Reward:
    """Load one reward from a string, a function or a mapping of options.

    Raises:
        RewardError: an unknown option or value, or a reward that is not found or fits no form.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"func": spec}
    for option in options:
        if option not in OPTIONS:
            raise RewardError(
                f"reward spec {spec!r} has the option {option!r}.{did_you_mean(option, OPTIONS)} Expected "
                "some of "
                f"{', '.join(OPTIONS)}."
            )
    func = options.get("func")
    if not ((isinstance(func, str) and func) or callable(func)):
        raise RewardError(
            f"reward spec {spec!r} has no 'func'; expected a name, path.py:function, or a model id."
        )
    found = find(func, search_root)
    name = options.get("name") or found.name
    info = info_of(found.function)
    scope = _choice("scope", options.get("scope", info.scope), SCOPES, name)
    info = dataclasses.replace(info, scope=scope)
    parameters = parameters_of(found.function)
    form = tell_form(parameters, name)
    if scope == "group" and form in ("single", "verl"):
        raise RewardError(
            f"reward {name!r} has scope 'group', but takes one completion at a time. A group reward takes "
            "lists: "
            f"f(completions, **columns) -> list of numbers.\n{FORMS_HELP}"
        )
    kwargs = {**found.kwargs, **_mapping("kwargs", options.get("kwargs"), name)}
    for key in kwargs:
        if not parameters.takes_any and key not in parameters.named:
            raise RewardError(
                f"reward {name!r} takes no argument {key!r}.{did_you_mean(key, parameters.named)} It takes "
                f"{', '.join(parameters.named)}."
            )
    on_error = _choice("on_error", options.get("on_error", "raise"), ON_ERROR, name)
    floor = options.get("floor", info.range[0] if info.range else None)
    if on_error == "floor" and not isinstance(floor, (int, float)):
        raise RewardError(
            f"reward {name!r} has on_error: floor, but states no range; give floor: NUMBER, or mark the "
            "function with "
            "@reward(range=(lowest, highest))."
        )
    return Reward(
        name=name,
        function=found.function,
        form=form,
        parameters=parameters,
        info=info,
        address=found.address,
        kwargs=kwargs,
        columns=_mapping("columns", options.get("columns"), name),
        on_error=on_error,
        floor=floor,
    )


def _choice(option: str, given: Any, valid: tuple[str, ...], name: str) -> str:
    if given not in valid:
        raise RewardError(
            f"reward {name!r}: {option} is {given!r}; expected "
            f"{', '.join(valid)}.{did_you_mean(str(given), valid)}"
        )
    return given


def _mapping(option: str, given: Any, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RewardError(f"reward {name!r}: {option} is {given!r}; expected a mapping of names to values.")
    return dict(given)
