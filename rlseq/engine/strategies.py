"""Decoding strategies as frozen dataclasses, and the warps of the logits that they sample from.

A strategy that samples has `warp(logits) -> log-probs`: the log-probabilities of the distribution that its tokens are
sampled from, with temperature and truncation applied and renormalised. Strategies that search, or choose among samples,
have no such distribution; log-probs recorded under them are the model's own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlseq.errors import ConfigError, did_you_mean

ALTERNATIVES = "/"  # between the values of a setting that is swept
LOGPROB = "logprob"  # the value of `BestOf.by` by which the model chooses, not a reward


@dataclass(frozen=True)
class Strategy:
    """Base of the decoding strategies; `name` is how a user calls one."""

    name: ClassVar[str] = ""
    is_stochastic: ClassVar[bool] = False  # whether several completions of a prompt may differ

    @property
    def spec(self) -> str:
        """The strategy with the settings that differ from its defaults, as a user would write it."""
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @property
    def members(self) -> tuple[Strategy, ...]:
        """The strategies to choose from: the alternatives of a `Sweep`, else the strategy itself."""
        return (self,)


@dataclass(frozen=True)
class Sweep(Strategy):
    """Strategies of one kind with different numbers, of which one is chosen: `sample:temperature=0.5/0.7/1`.

    It does not decode by itself; `rlseq.evaluation.tune_decoding` chooses a member.

    Attributes:
        written: the strategy with all alternatives, its spec.
        alternatives: every combination, the settings' first numbers first.
    """

    written: str
    alternatives: tuple[Strategy, ...]

    @property
    def spec(self) -> str:
        """As a user writes it."""
        return self.written

    @property
    def members(self) -> tuple[Strategy, ...]:
        """The alternatives."""
        return self.alternatives

    @property
    def is_stochastic(self) -> bool:  # type: ignore[override]  # the class's own for others, of the alternatives here
        """Whether the alternatives are stochastic."""
        return self.alternatives[0].is_stochastic


@dataclass(frozen=True)
class Greedy(Strategy):
    """The most likely token at each step; ties go to the lowest id."""

    name: ClassVar[str] = "greedy"


@dataclass(frozen=True)
class Sample(Strategy):
    """Samples each token: ancestral sampling, or from a warped distribution.

    Warps apply in this order, each renormalised over what is left:

    * temperature τ > 0: softmax(logits / τ)
    * top_k: the k most likely tokens
    * top_p: the smallest set of most likely tokens whose mass reaches p (nucleus, Holtzman et al. 2020)
    * min_p: tokens with at least min_p times the probability of the most likely one (Nguyen et al. 2024)
    """

    name: ClassVar[str] = "sample"
    is_stochastic: ClassVar[bool] = True

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature > 0, "a number above 0 (for the limit 0 use greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "a whole number from 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "a number in [0, 1]"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ConfigError(f"sample: {name} is {getattr(self, name)}; expected {expected}")

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the log-probs (…, V), in float32 or wider, of the distribution that is sampled from logits (…, V)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = torch.log_softmax(logits if self.temperature == 1.0 else logits / self.temperature, -1)
        if self.top_k is not None and self.top_k < logits.size(-1):
            kept = torch.zeros_like(logprobs, dtype=torch.bool)
            kept.scatter_(-1, logprobs.topk(self.top_k, dim=-1).indices, True)
            logprobs = _renormalise(logprobs, kept)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
            mass = to_units(ordered.exp())
            wanted = to_units(torch.tensor(self.top_p, dtype=logprobs.dtype))
            kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, order, mass.cumsum(-1) - mass < wanted)
            logprobs = _renormalise(logprobs, kept)
        if self.min_p:
            threshold = logprobs.max(dim=-1, keepdim=True).values + torch.tensor(self.min_p).log()
            logprobs = _renormalise(logprobs, logprobs >= threshold)
        return logprobs


def to_units(probs: torch.Tensor) -> torch.Tensor:
    """Return probabilities (float32 or wider) as whole numbers of 2⁻⁵², int64: their sums are exact, in any order.

    (Scaling by a power of two is exact. A float cumsum on CUDA gives other last digits from call to call, and is
    refused under deterministic kernels.)
    """
    return (probs * 2.0**52).round_().long()


class Rerank(Strategy):
    """Base of the strategies that take n samples, as `Sample` with the same settings, and keep one."""

    n: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ConfigError(f"{self.name}: n is {self.n}; expected a whole number from 2, the samples to choose from")
        try:
            self.sampler  # noqa: B018 - its settings are checked when it is made
        except ConfigError as error:
            raise ConfigError(str(error).replace("sample", self.name, 1)) from error

    @property
    def sampler(self) -> Sample:
        """The distribution that the candidates are sampled from."""
        return Sample(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class BestOf(Rerank):
    """The best of n samples, by the model's own log-prob or by a reward.

        y* = argmax_i s(y_i),   y_1 … y_n ~ q(· | x)

    q has the temperature and truncation given. Under `by="logprob"` s is log p(y | x) of the model's own, unwarped
    distribution, and a sample that was cut at the length limit is chosen only if all were. Otherwise `by` names a
    reward; one that reads the references makes this an oracle. Of equal samples the first is kept.
    """

    name: ClassVar[str] = "best_of"

    n: int
    by: str = LOGPROB
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class MBR(Rerank):
    """Minimum Bayes risk: of n samples, the one of highest expected utility against the others.

        y* = argmax_i 1/(n−1) Σ_{j≠i} u(y_i, y_j),   y_1 … y_n ~ q(· | x)

    The other samples stand in as references (Kumar & Byrne 2004; Eikema & Aziz 2020), so no true one is read.
    `utility` names a reward. Of equal expected utilities the first sample is kept.
    """

    name: ClassVar[str] = "mbr"

    n: int
    utility: str
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.utility:
            raise ConfigError(f"mbr: no utility is named; give a reward, for example mbr:n={self.n},utility=error_rate")


@dataclass(frozen=True)
class Beam(Strategy):
    """Beam search: keeps the `width` likeliest prefixes; hypotheses compete by log-prob / length^length_penalty."""

    name: ClassVar[str] = "beam"

    width: int = 5
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"beam: width is {self.width}; expected a whole number from 1")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"beam: length_penalty is {self.length_penalty}; expected a finite number")


STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Greedy, Sample, Beam, BestOf, MBR)}


def parse_strategy(text: str) -> Strategy:
    """Read a strategy as a user writes it: `greedy`, `beam:width=10`, `best_of:n=8,by=phoneme_accuracy`.

    A setting with several numbers, `sample:temperature=0.5/0.7/1`, makes it a `Sweep`.

    Raises:
        ConfigError: the name or a setting is unknown (the message names the nearest), or a value is of a wrong type.
    """
    name, _, settings = text.partition(":")
    if name not in STRATEGIES:
        raise ConfigError(
            f"there is no decoding strategy {name!r}; there are {', '.join(STRATEGIES)}."
            + did_you_mean(name, STRATEGIES)
        )
    cls = STRATEGIES[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, list[int | float | str]] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        key = key.strip()
        if key not in fields or not equals:
            raise ConfigError(
                f"strategy {text!r}: {setting!r} is not a setting of {name}; it takes "
                f"{', '.join(f'{k}=…' for k in fields) or 'none'}." + did_you_mean(key, fields)
            )
        if key in values:
            raise ConfigError(f"strategy {text!r} gives {key} twice")
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(fields[key].type))
        values[key] = []
        for one in [value] if kind is str else value.split(ALTERNATIVES):
            try:
                values[key].append(kind(one.strip()))
            except ValueError as error:
                expected = {int: "whole number", float: "number"}[kind]
                raise ConfigError(f"strategy {text!r}: {key} is {one!r}; expected a {expected}") from error
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        examples = {"n": "n=8", "utility": "utility=error_rate"}
        example = ",".join(setting for key, setting in examples.items() if key in fields)
        raise ConfigError(f"strategy {text!r} does not say {' and '.join(missing)}; give {name}:{example}, for example")
    made = [cls(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
    return made[0] if len(made) == 1 else _sweep(text, made, values)


def _sweep(text: str, made: Sequence[Strategy], values: Mapping[str, Sequence[int | float | str]]) -> Sweep:
    """The strategies made of every combination of these values, under one name."""
    if len(set(made)) < len(made):
        raise ConfigError(f"strategy {text!r} names an alternative twice")
    defaults = {f.name: f.default for f in dataclasses.fields(made[0])}
    written = [
        f"{key}={ALTERNATIVES.join(map(str, values[key]))}"
        for key in defaults
        if key in values and list(values[key]) != [defaults[key]]
    ]
    return Sweep(f"{made[0].name}:{','.join(written)}", tuple(made))


def _renormalise(logprobs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Give all mass to the kept tokens: log-probs −∞ elsewhere."""
    return torch.log_softmax(logprobs.masked_fill(~kept, float("-inf")), dim=-1)
