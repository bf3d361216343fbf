"""Does likelihood know quality: are a model's better completions likelier, within a row and across rows?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlseq.evaluation import tables
from rlseq.evaluation.association import auroc, spearman
from rlseq.evaluation.stats import RatioOfSums, percentiles, resampled_counts
from rlseq.evaluation.study import Context, RowStatistics, Section, StudyMetric, Table, summarise
from rlseq.scoring import RewardSuite

WITHIN, ACROSS, SUCCESS, SUCCESS_WITHIN = "spearman_within", "spearman_across", "auroc", "auroc_within"
_HEADERS = {
    WITHIN: "Spearman within rows",
    ACROSS: "Spearman across rows",
    SUCCESS: "AUROC of success, all completions",
    SUCCESS_WITHIN: "AUROC of success within rows",
}
_MAX_ENTRIES = 2**21  # of an array (resamples, completions) that is held at once


class Ranking:
    """Spearman's correlation of a completion's log-prob with each reward, and AUROC of log-prob for success.

    Under every strategy, of the log-probs on record (under the distribution drawn from; of searches, the model's own):

    * within rows: the mean over rows of the correlation among a row's completions, where both vary
    * across rows: the correlation of row means
    * AUROC, where there are references: the chance that a completion that is one of them has a higher log-prob than one
      that is not, over all pairs of completions; and the mean over rows of the same within a row
    """

    name = "ranking"
    costly = False

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Nothing can be wrong."""

    def measure(self, context: Context) -> list[RowStatistics]:
        """Per strategy S and reward R, lists over the row's completions: `S|logprob`, `S|right`, `S|reward:R`."""
        statistics: list[RowStatistics] = [{} for _ in context.prompts]
        for signature, groups in context.completions.items():
            start = 0
            for row, group in enumerate(groups):
                mine = statistics[row]
                mine[f"{signature}|logprob"] = [rollout.logprob for rollout in group]
                if context.references[row]:
                    mine[f"{signature}|right"] = [float(r.completion_ids in context.references[row]) for r in group]
                for reward, values in context.values[signature].items():
                    mine[f"{signature}|reward:{reward}"] = list(values[start : start + len(group)])
                start += len(group)
        context.progress(len(context.prompts))
        return statistics

    def results(self, found: Mapping[str, Sequence[RowStatistics]], settings: Any) -> dict[str, Any] | None:
        """{"models": {model: {strategy: {"rewards": {reward: {name: cell}}, "auroc": cell, "auroc_within": cell}}}}."""
        models: dict[str, Any] = {}
        for model, rows in found.items():
            models[model] = {}
            for signature in dict.fromkeys(key.rpartition("|")[0] for row in rows for key in row):
                block = _strategy_block(rows, signature, settings)
                if block:
                    models[model][signature] = block
        return {"models": models} if any(models.values()) else None

    def section(self, block: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
        """A table a reward, and one of success."""
        found = list(_flattened(block))
        by_reward: dict[str, list[list[str]]] = {}
        success: list[list[str]] = []
        for model, strategy, entry in found:
            label = [model, tables.labelled(results, strategy)]
            for reward, cells in entry["rewards"].items():
                by_reward.setdefault(reward, []).append(label + [_text(cells.get(name)) for name in (WITHIN, ACROSS)])
            if SUCCESS in entry:
                success.append(label + [_text(entry.get(name)) for name in (SUCCESS, SUCCESS_WITHIN)])
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
            "knowledge). With 95% bootstrap intervals over rows.",
            "across rows an easy prompt has both a likelier and a better completion, and a longer completion a lower "
            "log-probability, so that only what is within rows speaks of choosing among a row's completions. Under "
            "truncating or sharpened sampling the log-probability is that of the distribution drawn from.",
            shown,
        )


def _strategy_block(rows: Sequence[RowStatistics], signature: str, settings: Any) -> dict[str, Any]:
    rewards = dict.fromkeys(
        key.partition("|reward:")[2] for row in rows for key in row if key.startswith(f"{signature}|reward:")
    )
    block: dict[str, Any] = {"rewards": {}}
    for reward in rewards:
        pairs = [
            _present(row.get(f"{signature}|logprob", []), row.get(f"{signature}|reward:{reward}", [])) for row in rows
        ]
        cells = _across(pairs, settings)
        cells |= _mean_within([_spearman_of(*pair) for pair in pairs], WITHIN, settings)
        if cells:
            block["rewards"][reward] = cells
    if any(f"{signature}|right" in row for row in rows):
        pairs = [_present(row.get(f"{signature}|logprob", []), row.get(f"{signature}|right", [])) for row in rows]
        block |= _pooled_auroc(pairs, settings)
        block |= _mean_within([auroc(*pair)[0] if len(pair[0]) else np.nan for pair in pairs], SUCCESS_WITHIN, settings)
    return block if len(block) > 1 or block["rewards"] else {}


def _present(logprobs: Sequence[float], values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The completions that have a value."""
    kept = [(a, b) for a, b in zip(logprobs, values, strict=False) if b is not None]
    return np.array([a for a, _ in kept]), np.array([b for _, b in kept])


def _spearman_of(logprobs: np.ndarray, values: np.ndarray) -> float:
    return float(spearman(logprobs, values)[0]) if len(values) > 1 else np.nan


def _mean_within(values: Sequence[float], name: str, settings: Any) -> dict[str, Any]:
    """The mean over the rows where a value is defined, with the number of those."""
    rows = [{"value": float(v), "defined": 1.0} if np.isfinite(v) else {} for v in values]
    defined = sum(bool(row) for row in rows)
    if not defined:
        return {}
    metrics = {name: StudyMetric(("value", "defined"), RatioOfSums())}
    cell = summarise({"": rows}, metrics, settings)["models"][""][name]
    return {name: {**cell, "rows": defined}}


def _across(pairs: Sequence[tuple[np.ndarray, np.ndarray]], settings: Any) -> dict[str, Any]:
    x, y = (np.array([pair[i].mean() if len(pair[i]) else np.nan for pair in pairs]) for i in (0, 1))
    present = np.isfinite(x) & np.isfinite(y)
    if present.sum() < 3:
        return {}
    value = float(spearman(x[present], y[present])[0])
    if not np.isfinite(value):
        return {}
    draws = [spearman(x[present], y[present], counts[:, present]) for counts in _counts(len(pairs), settings)]
    ci95 = list(percentiles(np.concatenate(draws)))
    return {ACROSS: {"value": value, "ci95": ci95, "rows": int(present.sum())}}


def _pooled_auroc(pairs: Sequence[tuple[np.ndarray, np.ndarray]], settings: Any) -> dict[str, Any]:
    scores, right = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    row_of = np.repeat(np.arange(len(pairs)), [len(pair[0]) for pair in pairs])
    value = float(auroc(scores, right)[0]) if len(scores) else np.nan
    if not np.isfinite(value):
        return {}
    draws = []
    for counts in _counts(len(pairs), settings):
        size = max(1, _MAX_ENTRIES // len(scores))
        draws += [auroc(scores, right, part[:, row_of]) for part in np.array_split(counts, -(-len(counts) // size))]
    return {SUCCESS: {"value": value, "ci95": list(percentiles(np.concatenate(draws))), "rows": len(pairs)}}


def _counts(rows: int, settings: Any) -> Iterator[np.ndarray]:
    """Resamples as counts: the first 1,000, since every one of them passes over all completions."""
    return resampled_counts(rows, seed=settings.seed, resamples=min(settings.resamples, 1000))


def _flattened(block: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(model, strategy, entry), strategy by strategy."""
    for strategy in dict.fromkeys(s for entries in block["models"].values() for s in entries):
        for model, entries in block["models"].items():
            if strategy in entries:
                yield model, strategy, entries[strategy]


def _text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return tables.NOTHING
    low, high = (tables.number(x, 2) for x in cell["ci95"])
    return f"{tables.number(cell['value'], 2)} ({low} to {high})"
