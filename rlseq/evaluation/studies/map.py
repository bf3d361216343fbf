"""MAP analysis: a model's most likely completions, proven by exact search, and the decoders that look for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlseq.engine.exact_map import exact_map_prompts, validate_cache
from rlseq.engine.strategies import LOGPROB, Beam, BestOf, Greedy, Strategy, parse_strategy
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.quality import quality_rows
from rlseq.evaluation.metrics import THOUGHT_METRICS, Metric
from rlseq.evaluation.report import tables
from rlseq.evaluation.statistics import Pair, RowStatistics, Source, Statistic, rows_matrix
from rlseq.evaluation.stats.bootstrap import bootstrap_many
from rlseq.evaluation.stats.estimators import RatioOfSums
from rlseq.evaluation.stats.seeds import methods
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, Table, summarise
from rlseq.scoring import RewardSuite
from rlseq.types import Rollout

LIKELIER = 1e-4  # nats by which a completion is likelier than another beyond rounding
_MAP = Source("map")
_SEARCHED, _PROVEN, _LOGPROB, _EMPTY = map(_MAP, ("searched", "proven", "logprob", "empty"))


def _ratio(numerator: Statistic, denominator: Statistic) -> StudyMetric:
    return StudyMetric(Pair(numerator, denominator), RatioOfSums())


_OF_MODES = {"logprob": _ratio(_LOGPROB, _PROVEN), "empty": _ratio(_EMPTY, _PROVEN)}
_SHARE, _NATS = tables.Shown(percent=True), tables.Shown(decimals=3)
_SHOWN = {
    "logprob": tables.Shown("logprob", "Log-prob of the mode", decimals=3),
    "empty": tables.Shown("empty", "Empty modes", percent=True),
}


@dataclass(frozen=True)
class Searched:
    """A row's search.

    Attributes:
        best: the likeliest completion that exact search found.
        proven: whether it is proven to be the mode.
        empty: whether it is a stop id alone.
        others: by strategy that looks for the likeliest completion the one it gave; log-probs are the model's own.
        quality: statistics of `best` (`rlseq.evaluation.measure.quality.quality_rows`).
    """

    best: Rollout
    proven: bool
    empty: bool
    others: Mapping[str, Rollout]
    quality: RowStatistics


class MAP(Study):
    """The mode of each row, by exact search, its quality, and how often decoders find it.

    A mode is known where exact search proved it. A search error of a decoder is known wherever exact search found a
    completion that is likelier, proven or not.
    """

    name = "map"

    def rows(self, settings: Any) -> int | None:
        """The first `map_rows`, if given."""
        return settings.study_rows if settings.map_rows is None else settings.map_rows

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Raise ConfigError for completions that a text may end, which exact search does not look for."""
        if settings.stop_strings:
            raise ConfigError(
                "the study map searches completions that end with an end token, and --stop_strings end them by their "
                "text: leave out one of them"
            )

    def check_model(self, config: Any) -> None:
        """Raise ModelError for a model whose cache cannot go back to a prefix."""
        validate_cache(config)

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """The prefixes that exact search expands, a forward step each."""
        return 0, rows * settings.map_max_nodes

    def sample(self, context: Context) -> list[Searched]:
        """Search every row, and score what was found."""
        settings = context.settings
        found, proven = exact_map_prompts(
            context.model,
            context.prompts,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=context.stop_ids,
            max_nodes=settings.map_max_nodes,
            tokenizer=context.tokenizer,
            batch_rows=settings.eval_batch_size,
            max_kv_gb=settings.max_kv_gb,
            progress=context.progress,
        )
        quality, _ = quality_rows(context.prompts, [[best] for best in found], context.references, context.suite)
        searches = {s: groups for s, groups in context.completions.items() if seeks_the_mode(parse_strategy(s))}
        return [
            Searched(
                best,
                proven[row],
                len(best.completion_ids) == 1 and best.completion_ids[0] in context.stop_ids,
                {strategy: groups[row][0] for strategy, groups in searches.items()},
                quality[row],
            )
            for row, best in enumerate(found)
        ]

    def statistics(self, records: list[Searched]) -> list[RowStatistics]:
        """Per row, with m the mode and S a strategy that looks for it, beside the quality of what was found:

        completion  its text
        searched    1
        proven      1 if it is proven to be m
        logprob     log p(m | x), empty 1 if m is a stop id alone; 0 if unproven
        is(S)       1 if the completion of S is m, token by token; 0 if unproven
        error(S)    1 if exact search found a completion likelier than that of S, or that of S does not end
        """
        rows = []
        for record in records:
            best, proven = record.best, record.proven
            row = {
                _MAP("completion"): best.text,
                _SEARCHED: 1.0,
                _PROVEN: float(proven),
                _LOGPROB: best.logprob if proven else 0.0,
                _EMPTY: float(proven and record.empty),
            }
            for strategy, other in record.others.items():
                equal = other.completion_ids == best.completion_ids
                likelier = other.finish_reason != "stop" or best.logprob > other.logprob + LIKELIER
                row[_MAP("is", strategy)] = float(proven and equal)
                row[_MAP("error", strategy)] = float(likelier and not equal)
            rows.append(row | record.quality)
        return rows

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """Values of each model over its own modes, and differences on the rows with a mode proven for both sides.

        {"models": {model: {"rows", "proven_rows", "proven", "logprob", "empty", "is_mode": {strategy: cell},
        "search_errors": {strategy: cell}, "quality": {metric: cell}}}, "comparisons": [{"a", "b", "metric", "rows",
        "value_a", "value_b", "difference", "ci95"}]}; in a comparison the metric is logprob, empty or one of quality.
        """
        searched = [i for i, rows in enumerate(zip(*found.values(), strict=True)) if any(rows)]
        if not searched:
            return None
        found = {model: [rows[i] for i in searched] for model, rows in found.items()}
        quality = {name: metric for name, metric in metrics.items() if not (metric.sampled or name in THOUGHT_METRICS)}
        return {
            "models": {model: map_results(rows, quality, settings) for model, rows in found.items()},
            "comparisons": _comparisons(found, _OF_MODES | quality, settings),
        }

    def section(self, results: Mapping[str, Any]) -> Section:
        """A table of modes and searches, one of the modes' quality, and one of differences."""
        block = results["studies"][self.name]
        models = block["models"]
        first = next(iter(models.values()))
        searches = list(first.get("is_mode", ()))
        infos = [tables.metric(results, name) for name in first["quality"]]
        infos = [info for info in infos if info.table == "quality"]
        head = ["Model", "Rows proven", "Proven", "Log-prob of the mode", "Empty modes"]
        head += [f"{s} is the mode" for s in searches] + [f"Search errors of {s}" for s in searches]
        rows = []
        for model, entry in models.items():
            cells = [(_SHARE, entry["proven"]), (_NATS, entry["logprob"]), (_SHARE, entry["empty"])]
            cells += [(_SHARE, entry[kind][s]) for kind in ("is_mode", "search_errors") for s in searches]
            rows.append(
                [model, f"{entry['proven_rows']:,} of {entry['rows']:,}", *(info.cell(cell) for info, cell in cells)]
            )
        shown = [Table(head, rows, "Modes, and decoders that look for them")]
        if infos:
            values = [[m, *(i.cell(e["quality"][i.name]) for i in infos)] for m, e in models.items()]
            shown.append(Table(["Model", *(info.label for info in infos)], values, "Quality of the modes"))
        if block["comparisons"]:
            shown.append(_differences(block, {info.name: info for info in infos} | _SHOWN))
        return Section(
            "map",
            "MAP analysis: the most likely completions",
            "The mode is the one most likely completion of all that end within the limit. Exact search (branch and "
            "bound) proves it, or exhausts its budget of nodes and says so. A search error of a decoder: exact search "
            "found a likelier completion, proven to be the mode or not, or the decoder's was cut at the limit. The "
            "shares proven and of search errors are over all rows searched, everything else over rows with a proven "
            "mode. With 95% bootstrap intervals over rows.",
            "rows proven within the budget are the easier ones (short, confident). These numbers describe them and not "
            "all rows. Models are compared on the rows proven for both.",
            shown,
        )


def seeks_the_mode(strategy: Strategy) -> bool:
    """Whether a strategy looks for the completion that the model finds likeliest."""
    one = strategy.members[0]  # those of a sweep look for the same
    return isinstance(one, Greedy | Beam) or (isinstance(one, BestOf) and one.by == LOGPROB)


def map_results(rows: Sequence[RowStatistics], quality: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """One model's block from its searched rows: `MAP.results`."""
    others = list(
        dict.fromkeys(key.params[0] for row in rows for key in row if (key.source, key.name) == ("map", "is"))
    )
    places: dict[tuple[str, str | None], StudyMetric] = {
        ("proven", None): _ratio(_PROVEN, _SEARCHED),
        **{(name, None): metric for name, metric in _OF_MODES.items()},
        **{("is_mode", other): _ratio(_MAP("is", other), _PROVEN) for other in others},
        **{("search_errors", other): _ratio(_MAP("error", other), _SEARCHED) for other in others},
    }
    arrays = {place: (rows_matrix(rows, metric.statistics), metric.aggregate) for place, metric in places.items()}
    proven = _proven(rows)
    for name, metric in quality.items():
        arrays["quality", name] = (rows_matrix(rows, metric.statistics) * proven[:, None], metric.aggregate)
    block: dict[str, Any] = {
        "rows": len(rows),
        "proven_rows": int(proven.sum()),
        **({"is_mode": {}, "search_errors": {}} if others else {}),
        "quality": {},
    }
    intervals = bootstrap_many(arrays, seed=settings.seed, resamples=settings.resamples)
    for (name, inner), interval in intervals.items():
        place = block if inner is None else block[name]
        place[name if inner is None else inner] = {"value": interval.value, "ci95": list(interval.ci95)}
    return block


def _proven(rows: Sequence[RowStatistics]) -> np.ndarray:
    """(R,) 1 where the mode is proven, else 0."""
    return np.array([row.get(_PROVEN, 0.0) for row in rows])


def _comparisons(
    found: Mapping[str, Sequence[RowStatistics]], metrics: Mapping[str, Any], settings: Any
) -> list[dict[str, Any]]:
    """Every model and method against the first, on the rows that every checkpoint of both sides proved."""
    (a, seeds_a), *others = methods(found).items()
    sides = [(b, [b]) for _, seeds in others for b in seeds if len(seeds_a) == 1]
    sides += [(b, seeds) for b, seeds in others if max(len(seeds_a), len(seeds)) > 1]
    compared = []
    for b, seeds_b in sides:
        names = [*seeds_a, *seeds_b]
        known = np.prod([_proven(found[name]) for name in names], axis=0)  # (R,)
        masked = {
            name: [row if proven else {} for row, proven in zip(found[name], known, strict=True)] for name in names
        }
        summary = summarise(masked, metrics, settings)
        for c in summary["comparisons"]:
            if c["b"] != b:
                continue  # a single seed of this method
            values = {
                f"value_{side}": float(np.mean([summary["models"][s][c["metric"]]["value"] for s in seeds]))
                for side, seeds in (("a", seeds_a), ("b", seeds_b))
            }
            compared.append({**c, "a": a, "rows": int(known.sum()), **values})
    return compared


def _differences(block: Mapping[str, Any], infos: Mapping[str, tables.Shown]) -> Table:
    rows = []
    for c in block["comparisons"]:
        if c["metric"] in infos:
            info = infos[c["metric"]]
            values = [info.value(c[f"value_{side}"]) for side in ("a", "b")]
            rows.append([f"{c['b']} − {c['a']}", info.label, f"{c['rows']:,}", *values, info.change(c)])
    head = ["Models", "Metric", "Rows proven for both", "a", "b", "Difference"]
    return Table(head, rows, "Differences on the rows proven for both")
