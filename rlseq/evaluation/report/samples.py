"""Completions of two models next to each other: what got better, what got worse, and random rows."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlseq.evaluation.metrics import PASS_AT
from rlseq.evaluation.statistics import LIKELIHOOD
from rlseq.evaluation.stats.estimators import pass_at_k
from rlseq.types import transcript

_CHANCE = LIKELIHOOD("expected_accuracy").text(LIKELIHOOD.source)
MAX_CHARACTERS = 600  # of a prompt, reference or completion shown in a report


@dataclass(frozen=True)
class Side:
    """One model's completions of a row: each distinct one with its count and its marked pieces."""

    completions: tuple[tuple[int, tuple[tuple[str, str], ...]], ...]
    score: float | None
    expected_accuracy: float | None


@dataclass(frozen=True)
class Row:
    """A row of the data set under one strategy: b against a; a is None when only one model was evaluated."""

    key: str
    prompt: str
    references: tuple[str, ...]
    a: Side | None
    b: Side
    gain: float

    @property
    def change(self) -> str:
        return "better" if self.gain > 0 else "worse" if self.gain < 0 else "same"


@dataclass(frozen=True)
class SamplePairs:
    """Rows by how they were chosen, and over all rows how many got better, worse or stayed, and how many changed."""

    strategy: str
    score_name: str
    better: tuple[Row, ...]
    worse: tuple[Row, ...]
    changed: tuple[Row, ...]
    random: tuple[Row, ...]
    counts: Mapping[str, int]

    @property
    def has_p(self) -> bool:
        """Whether any row shown knows its chance to be right."""
        rows = (*self.better, *self.worse, *self.changed, *self.random)
        return any(row.b.expected_accuracy is not None for row in rows)


def pair_samples(
    samples: Iterable[Mapping[str, Any]],
    a: str | None,
    b: str,
    strategy: str,
    *,
    per_example: Iterable[Mapping[str, Any]] = (),
    limit: int = 12,
) -> SamplePairs | None:
    """Pair the completions of a and b under a strategy, row by row.

    A row's score is the mean of `total` over its samples (of the first reward where totals are absent); its
    gain is b − a. The `limit` largest gains and losses are shown, as many rows whose completions changed at an
    equal score, and as many of all rows; these two are chosen by a hash of their key, which knows no score. With
    a None, b is shown alone and its lowest scores count as `worse`.

    Returns:
        None when neither model has samples under this strategy.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["strategy"] == strategy and sample["model"] in (a, b):
            groups[sample["model"], sample["key"]].append(sample)
    keys = [key for model, key in groups if model == b and (a is None or (a, key) in groups)]
    if not keys:
        return None
    scores = {place: _score(group) for place, group in groups.items()}
    gains = {key: _gain(scores.get((a, key)) if a else 0.0, scores[b, key]) for key in keys}
    expected_accuracy = {(row["model"], row["key"]): row["likelihood"].get(_CHANCE) for row in per_example}

    def row(key: str) -> Row:
        first = groups[b, key][0]
        references = tuple(map(str, first.get("references") or ()))
        sides = {
            model: Side(
                _distinct(groups[model, key], references), scores[model, key], expected_accuracy.get((model, key))
            )
            for model in (a, b)
            if model is not None
        }
        shown = tuple(_shorten(text) for text in references)
        return Row(key, _shorten(transcript(first["prompt"])), shown, sides.get(a), sides[b], gains[key])

    ranked = sorted(keys, key=lambda key: (-gains[key], key))
    if a is None:
        better, worse = [], ranked[::-1][:limit]
    else:
        better = [key for key in ranked if gains[key] > 0][:limit]
        worse = [key for key in reversed(ranked) if gains[key] < 0][:limit]
    texts = {place: Counter(sample["completion"] for sample in group) for place, group in groups.items()}
    differing = {key for key in keys if a is not None and texts[a, key] != texts[b, key]}
    hashed = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    changed = [key for key in hashed if key in differing and not gains[key]][:limit]
    signs = Counter("better" if g > 0 else "worse" if g < 0 else "same" for g in gains.values())
    return SamplePairs(
        strategy,
        _score_name(groups),
        *(tuple(map(row, chosen)) for chosen in (better, worse, changed, hashed[:limit])),
        counts={**{name: signs.get(name, 0) for name in ("better", "same", "worse")}, "changed": len(differing)},
    )


def monte_carlo_pass_at_k(
    samples: Iterable[Mapping[str, Any]], strategy: str, rows: int
) -> dict[str, dict[int, float]]:
    """Model -> k -> pass@k estimated from the samples; right means equal to a reference's text.

    Only for models whose samples cover all `rows` with the same number of samples each.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample["strategy"] == strategy and sample.get("references"):
            complete = sample.get("finish_reason") != "length"
            right[sample["model"]][sample["key"]].append(
                complete and sample["completion"].strip() in {str(r).strip() for r in sample["references"]}
            )
    curves = {}
    for model, by_row in right.items():
        sizes = {len(found) for found in by_row.values()}
        if len(by_row) == rows and len(sizes) == 1:
            n = sizes.pop()
            counts = [sum(found) for found in by_row.values()]
            ks = [k for k in PASS_AT if k <= n]
            curves[model] = {k: float(pass_at_k(n, counts, k).mean()) for k in ks}
    return curves


def marked_pieces(completion: str, references: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """A completion as (text, kind) pieces against its closest reference: same, wrong, or missing (a place).

    Words are compared (of a completion without white space, characters). Where the closest reference shares
    less than a third, nothing is marked: for free text a diff would be noise.
    """
    if not completion.strip():
        return ()
    pieces = _split(completion)
    matchers = [difflib.SequenceMatcher(None, _split(r), pieces, autojunk=False) for r in references]
    best = max(matchers, key=lambda m: m.ratio(), default=None)
    if best is None or best.ratio() < 1 / 3 or len(completion) > MAX_CHARACTERS:
        return ((_shorten(completion), "same"),)
    marked = []
    for operation, i1, i2, j1, j2 in best.get_opcodes():
        text = "".join(pieces[j1:j2])
        if operation == "delete":
            missing = "".join(best.a[i1:i2]).strip()
            if missing:
                marked.append((missing, "missing"))
        elif text:
            marked.append((text, "same" if operation == "equal" or not text.strip() else "wrong"))
    return tuple(marked)


def _split(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text) if re.search(r"\s", text.strip()) else list(text)


def _distinct(
    group: Sequence[Mapping[str, Any]], references: Sequence[str]
) -> tuple[tuple[int, tuple[tuple[str, str], ...]], ...]:
    counts = Counter(sample["completion"] for sample in group)
    return tuple((count, marked_pieces(text, references)) for text, count in counts.most_common(6))


def _score(group: Sequence[Mapping[str, Any]]) -> float | None:
    values = []
    for sample in group:
        value = sample.get("total")
        if value is None:
            value = next((v for v in (sample.get("values") or {}).values() if v is not None), None)
        if value is not None:
            values.append(float(value))
    return sum(values) / len(values) if values else None


def _score_name(groups: Mapping[Any, Sequence[Mapping[str, Any]]]) -> str:
    names = dict.fromkeys(n for group in groups.values() for s in group for n in s.get("values") or ())
    return next(iter(names)) if len(names) == 1 else "total reward"


def _gain(a: float | None, b: float | None) -> float:
    gain = 0.0 if a is None or b is None else b - a
    return 0.0 if math.isclose(gain, 0.0, abs_tol=1e-9) else gain


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … (+{len(text) - MAX_CHARACTERS:,} characters)"
