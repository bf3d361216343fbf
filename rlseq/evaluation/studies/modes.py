"""Modes: what exact search says of a model's most likely completions, and of the searches that look for them.

Rows of statistics first, as everywhere: `add_mode_statistics` writes them beside those of the exact search's
completions, and the rest aggregates them. A mode is known where exact search proved it; a search error is known
wherever exact search found something likelier, proven or not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rlseq.evaluation.metrics import MODE, MODE_EMPTY
from rlseq.evaluation.statistics import Pair, RowStatistics, Statistic, rows_matrix
from rlseq.evaluation.stats.bootstrap import Interval, RatioOfSums, bootstrap_many
from rlseq.evaluation.studies.study import StudyMetric
from rlseq.types import Rollout

LIKELIER = 1e-4  # nats by which a completion is likelier than another beyond rounding
_SEARCHED, _PROVEN, _LOGPROB, _EMPTY = map(MODE, ("searched", "proven", "logprob", "empty"))


def add_mode_statistics(
    statistics: Sequence[RowStatistics],
    signature: str,
    completions: Mapping[str, Sequence[Sequence[Rollout]]],
    proven: Sequence[bool],
    stop_ids: Collection[int],
) -> None:
    """Add to the rows of an exact search what it tells of modes.

        searched    1
        proven      1 where its completion is proven to be the mode m
        logprob     log p(m | x), empty 1 if m is a stop id alone; 0 where unproven
        compared(S) 1 where strategy S has a completion
        is(S)       1 where the completion of strategy S is m, token by token; 0 where unproven
        error(S)    1 where exact search found a completion likelier than that of S, or that of S does not end

    Args:
        statistics: the rows; those beyond `proven` were not searched and stay as they are.
        signature: of the exact search.
        completions: of every strategy that looks for the likeliest completion its one a row, the exact search's among
            them; their log-probs are the model's own.
    """
    for row, is_proven in enumerate(proven):
        (best,) = completions[signature][row]
        mine = statistics[row]
        mine[_SEARCHED], mine[_PROVEN] = 1.0, float(is_proven)
        mine[_LOGPROB] = best.logprob if is_proven else 0.0
        mine[_EMPTY] = float(is_proven and len(best.completion_ids) == 1 and best.completion_ids[0] in stop_ids)
        for strategy, groups in completions.items():
            if strategy == signature or not groups[row]:
                continue
            (other,) = groups[row]
            equal = other.completion_ids == best.completion_ids
            likelier = other.finish_reason != "stop" or best.logprob > other.logprob + LIKELIER
            mine[MODE("compared", strategy)] = 1.0
            mine[MODE("is", strategy)] = float(is_proven and equal)
            mine[MODE("error", strategy)] = float(likelier and not equal)


def _ratio(numerator: Statistic, denominator: Statistic) -> StudyMetric:
    return StudyMetric(Pair(numerator, denominator), RatioOfSums())


def proven_rows(rows: Sequence[RowStatistics]) -> np.ndarray | None:
    """(R,) 1 where the mode is proven, else 0; None for rows of a strategy that is no exact search."""
    if not any(_SEARCHED in row for row in rows):
        return None
    return np.array([row.get(_PROVEN, 0.0) for row in rows])


def mode_results(
    rows: Sequence[RowStatistics], quality: Mapping[str, Any], *, seed: int, resamples: int
) -> dict[str, Any] | None:
    """The `modes` block of an exact search in results.json; None for rows of another strategy.

    Args:
        rows: its per-row statistics.
        quality: the metrics of completions; the block holds their values over the rows with a proven mode.
        seed, resamples: of the bootstrap over rows.
    """
    proven = proven_rows(rows)
    if proven is None:
        return None
    keys = dict.fromkeys(key for row in rows for key in row if key.source == MODE.source and key.name == "compared")
    others = [key.params[0] for key in keys]
    places = {
        ("proven", None): _ratio(_PROVEN, _SEARCHED),
        ("logprob", None): _ratio(_LOGPROB, _PROVEN),
        ("empty", None): MODE_EMPTY,
        **{("is_mode", other): _ratio(MODE("is", other), _PROVEN) for other in others},
        **{("search_errors", other): _ratio(MODE("error", other), _SEARCHED) for other in others},
    }
    tables = {place: (rows_matrix(rows, metric.statistics), metric.aggregate) for place, metric in places.items()}
    for name, metric in quality.items():
        tables["quality", name] = (rows_matrix(rows, metric.statistics) * proven[:, None], metric.aggregate)
    block: dict[str, Any] = {
        "rows": sum(_SEARCHED in row for row in rows),
        "proven_rows": int(proven.sum()),
        **({"is_mode": {}, "search_errors": {}} if others else {}),
    }
    for (name, inner), interval in bootstrap_many(tables, seed=seed, resamples=resamples).items():
        place = block if inner is None else block.setdefault(name, {})
        place[name if inner is None else inner] = _cell(interval)
    return block


def _cell(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "ci95": list(interval.ci95)}
