"""Decoding strategies as frozen dataclasses, and the warps of the logits that they sample from.

A strategy that samples has `warp(logits) -> log-probs`: the log-probabilities of the distribution its tokens are
drawn from, temperature and truncation applied and renormalised. Strategies that search have no such distribution;
log-probs recorded under them are the model's own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlseq.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Strategy:
    """Base of the decoding strategies; `name` is how a user calls one."""

    name: ClassVar[str] = ""
    samples: ClassVar[bool] = False  # whether it draws, so that several completions a prompt make sense

    @property
    def signature(self) -> str:
        """The strategy with the settings that differ from its defaults, as a user would write it."""
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


@dataclass(frozen=True)
class Greedy(Strategy):
    """The most likely token at each step; ties go to the lowest id."""

    name: ClassVar[str] = "greedy"


@dataclass(frozen=True)
class Sample(Strategy):
    """Draws each token: ancestral sampling, or from a warped distribution.

    Warps apply in this order, each renormalised over what is left:

    * temperature τ > 0: softmax(logits / τ)
    * top_k: the k most likely tokens
    * top_p: the smallest set of most likely tokens whose mass reaches p (nucleus, Holtzman et al. 2020)
    * min_p: tokens with at least min_p times the probability of the most likely one (Nguyen et al. 2024)
    """

    name: ClassVar[str] = "sample"
    samples: ClassVar[bool] = True

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
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature, -1)
        if self.top_k is not None and self.top_k < logits.size(-1):
            kept = torch.zeros_like(logprobs, dtype=torch.bool)
            kept.scatter_(-1, logprobs.topk(self.top_k, dim=-1).indices, True)
            logprobs = _renormalise(logprobs, kept)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
            mass_before = ordered.exp().cumsum(-1) - ordered.exp()
            kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, order, mass_before < self.top_p)
            logprobs = _renormalise(logprobs, kept)
        if self.min_p:
            threshold = logprobs.max(dim=-1, keepdim=True).values + torch.tensor(self.min_p).log()
            logprobs = _renormalise(logprobs, logprobs >= threshold)
        return logprobs


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


STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Greedy, Sample, Beam)}


def parse_strategy(text: str) -> Strategy:
    """Read a strategy as a user writes it: `greedy`, `beam:width=10`, `sample:temperature=0.7,top_p=0.9`.

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
    values: dict[str, int | float] = {}
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
        kind = int if "int" in str(fields[key].type) else float
        try:
            values[key] = kind(value)
        except ValueError as error:
            expected = {int: "whole number", float: "number"}[kind]
            raise ConfigError(f"strategy {text!r}: {key} is {value!r}; expected a {expected}") from error
    return cls(**values)


def _renormalise(logprobs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Give all mass to the kept tokens: log-probs −∞ elsewhere."""
    return torch.log_softmax(logprobs.masked_fill(~kept, float("-inf")), dim=-1)
