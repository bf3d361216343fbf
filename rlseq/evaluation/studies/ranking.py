"""Does likelihood know quality: are a model's better completions likelier, within a row and across rows?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.report import tables
from rlseq.evaluation.statistics import RowStatistics, Source
from rlseq.evaluation.stats.association import auroc, spearman
from rlseq.evaluation.stats.bootstrap import percentiles, resampled_counts
from rlseq.evaluation.stats.seeds import MethodResamples, claim_of, difference, methods, resample_method
from rlseq.evaluation.studies.study import Context, Section, Study, Table

WITHIN, ACROSS, SUCCESS, SUCCESS_WITHIN = "spearman_within", "spearman_across", "auroc", "auroc_within"
_HEADERS = {
    WITHIN: "Spearman within rows",
    ACROSS: "Spearman across rows",
    SUCCESS: "AUROC of success, all completions",
    SUCCESS_WITHIN: "AUROC of success within rows",
}
_RANKING = Source("ranking")
_SHOWN = tables.Shown(decimals=2)
_MAX_ENTRIES = 2**21  # of an array (resamples, completions) that is held at once

Place = tuple[str, str | None, str]  # a strategy, a reward (None: being a reference), and the name of a number


@dataclass(frozen=True)
class _Number:
    """A number of one model: on all rows, under N resamples of them, (N,), and over how many rows it is."""

    value: float
    resampled: np.ndarray
    rows: int

    @property
    def cell(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": list(percentiles(self.resampled)), "rows": self.rows}


@dataclass(frozen=True)
class Ranked:
    """A row's completions under one strategy: log-probs, whether each is a reference, and by reward their values."""

    logprobs: list[float]
    right: list[bool] | None  # None if the row has no references
    values: Mapping[str, list[float | None]]


class Ranking(Study):
    """Spearman's correlation of a completion's log-prob with each reward, and AUROC of log-prob for success.

    Under every strategy, of the log-probs on record (under the sampling distribution; of searches, the model's own):

    * within rows: the mean over rows of the correlation among a row's completions, where both vary
    * across rows: the correlation of row means
    * AUROC, where there are references: the chance that a completion that is one of them has a higher log-prob than one
      that is not, over all pairs of completions; and the mean over rows of the same within a row
    """

    name = "ranking"
    costly = False

    def sample(self, context: Context) -> list[dict[str, Ranked]]:
        """By strategy the row's completions, which are there already."""
        records: list[dict[str, Ranked]] = [{} for _ in context.prompts]
        for spec, groups in context.completions.items():
            start = 0
            for row, group in enumerate(groups):
                references, end = context.references[row], start + len(group)
                records[row][spec] = Ranked(
                    [rollout.logprob for rollout in group],
                    [rollout.completion_ids in references for rollout in group] if references else None,
                    {reward: list(values[start:end]) for reward, values in context.values[spec].items()},
                )
                start = end
        context.progress(len(context.prompts))
        return records

    def statistics(self, records: list[dict[str, Ranked]]) -> list[RowStatistics]:
        """Lists over the row's completions: logprob(S) and right(S) of strategy S, reward(S, R) of it and reward R."""
        statistics: list[RowStatistics] = [{} for _ in records]
        for mine, record in zip(statistics, records, strict=True):
            for spec, found in record.items():
                mine[_RANKING("logprob", spec)] = found.logprobs
                if found.right is not None:
                    mine[_RANKING("right", spec)] = [float(right) for right in found.right]
                for reward, values in found.values.items():
                    mine[_RANKING("reward", spec, reward)] = values
        return statistics

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """{"models": {model: {strategy: {"rewards": {reward: {name: cell}}, "auroc": cell, "auroc_within": cell}}},
        "methods": {method: the same}, "comparisons": [{"a", "b", "strategy", "reward", "metric": name, "difference",
        "ci95"}]}

        `methods` has those with several seeds: a cell is the mean over seeds, its interval over seeds and rows, and
        `per_seed`. Comparisons are of checkpoints and of methods with the first, on the same resamples; that of methods
        has what `seeds.claim_of` gives. `reward` is null of AUROC. What is undefined on a side is in neither.
        """
        numbers = {model: _numbers(rows, settings) for model, rows in found.items()}
        if not any(numbers.values()):
            return None
        by_method = methods(found)
        (a, seeds_a), *others = by_method.items()
        sides = [(name, [name]) for _, seeds in others for name in seeds if len(seeds_a) == 1]
        sides += [(b, seeds) for b, seeds in others if max(len(seeds_a), len(seeds)) > 1]
        first = _method_numbers(a, [numbers[seed] for seed in seeds_a], settings)
        comparisons = []
        for b, seeds_b in sides:
            found_b = _method_numbers(b, [numbers[seed] for seed in seeds_b], settings)
            claim = claim_of(len(seeds_a), len(seeds_b)) if len(seeds_a) + len(seeds_b) > 2 else {}
            for strategy, reward, name in (place for place in found_b if place in first):
                r = difference(*(side[strategy, reward, name] for side in (first, found_b)))
                where = {"a": a, "b": b, "strategy": strategy, "reward": reward, "metric": name}
                comparisons.append({**where, "difference": r.difference, "ci95": list(r.ci95), **claim})
        return {
            "models": {model: _nested({place: n.cell for place, n in mine.items()}) for model, mine in numbers.items()},
            "methods": {
                method: _nested(
                    {
                        place: {"value": m.value, "ci95": list(m.ci95), "per_seed": list(m.per_seed)}
                        for place, m in _method_numbers(method, [numbers[seed] for seed in seeds], settings).items()
                    }
                )
                for method, seeds in by_method.items()
                if len(seeds) > 1
            },
            "comparisons": comparisons,
        }

    def section(self, results: Mapping[str, Any]) -> Section:
        """One table per reward, and one of success: of models, of methods, and the differences to the first."""
        block = results["studies"][self.name]
        by_reward: dict[str, list[list[str]]] = {}
        success: list[list[str]] = []
        for who, strategy, entry in _shown(block, results):
            label = [who, tables.labelled(results, strategy)]
            for reward, cells in entry["rewards"].items():
                by_reward.setdefault(reward, []).append(
                    label + [_SHOWN.cell(cells.get(name)) for name in (WITHIN, ACROSS)]
                )
            if SUCCESS in entry and tables.answers_listed(results):
                success.append(label + [_SHOWN.cell(entry.get(name)) for name in (SUCCESS, SUCCESS_WITHIN)])
        shown = [
            Table(["Model", "Decoding", _HEADERS[WITHIN], _HEADERS[ACROSS]], rows, f"Log-prob and {reward}")
            for reward, rows in by_reward.items()
        ]
        if success:
            head = ["Model", "Decoding", _HEADERS[SUCCESS], _HEADERS[SUCCESS_WITHIN]]
            shown.append(Table(head, success, "Log-prob and being a reference"))
        return Section(
            "ranking",
            "Does likelihood know quality?",
            "Spearman's rank correlation between the log-probability of what was generated and its reward: among the "
            "completions of one row (mean over rows where both vary), and between row means. AUROC: the chance that a "
            "completion that equals a reference has a higher log-probability than one that does not (one half: no "
            "knowledge). With 95% bootstrap intervals over rows (of a method, over its seeds and rows); differences "
            "are on the same rows.",
            "across rows an easy prompt has both a likelier and a better completion, and a longer completion a lower "
            "log-probability, so that only what is within rows speaks of choosing among a row's completions. Under "
            "truncating or sharpened sampling the log-probability is that of the sampling distribution.",
            shown,
        )


def _numbers(rows: Sequence[RowStatistics], settings: Any) -> dict[Place, _Number]:
    """Every number of a model that is defined."""
    found: dict[Place, _Number | None] = {}
    keys = dict.fromkeys(key for row in rows for key in row)
    for spec in dict.fromkeys(key.params[0] for key in keys):
        logprob, right = _RANKING("logprob", spec), _RANKING("right", spec)
        for reward in (key.params[1] for key in keys if key.name == "reward" and key.params[0] == spec):
            values = _RANKING("reward", spec, reward)
            pairs = [_present(row.get(logprob, []), row.get(values, [])) for row in rows]
            found[spec, reward, ACROSS] = _across(pairs, settings)
            found[spec, reward, WITHIN] = _mean_within([_spearman_of(*pair) for pair in pairs], settings)
        if right in keys:
            pairs = [_present(row.get(logprob, []), row.get(right, [])) for row in rows]
            found[spec, None, SUCCESS] = _pooled_auroc(pairs, settings)
            within = [auroc(*pair)[0] if len(pair[0]) else np.nan for pair in pairs]
            found[spec, None, SUCCESS_WITHIN] = _mean_within(within, settings)
    return {place: number for place, number in found.items() if number is not None}


def _method_numbers(
    method: str, seeds: Sequence[Mapping[Place, _Number]], settings: Any
) -> dict[Place, MethodResamples]:
    """The numbers of a method that every seed of it has; of one checkpoint its own."""
    return {
        place: resample_method(
            method,
            [mine[place].value for mine in seeds],
            np.stack([mine[place].resampled for mine in seeds], axis=1),
            seed=settings.seed,
        )
        for place in seeds[0]
        if all(place in mine for mine in seeds)
    }


def _nested(cells: Mapping[Place, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By strategy {"rewards": {reward: {name: cell}}, name: cell}."""
    nested: dict[str, dict[str, Any]] = {}
    for (strategy, reward, name), cell in cells.items():
        entry = nested.setdefault(strategy, {"rewards": {}})
        (entry if reward is None else entry["rewards"].setdefault(reward, {}))[name] = cell
    return nested


def _present(logprobs: Sequence[float], values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The completions that have a value."""
    kept = [(a, b) for a, b in zip(logprobs, values, strict=False) if b is not None]
    return np.array([a for a, _ in kept]), np.array([b for _, b in kept])


def _spearman_of(logprobs: np.ndarray, values: np.ndarray) -> float:
    return float(spearman(logprobs, values)[0]) if len(values) > 1 else np.nan


def _mean_within(values: Sequence[float], settings: Any) -> _Number | None:
    """The mean over the rows where a value is defined."""
    defined = np.isfinite(values).astype(float)
    if not defined.any():
        return None
    filled, resampled = np.where(defined, values, 0.0), []
    for counts in _counts(len(values), settings):  # (n, R); summed, not multiplied: equal models then differ by 0
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled.append((counts * filled).sum(1) / (counts * defined).sum(1))
    return _Number(float(filled.sum() / defined.sum()), np.concatenate(resampled), int(defined.sum()))


def _across(pairs: Sequence[tuple[np.ndarray, np.ndarray]], settings: Any) -> _Number | None:
    x, y = (np.array([pair[i].mean() if len(pair[i]) else np.nan for pair in pairs]) for i in (0, 1))
    present = np.isfinite(x) & np.isfinite(y)
    if present.sum() < 3:
        return None
    value = float(spearman(x[present], y[present])[0])
    if not np.isfinite(value):
        return None
    resampled = [spearman(x[present], y[present], counts[:, present]) for counts in _counts(len(pairs), settings)]
    return _Number(value, np.concatenate(resampled), int(present.sum()))


def _pooled_auroc(pairs: Sequence[tuple[np.ndarray, np.ndarray]], settings: Any) -> _Number | None:
    scores, right = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    row_of = np.repeat(np.arange(len(pairs)), [len(pair[0]) for pair in pairs])
    value = float(auroc(scores, right)[0]) if len(scores) else np.nan
    if not np.isfinite(value):
        return None
    resampled = []
    for counts in _counts(len(pairs), settings):
        size = max(1, _MAX_ENTRIES // len(scores))
        resampled += [auroc(scores, right, part[:, row_of]) for part in np.array_split(counts, -(-len(counts) // size))]
    return _Number(value, np.concatenate(resampled), len(pairs))


def _counts(rows: int, settings: Any) -> Iterator[np.ndarray]:
    """Resamples as counts: the first 1,000, since every one of them passes over all completions."""
    return resampled_counts(rows, seed=settings.seed, resamples=min(settings.resamples, 1000))


def _shown(block: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(whose, strategy, entry), strategy by strategy: of models and methods the values, then differences."""
    values = {**block["models"], **block["methods"]}
    entries = {tables.row_name(results, name): values[name] for name in tables.rows(results) if name in values}
    several = {seed for method in results.get("methods", {}).values() for seed in method["checkpoints"]}
    gaps: dict[str, dict[Place, dict[str, Any]]] = {}
    for c in block["comparisons"]:
        if c["b"] not in several:
            cell = {"value": c["difference"], "ci95": c["ci95"]}
            gaps.setdefault(f"{c['b']} − {c['a']}", {})[c["strategy"], c["reward"], c["metric"]] = cell
    entries |= {pair: _nested(cells) for pair, cells in gaps.items()}
    for strategy in dict.fromkeys(s for entry in entries.values() for s in entry):
        for who, entry in entries.items():
            if strategy in entry:
                yield who, strategy, entry[strategy]
