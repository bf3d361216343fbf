"""How much of a gain is sharpening: quality over sequence entropy as the temperature varies (Caccia et al. 2020)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.decode import columns_of
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.names import Names
from rlseq.evaluation.statistics import Pair, RowStatistics, Source, rows_matrix
from rlseq.evaluation.stats.bootstrap import percentiles, resampled_counts
from rlseq.evaluation.stats.equal_entropy import Curve, mean_gap
from rlseq.evaluation.stats.estimators import RatioOfSums
from rlseq.evaluation.stats.seeds import claim_of, methods, resample_pairs
from rlseq.evaluation.studies import sharpening_report
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, summarise
from rlseq.scoring import RewardSuite

EXACT = "exact_match"
ONE = "1.0"  # how results call the temperature at which gains are stated
_ENTROPY = None  # beside qualities by name, of which one may be called entropy
_SHARPENING = Source("sharpening")
SHAPE = ("entropy", "unique", "top", "truncated")  # beside qualities, per sample


@dataclass(frozen=True)
class Sampled:
    """A row's samples at one temperature: their tokens, log-probs, whether they were cut, and what they are worth."""

    completions: list[tuple[int, ...]]
    logprobs: list[float]
    truncated: list[bool]
    right: list[bool] | None  # whether each is a reference; None if the row has none
    values: Mapping[str, Sequence[float | None]]  # by reward


class Sharpening(Study):
    """The quality of samples over their entropy, by temperature, and gaps between models at equal entropy.

    At temperature T a model samples q_T(y | x) = Π_t softmax(logits_t / T), each token renormalised:

        H(T) = −E_{y ~ q_T} log q_T(y | x)        Q(T) = E_{y ~ q_T} reward(y)

    both estimated on the same samples. H is in nats per completion. Completions cut at the length limit count with
    the log-prob of the prefix.

    The first model's points (H, Q), joined by lines, are what its temperature alone can reach. The gap of another model
    is its Q less the first model's at the same H; outside the first model's entropies there is none.
    """

    name = "sharpening"

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Raise ConfigError unless there are two temperatures or more, distinct and 1 among them."""
        given = " ".join(f"{t:g}" for t in settings.temperatures)
        if len(set(settings.temperatures)) < len(settings.temperatures):
            raise ConfigError(f"--temperatures names one twice: {given}")
        if len(settings.temperatures) < 2 or 1 not in settings.temperatures:
            raise ConfigError(
                f"--temperatures is {given or 'empty'}; expected two or more with 1 among them: a curve needs two "
                "points, and gains are stated at temperature 1"
            )

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """Samples at each temperature."""
        return rows * settings.samples_per_row * len(settings.temperatures), 0

    def sample(self, context: Context) -> list[dict[str, Sampled]]:
        """Sample and score at every temperature; by row and temperature."""
        settings, rows, names = context.settings, len(context.prompts), Names.of(context.suite).rewards
        records: list[dict[str, Sampled]] = [{} for _ in context.prompts]
        for place, temperature in enumerate(settings.temperatures):
            groups = context.sample(self.name, part=key_of(temperature), strategy=Sample(temperature=temperature))
            flat = [(row, rollout) for row, group in enumerate(groups) for rollout in group]
            columns = columns_of(context.prompts, [row for row, _ in flat])
            values = context.suite.score([rollout for _, rollout in flat], columns).values
            for row, group in enumerate(groups):
                references, start = context.references[row], row * settings.samples_per_row
                records[row][key_of(temperature)] = Sampled(
                    [rollout.completion_ids for rollout in group],
                    [rollout.logprob for rollout in group],
                    [rollout.finish_reason == "length" for rollout in group],
                    [rollout.completion_ids in references for rollout in group] if references else None,
                    {names[reward]: found[start : start + len(group)] for reward, found in values.items()},
                )
            done = [rows * n // len(settings.temperatures) for n in (place, place + 1)]
            context.progress(done[1] - done[0])
        return records

    def statistics(self, records: list[dict[str, Sampled]]) -> list[RowStatistics]:
        """Per temperature T, sums over the row's samples: samples(T), entropy(T), ..., sum(T, Q), count(T, Q)."""
        statistics: list[RowStatistics] = [{} for _ in records]
        for mine, record in zip(statistics, records, strict=True):
            for key, found in record.items():
                mine |= _row_statistics(key, found)
        return statistics

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """Values by model and temperature, differences at temperature 1, and gaps at equal entropy.

        {"rows", "samples_per_row", "temperatures", "rising": whether the first model's entropy rises with temperature,
        "models": {model: {T: {"entropy", "unique", "top", "truncated": cell, "quality": {Q: cell}}}},
        "comparisons": as `summarise` gives, of entropy and diversity at temperature 1,
        "gaps": [{"a", "b", "metric", "by_temperature": {T: cell}, "mean": cell, "range": [low, high], "total": cell,
        "sharpening": cell, "residual": cell}]}

        Of a method with several seeds a gap is the mean over pairs of a seed of it and one of the first method, with an
        interval over seeds and rows, and what `seeds.claim_of` gives; its range is the widest of the pairs'. Where the
        first method has several seeds, there are no gaps of single checkpoints.

        A cell of `gaps` also has `defined`, the share of resamples with a gap. The last two are there where b has the
        lower entropy at temperature 1: of the total gain there, the first model cooled to b's entropy gains
        `sharpening`.
        """
        studied = [i for i, rows in enumerate(zip(*found.values(), strict=True)) if all(rows)]
        if not studied:
            return None
        found = {model: [rows[i] for i in studied] for model, rows in found.items()}
        temperatures = [key_of(t) for t in sorted(settings.temperatures)]
        keys = dict.fromkeys(key for rows in found.values() for row in rows for key in row)
        qualities = list(dict.fromkeys(key.params[1] for key in keys if key.name == "sum"))
        shape = [name for name in SHAPE if any(key.name == name for key in keys)]
        metrics = {(t, "shape", name): _shape(t, name) for t in temperatures for name in shape}
        metrics |= {(t, "quality", name): _quality(t, name) for t in temperatures for name in qualities}
        at_one = {name: _shape(ONE, name) for name in shape}
        models: dict[str, Any] = {}
        for model, cells in summarise(found, metrics, settings, compare=False)["models"].items():
            models[model] = {
                t: {
                    **{name: cells[t, "shape", name] for name in shape},
                    "quality": {name: cells[t, "quality", name] for name in qualities},
                }
                for t in temperatures
            }
        entropies = [models[next(iter(found))][t]["entropy"]["value"] for t in temperatures]
        return {
            "rows": len(studied),
            "samples_per_row": settings.samples_per_row,
            "temperatures": temperatures,
            "rising": bool(np.all(np.diff(entropies) > 0)),
            "models": models,
            "comparisons": summarise(found, at_one, settings)["comparisons"],
            "gaps": _gaps(found, qualities, temperatures, settings),
        }

    def section(self, results: Mapping[str, Any]) -> Section:
        """A figure a quality, tables of gaps and of diversity, and one by temperature."""
        return sharpening_report.section_of(results["studies"][self.name], results)

    def headline(self, results: Mapping[str, Any], a: str, b: str) -> str:
        """How much of the gain in plain sampling a lower temperature gives too."""
        return sharpening_report.headline(results, a, b)


def key_of(temperature: float) -> str:
    """A temperature as results.json calls it: 0.3, 1.0."""
    return str(float(temperature))


def _row_statistics(key: str, found: Sampled) -> RowStatistics:
    size, counts = len(found.completions), Counter(found.completions)
    mine = {
        _SHARPENING("samples", key): size,
        _SHARPENING("entropy", key): -sum(found.logprobs),
        _SHARPENING("truncated", key): sum(found.truncated),
    }
    if size > 1:  # of one sample both are 1, whatever the model
        mine |= {_SHARPENING("unique", key): len(counts), _SHARPENING("top", key): max(counts.values())}
    if found.right is not None:
        mine |= {_SHARPENING("sum", key, EXACT): sum(found.right), _SHARPENING("count", key, EXACT): size}
    for reward, values in found.values.items():
        present = [value for value in values if value is not None]
        total, count = (_SHARPENING(part, key, reward) for part in ("sum", "count"))
        mine |= {total: sum(present), count: len(present)}
    return {statistic: float(value) for statistic, value in mine.items()}


def _shape(temperature: str, name: str) -> StudyMetric:
    return StudyMetric(Pair(_SHARPENING(name, temperature), _SHARPENING("samples", temperature)), RatioOfSums())


def _quality(temperature: str, name: str) -> StudyMetric:
    pair = Pair(_SHARPENING("sum", temperature, name), _SHARPENING("count", temperature, name))
    return StudyMetric(pair, RatioOfSums())


def _gaps(
    found: Mapping[str, Sequence[RowStatistics]], qualities: Sequence[str], temperatures: Sequence[str], settings: Any
) -> list[dict[str, Any]]:
    """Every model against the first, then every method: all curves are recomputed from each resample's rows."""
    (first, seeds_a), *others = methods(found).items()
    sides = [(first, seeds_a, name, [name]) for _, seeds in others for name in seeds if len(seeds_a) == 1]
    sides += [(first, seeds_a, b, seeds) for b, seeds in others if max(len(seeds_a), len(seeds)) > 1]
    if not sides:
        return []
    rows = len(found[seeds_a[0]])
    values = _values(found, np.ones((1, rows)), qualities, temperatures)
    parts = [
        _values(found, counts, qualities, temperatures)
        for counts in resampled_counts(rows, seed=settings.seed, resamples=settings.resamples)
    ]
    resampled = {m: {name: np.concatenate([part[m][name] for part in parts]) for name in values[m]} for m in found}
    one = temperatures.index(ONE)
    gaps = []
    for a, seeds_a, b, seeds_b in sides:
        for quality in qualities:
            point, resamples = (_pairs(v, seeds_a, seeds_b, quality, temperatures) for v in (values, resampled))
            cells = {
                name: _cell(float(pairs.mean()), resample_pairs(a, b, resamples[name], seed=settings.seed))
                for name, pairs in point.items()
            }
            gap = {
                "a": a,
                "b": b,
                "metric": quality,
                "by_temperature": {t: cells[t] for t in temperatures},
                "mean": cells["mean"],
                "range": [float(point["low"].min()), float(point["high"].max())],
                "total": cells["total"],
                **(claim_of(len(seeds_a), len(seeds_b)) if len(seeds_a) + len(seeds_b) > 2 else {}),
            }
            at_one = [np.mean([values[seed][_ENTROPY][0, one] for seed in seeds]) for seeds in (seeds_a, seeds_b)]
            if at_one[1] < at_one[0]:
                gap |= {"sharpening": cells["sharpening"], "residual": cells[ONE]}
            gaps.append(gap)
    return gaps


def _values(
    found: Mapping[str, Sequence[RowStatistics]],
    counts: np.ndarray,
    qualities: Iterable[str],
    temperatures: Sequence[str],
) -> dict[str, dict[str | None, np.ndarray]]:
    """By model, entropy and each quality at each temperature, (n, K), of n resamples given as counts (n, R)."""
    values: dict[str, dict[str | None, np.ndarray]] = {model: {} for model in found}
    for name in (_ENTROPY, *qualities):
        by_temperature: dict[str, list[np.ndarray]] = {model: [] for model in found}
        for t in temperatures:
            metric = _shape(t, "entropy") if name is _ENTROPY else _quality(t, name)
            tables = {model: rows_matrix(rows, metric.statistics) for model, rows in found.items()}
            base = next(iter(tables.values()))
            sums = counts @ base
            for model, table in tables.items():  # of equal rows the sums are equal, as of two products they need not be
                with np.errstate(divide="ignore", invalid="ignore"):
                    by_temperature[model].append(metric.aggregate.from_sums(sums + counts @ (table - base)))
        for model, columns in by_temperature.items():
            values[model][name] = np.stack(columns, 1)
    return values


def _pairs(
    values: Mapping[str, Mapping[str | None, np.ndarray]],
    seeds_a: Sequence[str],
    seeds_b: Sequence[str],
    quality: str,
    temperatures: Sequence[str],
) -> dict[str, np.ndarray]:
    """By name (n, S_a, S_b): `_compare` of every pair of seeds."""
    found = [[_compare(values[a], values[b], quality, temperatures) for b in seeds_b] for a in seeds_a]
    return {name: np.stack([np.stack([pair[name] for pair in row], 1) for row in found], 1) for name in found[0][0]}


def _compare(
    base: Mapping[str | None, np.ndarray],
    other: Mapping[str | None, np.ndarray],
    quality: str,
    temperatures: Sequence[str],
) -> dict[str, np.ndarray]:
    """By name, (n,) numbers that say how far `other` is above the base: see `Sharpening.results`."""
    below = Curve.through(base[_ENTROPY], base[quality])
    reached = {}
    for i, t in enumerate(temperatures):
        # At one temperature with one entropy it is the base's own point, whose quality needs no line.
        same = other[_ENTROPY][:, i] == base[_ENTROPY][:, i]
        reached[t] = np.where(same, base[quality][:, i], below.at(other[_ENTROPY][:, i]))
    found = {t: other[quality][:, i] - reached[t] for i, t in enumerate(temperatures)}
    one = temperatures.index(ONE)
    found["total"] = other[quality][:, one] - base[quality][:, one]
    found["sharpening"] = reached[ONE] - base[quality][:, one]
    found["mean"], found["low"], found["high"] = mean_gap(below, Curve.through(other[_ENTROPY], other[quality]))
    return found


def _cell(value: float, resampled: np.ndarray) -> dict[str, Any]:
    """A value and its interval over the resamples where it is defined, whose share is given."""
    defined = float(np.isfinite(resampled).mean())
    ci95 = percentiles(resampled) if np.isfinite(value) else (math.nan, math.nan)
    return {"value": float(value), "ci95": list(ci95), "defined": defined}
