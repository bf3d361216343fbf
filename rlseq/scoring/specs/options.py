"""The options of a reward spec, checked, and the reward they make."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.common.passwords import ADVICE, holds_password
from rlseq.errors import RewardError, did_you_mean
from rlseq.scoring.cache import Cache, default_path
from rlseq.scoring.calls.execute import Concurrent, InProcess, Retry, is_async
from rlseq.scoring.calls.isolation import kept_settings
from rlseq.scoring.calls.runner import Executor, Reward
from rlseq.scoring.calls.workers import WorkerPool
from rlseq.scoring.reward import SCOPES, RewardInfo, info_of
from rlseq.scoring.signatures import (
    AS_MESSAGES,
    ONE_AT_A_TIME,
    SAMPLED,
    SIGNATURES_HELP,
    Parameters,
    detect_signature,
    parameters_of,
)
from rlseq.scoring.specs.conventions import reads_messages
from rlseq.scoring.specs.find import Found, find
from rlseq.scoring.specs.fingerprint import code_hash, needed_files

OPTIONS = (
    "func",
    "name",
    "weight",
    "kwargs",
    "columns",
    "where",
    "scope",
    "on_error",
    "floor",
    "timeout",
    "workers",
    "concurrency",
    "retries",
    "cache",
)
ON_ERROR = ("raise", "abstain", "floor")


def reward_from_spec(spec: Any, search_root: Path) -> Reward:
    """Load one reward from a string, a function or a mapping of options (docs/rewards.md lists them).

    Raises:
        RewardError: an unknown option or value, or a reward that is not found or matches no signature.
    """
    options = _checked_options(spec)
    with kept_settings(advance=False):
        found = find(options["func"], search_root)
    name = options.get("name") or found.name
    if isinstance(found.function, type):
        raise RewardError(
            f"reward {name!r} is a class; expected a function, or an instance whose __call__ is a reward. "
            f"Name an instance: `my_reward = {found.function.__name__}(...)` in the file, and that name in the spec."
        )
    info = info_of(found.function)
    info = dataclasses.replace(info, scope=_choice(name, "scope", options.get("scope", info.scope), SCOPES))
    parameters = parameters_of(found.function)
    columns = _mapping(name, "columns", options.get("columns"))
    signature = _signature(name, found.function, info, parameters, columns)
    if info.scope == "group" and signature in ONE_AT_A_TIME:
        raise RewardError(
            f"reward {name!r} has scope 'group', but takes one completion at a time. A group reward takes lists: "
            f"f(completions, **columns) -> list of numbers.\n{SIGNATURES_HELP}"
        )
    on_error = _choice(name, "on_error", options.get("on_error", "raise"), ON_ERROR)
    cache = _cache(name, options.get("cache", False), search_root)
    executor = _executor(name, found, options)
    kwargs = _kwargs(name, found, options.get("kwargs"), parameters)
    return Reward(
        name=name,
        function=found.function,
        signature=signature,
        parameters=parameters,
        info=info,
        executor=executor,
        code=code_hash(found.function),
        files=needed_files(found.function, kwargs),
        split=cache is not None or not isinstance(executor, InProcess),
        kwargs=kwargs,
        columns=columns,
        where=_where(name, options.get("where")),
        on_error=on_error,
        floor=_floor(name, on_error, options.get("floor"), info),
        cache=cache,
    )


def parse_spec(spec: Any) -> Any:
    """A spec as given; a JSON mapping of options, as the command line has it, as that mapping.

    Raises:
        RewardError: it starts like JSON, but is not valid JSON.
    """
    if not isinstance(spec, str) or not spec.lstrip().startswith("{"):
        return spec
    try:
        return dict(json.loads(spec))
    except ValueError as error:
        _validate_no_passwords(spec)
        raise RewardError(f"the reward spec {spec!r} is not a JSON mapping: {error}.") from error


def _checked_options(spec: Any) -> dict[str, Any]:
    options = dict(spec) if isinstance(spec, Mapping) else {"func": spec}
    _validate_no_passwords(options)
    for option in options:
        if option not in OPTIONS:
            raise RewardError(
                f"reward spec {spec!r} has the option {option!r}.{did_you_mean(str(option), OPTIONS)} Expected some of "
                f"{', '.join(OPTIONS)}."
            )
    func = options.get("func")
    if not (callable(func) or (isinstance(func, str) and func)):
        raise RewardError(f"reward spec {spec!r} has no 'func'; expected a name, path.py:function, or a model id.")
    return options


def _signature(name: str, function: Any, info: RewardInfo, parameters: Parameters, columns: Mapping[str, Any]) -> str:
    """Detect a reward's signature. With `columns: {completion: messages}` the completion is passed as its messages."""
    signature = detect_signature(parameters, name)
    takes_one = signature == "single" and "completion" in parameters.named
    for sampled in SAMPLED.intersection(columns):
        if (sampled, columns[sampled]) != AS_MESSAGES or not takes_one:
            raise RewardError(
                f"reward {name!r}: columns maps {sampled!r}, which the model sampled; it is not a column. Only "
                "completion: messages is possible, for a reward that takes one completion and reads its messages."
            )
    if takes_one and (AS_MESSAGES in columns.items() or (not info.marked and reads_messages(function))):
        return "verifiers"
    return signature


def _validate_no_passwords(spec: Any) -> None:
    """Raise RewardError for a URL with a password or key: a run writes the spec to config.yaml, logs and model card."""
    if holds_password(spec):
        func = f" {spec['func']!r}" if isinstance(spec, Mapping) and not holds_password(spec.get("func")) else ""
        raise RewardError(
            f"the options of the reward{func} hold a password or key in a URL, which its files would show; {ADVICE}"
        )


def _executor(name: str, found: Found, options: Mapping[str, Any]) -> Executor:
    timeout = _number(name, "timeout", options.get("timeout"), above=0)
    workers = _whole(name, "workers", options.get("workers"), least=1)
    concurrency = _whole(name, "concurrency", options.get("concurrency"), least=1)
    retries = _whole(name, "retries", options.get("retries"), least=0)
    retry = None
    if is_async(found.function):
        default = Retry()
        retry = Retry(
            default.concurrency if concurrency is None else concurrency,
            default.retries if retries is None else retries,
            timeout,
        )
    elif concurrency is not None or retries is not None:
        raise RewardError(f"reward {name!r}: concurrency and retries are for async functions; use workers instead.")
    if timeout is None and workers is None:
        return Concurrent(found.function, retry) if retry else InProcess(found.function)
    if found.address is None:
        raise RewardError(
            f"reward {name!r} is a function object that no worker process can find; give it as "
            "path/to/file.py:function or package.module:function, or leave out timeout and workers."
        )
    return WorkerPool(found.address, name, workers or 1, timeout, retry, found.source)


def _cache(name: str, given: Any, search_root: Path) -> Cache | None:
    if given is None or given is False:
        return None
    if given is True:
        return Cache(default_path())
    if isinstance(given, (str, Path)):
        return Cache(search_root / Path(given).expanduser())
    raise RewardError(f"reward {name!r}: cache is {given!r}; expected true, false or the path of a file.")


def _kwargs(name: str, found: Found, given: Any, parameters: Parameters) -> dict[str, Any]:
    kwargs = {**found.kwargs, **_mapping(name, "kwargs", given)}
    for key in kwargs:
        if not parameters.takes_any and key not in parameters.named:
            raise RewardError(
                f"reward {name!r} takes no argument {key!r}.{did_you_mean(key, parameters.named)} It takes "
                f"{', '.join(parameters.named)}."
            )
    return kwargs


def _floor(name: str, on_error: str, given: Any, info: RewardInfo) -> float | None:
    floor = _number(name, "floor", given)
    if floor is None and info.range:
        floor = float(info.range[0])
    if on_error == "floor" and (floor is None or not math.isfinite(floor)):
        raise RewardError(
            f"reward {name!r} has on_error: floor, but states no lowest value; give floor: NUMBER, or mark the "
            "function with @reward(range=(lowest, highest))."
        )
    return floor


def _choice(name: str, option: str, given: Any, valid: tuple[str, ...]) -> str:
    if given not in valid:
        near = did_you_mean(str(given), valid)
        raise RewardError(f"reward {name!r}: {option} is {given!r}; expected {', '.join(valid)}.{near}")
    return given


def _mapping(name: str, option: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RewardError(f"reward {name!r}: {option} is {given!r}; expected a mapping of names to values.")
    return dict(given)


def _where(name: str, given: Any) -> dict[str, tuple[Any, ...]]:
    """By column the values of the rows that a reward is for."""
    where = {
        column: tuple(values) if isinstance(values, (list, tuple)) else (values,)
        for column, values in _mapping(name, "where", given).items()
    }
    for column, values in where.items():
        if not values or any(isinstance(value, (Mapping, list, tuple, set)) for value in values):
            raise RewardError(
                f"reward {name!r}: where gives {column!r} the value {given[column]!r}; expected a text or number, or "
                "a list of them."
            )
    return where


def _number(name: str, option: str, given: Any, above: float | None = None) -> float | None:
    if given is None:
        return None
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    if not is_number or (above is not None and given <= above):
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise RewardError(f"reward {name!r}: {option} is {given!r}; expected {wanted}.")
    return float(given)


def _whole(name: str, option: str, given: Any, least: int) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise RewardError(f"reward {name!r}: {option} is {given!r}; expected a whole number of at least {least}.")
    return given
