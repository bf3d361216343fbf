"""How far a model has moved from the first one: the KL divergence between their distributions over completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import divergence
from rlseq.errors import ModelError
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.report import tables
from rlseq.evaluation.statistics import RowStatistics, Source, rows_matrix
from rlseq.evaluation.stats.estimators import RatioOfSums
from rlseq.evaluation.stats.seeds import crossed_bootstrap_many, methods
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, Table, summarise

FORWARD, REVERSE = "forward", "reverse"


@dataclass(frozen=True)
class _VarianceRatio:
    """Variance of one row statistic over that of another, over rows: columns x, x², z, z² and a count of 1."""

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            means = sums / sums[..., -1:]
            x, z = (means[..., i + 1] - means[..., i] ** 2 for i in (0, 2))
            return np.where((x > 0) & (z > 0), x / z, np.nan)


_KL = Source("kl")
_ITSELF = _KL("itself")
_VOCABULARIES = {name: _KL(name) for name in ("vocabulary", "vocabulary_first")}
_PARTS = {
    "kl": (("kl", "samples"), RatioOfSums()),
    "kl_per_token": (("kl", "tokens"), RatioOfSums()),
    "plain": (("plain", "samples"), RatioOfSums()),
    "variance_ratio": (("plain_mean", "plain_square", "kl_mean", "kl_square", "one"), _VarianceRatio()),
    "length": (("tokens", "samples"), RatioOfSums()),
}
METRICS = {
    (direction, name): StudyMetric(tuple(_KL(part, direction) for part in parts), aggregate)
    for direction in (FORWARD, REVERSE)
    for name, (parts, aggregate) in _PARTS.items()
}


@dataclass(frozen=True)
class Compared:
    """A row's samples under both models.

    Attributes:
        vocabularies: the sizes of the model's and the first model's, if they differ: then nothing was sampled.
        divergences: by direction (G, 3) of G samples: KL divergence, log-ratio, tokens; empty of the first model.
    """

    vocabularies: tuple[int, int] | None
    divergences: Mapping[str, np.ndarray] = field(default_factory=dict)


class KL(Study):
    """KL(p ‖ b) of a model p to the first model b, and KL(b ‖ p), over whole completions; mean over rows, in nats.

        KL(p ‖ b) = E_{y ~ p} Σ_t Σ_v p(v | x, y_<t) · (log p(v | x, y_<t) − log b(v | x, y_<t))

    t runs over the tokens of y, the stop included. Each sampled prefix contributes the exact divergence of the next
    token, summed over the vocabulary (Rao-Blackwellised: Amini et al. 2025). `plain` is the Monte Carlo estimate on the
    same samples, the mean of log p(y | x) − log b(y | x). `variance_ratio` is the variance over rows of its row means,
    divided by that of the exact sums' row means. The ratio is usually above 1. It can be below 1 if a model regains at
    one token what it lost at another.
    """

    name = "kl"
    against_first = True

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """Samples of both models, each scored by both."""
        samples = rows * settings.samples_per_row
        return 2 * samples, 4 * samples

    def sample(self, context: Context) -> list[Compared]:
        """Sample both models, and score what each sampled by both.

        Raises:
            ModelError: one model rules out a token that the other samples, so that the divergence is infinite.
        """
        base, model, rows = context.baseline(), context.model, len(context.prompts)
        sizes = tuple(m.config.get_text_config().vocab_size for m in (model, base))
        if base is model or sizes[0] != sizes[1]:
            context.progress(rows)
            return [Compared(None if base is model else sizes) for _ in range(rows)]
        forward = _divergences(model, base, FORWARD, context)
        context.progress(rows // 2)
        reverse = _divergences(base, model, REVERSE, context)
        context.progress(rows - rows // 2)
        return [Compared(None, {FORWARD: a, REVERSE: b}) for a, b in zip(forward, reverse, strict=True)]

    def statistics(self, records: list[Compared]) -> list[RowStatistics]:
        """Per direction D, sums over the row's samples: kl(D), plain(D), tokens(D), samples(D), and moments.

        The first model has itself alone, and a model with another vocabulary the two sizes.
        """
        return [_row_statistics(record) for record in records]

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """{"first", "rows", "samples_per_row", "models": {model: {direction: {name: {"value", "ci95"}}}},
        "methods": {method: the same, with "per_seed"}, "skipped"}.

        `methods` has those with several seeds that all have a divergence from the first checkpoint: the mean over
        seeds, with an interval over seeds and rows.

        A model that is the first itself, by another name, is at 0 exactly. `skipped` has the two sizes of the
        vocabularies by model.
        """
        first = next(iter(found))
        block: dict[str, Any] = {"first": first, "rows": 0, "samples_per_row": settings.samples_per_row}
        models: dict[str, Any] = {}
        skipped: dict[str, Any] = {}
        for model, every in found.items():
            rows = [row for row in every if row]
            if model == first or not rows:
                continue
            block["rows"] = len(rows)
            if _ITSELF in rows[0]:
                zero = {"value": 0.0, "ci95": [0.0, 0.0]}
                models[model] = {d: {"kl": zero, "kl_per_token": zero, "plain": zero} for d in (FORWARD, REVERSE)}
            elif _VOCABULARIES["vocabulary"] in rows[0]:
                skipped[model] = {name: int(rows[0][size]) for name, size in _VOCABULARIES.items()}
            else:
                models[model] = _by_direction(summarise({model: rows}, METRICS, settings)["models"][model])
        if not (models or skipped):
            return None
        return {**block, "models": models, "methods": _of_methods(found, models, settings), "skipped": skipped}

    def section(self, results: Mapping[str, Any]) -> Section:
        """A table of both directions, and what was left out."""
        block = results["studies"][self.name]
        first = block["first"]
        rows = []
        for model, directions in {**block["models"], **block["methods"]}.items():
            for direction, cells in directions.items():
                label = f"KL({model} ‖ {first})" if direction == FORWARD else f"KL({first} ‖ {model})"
                texts = [tables.Shown(decimals=decimals).cell(cells.get(name)) for name, decimals in _SHOWN]
                rows.append([tables.row_name(results, model), label, *texts])
        head = ["Model", "Divergence", "Nats per completion", "Nats per token", "Plain Monte Carlo"]
        note = " ".join(
            f"{model} is left out: its vocabulary has {s['vocabulary']:,} tokens, that of {first} "
            f"{s['vocabulary_first']:,}, so their distributions are not over the same completions."
            for model, s in block["skipped"].items()
        )
        return Section(
            "kl",
            f"KL divergence to {first}",
            "The KL divergence between two models' distributions over completions, mean over the first "
            f"{block['rows']:,} rows: {block['samples_per_row']} samples per row of the model named first. Each "
            "sampled prefix contributes the exact divergence of the next token, summed over the vocabulary and over "
            "positions to the stop. Beside it the plain Monte Carlo estimate on the same samples, the mean difference "
            "in log-probability; the variance ratio is its variance between rows, divided by that of the exact sums. "
            "With 95% bootstrap intervals over rows (of a method, over its seeds and rows).",
            "samples are cut at the length limit, and what would follow is not counted: where many are cut the "
            "divergence is a lower bound. What a model seldom samples and the other rules out weighs much and may be "
            "in no sample: estimates are then too low, and intervals too narrow.",
            [Table([*head, "Variance ratio", "Tokens"], rows, "", note)],
        )


def _of_methods(
    found: Mapping[str, Sequence[RowStatistics]], models: Mapping[str, Any], settings: Any
) -> dict[str, dict[str, Any]]:
    """The block `methods`."""
    measured = {model: [row for row in found[model] if row and _ITSELF not in row] for model in models}
    repeated = {method: seeds for method, seeds in methods(found).items() if len(seeds) > 1}
    tables_of = {
        (method, *place): (method, [rows_matrix(measured[s], m.statistics) for s in seeds], m.aggregate)
        for method, seeds in repeated.items()
        if all(measured.get(seed) for seed in seeds)
        for place, m in METRICS.items()
    }
    cells: dict[str, dict[tuple[str, str], Any]] = {}
    for (method, *place), resampled in crossed_bootstrap_many(
        tables_of, seed=settings.seed, resamples=settings.resamples
    ).items():
        cell = {"value": resampled.value, "ci95": list(resampled.ci95), "per_seed": list(resampled.per_seed)}
        cells.setdefault(method, {})[tuple(place)] = cell
    return {method: _by_direction(mine) for method, mine in cells.items()}


def _by_direction(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for (direction, name), cell in cells.items():
        nested.setdefault(direction, {})[name] = cell
    return nested


_SHOWN = (("kl", 3), ("kl_per_token", 4), ("plain", 3), ("variance_ratio", 2), ("length", 1))


def _divergences(p: torch.nn.Module, b: torch.nn.Module, part: str, context: Context) -> list[np.ndarray]:
    """By row (G, 3) of its samples from p: the divergence of b from p, the log-ratio, and the number of tokens."""
    groups = context.sample(KL.name, part=part, model=p)
    flat = [
        (prompt, rollout.completion_ids)
        for prompt, group in zip(context.prompts, groups, strict=True)
        for rollout in group
    ]
    found = divergence(p, b, [prompt.prompt_ids for prompt, _ in flat], [ids for _, ids in flat])
    sums = np.array([[*to_float64(tokens).sum(0).tolist(), len(tokens)] for tokens in found])  # (B, 3)
    if not np.isfinite(sums).all():
        prompt, _ = flat[int(np.argwhere(~np.isfinite(sums))[0, 0])]
        raise ModelError(
            f"the study kl found an infinite KL: after the prompt {prompt.text!r} one of the model and the first "
            "model gives probability 0 to a token that the other may sample. Leave kl out of --studies."
        )
    return np.split(sums, len(groups)) if groups else []


def _row_statistics(record: Compared) -> RowStatistics:
    if record.vocabularies is not None:
        return dict(zip(_VOCABULARIES.values(), map(float, record.vocabularies), strict=True))
    if not record.divergences:
        return {_ITSELF: 1.0}
    row: RowStatistics = {}
    for direction, sums in record.divergences.items():
        size = float(len(sums))
        kl, plain, tokens = sums.sum(0).tolist()
        values = {"kl": kl, "plain": plain, "tokens": tokens, "samples": size, "one": 1.0}
        for name in ("kl", "plain"):
            mean = values[name] / size
            values |= {f"{name}_mean": mean, f"{name}_square": mean**2}
        row |= {_KL(name, direction): value for name, value in values.items()}
    return row
