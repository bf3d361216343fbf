"""The metrics of a contrast in words: what each is called, means and is better at, and how its values are printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

NOTHING = "n/a"  # shown where a value is null or was not measured

# Of the metrics that are not a user's, name: (label, higher is better, a share shown in percent, definition)
KNOWN: dict[str, tuple[str, bool | None, bool, str]] = {
    "nll_per_token": (
        "NLL per token",
        False,
        False,
        "Negative log-probability of the reference tokens, each given the true prefix (teacher forcing): the "
        "sum over all rows divided by the number of tokens, in nats.",
    ),
    "perplexity": ("Perplexity", False, False, "exp of the NLL per token."),
    "bits_per_byte": (
        "Bits per byte",
        False,
        False,
        "The references' total −log2 probability over their UTF-8 bytes; comparable across tokenizers.",
    ),
    "sequence_logprob": (
        "Sequence log-prob",
        True,
        False,
        "Mean over rows of the log-probability of the whole reference, in nats.",
    ),
    "exact_accuracy": (
        "Exact accuracy",
        True,
        True,
        "Mean over rows of p, the summed probability of the distinct references: the exact chance that one "
        "sample is right where the references list all right answers. No sampling noise.",
    ),
    "exact_pass_at_k": (
        "Exact pass@k",
        True,
        True,
        "Mean over rows of 1 − (1 − p)^k: the exact chance that at least one of k samples is right.",
    ),
    "exact_match": (
        "Exact match",
        True,
        True,
        "Share of completions equal to one of the references.",
    ),
    "length": ("Length", None, False, "Mean completion length in tokens, stop token included."),
    "logprob": ("Own log-prob", None, False, "Mean log-probability of what was generated, in nats."),
    "mode_empty": ("Empty modes", None, True, "Share of proven modes that are a stop token alone."),
    "truncated": ("Truncated", False, True, "Share of completions cut at the length limit."),
    "argmax_accuracy": (
        "Argmax accuracy",
        True,
        True,
        "Share of reference tokens that are the model's first choice given the true tokens before them.",
    ),
    "argmax_match": (
        "Argmax match",
        True,
        True,
        "Share of rows with a reference whose every token is the model's first choice: what greedy reproduces.",
    ),
    "length_ratio": (
        "Length ratio",
        None,
        False,
        "Tokens of the completions over those of the references closest to them in length.",
    ),
    "repetition": ("Repetition", None, True, "Share of 4-grams of tokens that stood in the same completion before."),
    "p_reference": ("p(reference)", True, True, "Exact chance that the strategy generates one of the references."),
    "unreachable": ("Unreachable rows", False, True, "Rows none of whose references the strategy can ever generate."),
    "unreachable_references": (
        "Unreachable references",
        False,
        True,
        "References that the strategy can never generate.",
    ),
}


@dataclass(frozen=True)
class Metric:
    """How one metric is named, read and printed. `better` is True (higher), False (lower) or None."""

    name: str
    label: str
    better: bool | None
    percent: bool
    description: str
    decimals: int

    def value(self, x: float | None) -> str:
        """A value: `8.2%` or `0.2104`; `n/a` for None, where nothing was measured."""
        text = number(self._scaled(x), self.decimals)
        return f"{text}%" if self.percent and text != NOTHING else text

    def interval(self, ci95: Any) -> str:
        """An interval: `7.9 to 8.5`; the unit is the value's."""
        low, high = (number(self._scaled(x), self.decimals) for x in ci95)
        return f"{low} to {high}"

    def difference(self, x: float | None) -> str:
        """A signed difference; shares differ by percentage points, one decimal finer than their values."""
        text = number(self._scaled(x), self.decimals + self.percent, signed=True)
        return f"{text} pp" if self.percent and text != NOTHING else text

    def difference_interval(self, ci95: Any) -> str:
        low, high = (self.difference(x).removesuffix(" pp") for x in ci95)
        return f"{low} to {high}"

    def _scaled(self, x: float | None) -> float | None:
        return 100 * x if self.percent and x is not None else x


def number(x: float | None, decimals: int, *, signed: bool = False) -> str:
    """A decimal with a true minus sign and thin groups of thousands; `n/a` for None and NaN."""
    if x is None or math.isnan(x):
        return NOTHING
    text = f"{x:{'+' if signed else ''},.{decimals}f}"
    if not text.strip("+-0.,"):  # no sign on a zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


def p_text(p: float | None) -> str:
    if p is None or math.isnan(p):
        return "n/a"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
