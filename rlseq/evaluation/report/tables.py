"""A contrast's numbers as text and as tables: the part that report.html, report.md and the terminal share.

Reads the dictionary that is written to results.json; computes no statistic of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlseq.evaluation.metrics import BUILT_IN, PASS_AT_K, PASS_METRICS
from rlseq.evaluation.report.formats import NOTHING as NOTHING  # these two for the studies' own tables
from rlseq.evaluation.report.formats import Shown, p_text
from rlseq.evaluation.report.formats import number as number
from rlseq.evaluation.results.primary import is_primary

Results = Mapping[str, Any]
PASS_OVER_K = Shown(
    PASS_AT_K,
    "Exact pass@k",
    PASS_METRICS[1].higher_is_better,
    PASS_METRICS[1].percent,
    "Mean over rows of 1 − (1 − p)^k: the exact chance that at least one of k samples is right.",
)
LEVEL = 0.05  # below which p bears out an interval that excludes zero


@dataclass(frozen=True)
class Comparison:
    """One row of the comparison table, in words and numbers."""

    a: str
    b: str
    strategy: str | None  # of b, and of a unless strategy_a differs; None is teacher forcing
    strategy_a: str | None
    metric: Shown
    value_a: str
    value_b: str
    difference: str
    interval: str
    p: str
    p_adjusted: str  # by Holm, of secondary comparisons
    verdict: str  # better, worse, higher, lower, equal, unclear
    primary: bool
    oracle: bool  # one side chose by the answers
    raw: Mapping[str, Any]

    @property
    def mark(self) -> str:
        return {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "equal": "="}.get(self.verdict, "·")

    @property
    def unseen(self) -> str:
        """What a sentence adds where it claims a difference that the digits shown do not hold; else ""."""
        claimed = self.verdict not in ("equal", "unclear")
        return " by less than is shown" if claimed and self.value_a == self.value_b else ""

    @property
    def of_methods(self) -> bool:
        """Whether it speaks of a method, by several training seeds, rather than of these checkpoints."""
        return self.raw.get("claim") == "method"

    @property
    def seeds(self) -> str:
        """The training seeds behind it: `5 seeds against 1`."""
        return f"{self.raw.get('seeds_b', 1)} seeds against {self.raw.get('seeds_a', 1)}"

    @property
    def power(self) -> str:
        """What its rows could have detected, as a sentence; "" where that is unknown (methods, rows without spread)."""
        found = self.raw.get("power")
        if not found:
            return ""
        smallest = self.metric.difference(found["detectable_difference"]).removeprefix("+")
        point = "one percentage point" if self.metric.percent else f"a difference of {found['unit']:g}"
        of = found.get("of", "rows")
        return (
            f"With 80% power these {of} detect a difference of {smallest} (two-sided, 5%); {point} takes "
            f"{found['rows_for_unit']:,} {of}."
        )

    @property
    def where(self) -> str:
        if self.strategy is None:
            return "teacher forcing"
        where = self.strategy if self.strategy_a == self.strategy else f"{self.strategy_a} → {self.strategy}"
        return f"{where} (oracle)" if self.oracle else where


def metric(results: Results, name: str) -> Shown:
    """The metric by this name: what results say of it, else what its own `Metric` says, else its bare name."""
    said = {"label": name, "higher_is_better": None, "percent": False, "description": "", "fault": False}
    said |= BUILT_IN[name].as_json() if name in BUILT_IN else {}
    said |= results.get("metrics", {}).get(name, {})
    return Shown(
        name=name,
        label=said["label"],
        better=said["higher_is_better"],
        percent=said["percent"],
        description=said["description"],
        decimals=1 if said["percent"] else _decimals(results, name),
        table=said.get("table") or ("shape" if said["higher_is_better"] is None else "quality"),
        fault=said["fault"],
    )


def cell(results: Results, model: str, strategy: str | None, name: str) -> Mapping[str, Any] | None:
    """The `{"value", "ci95"}` of a metric; strategy None means likelihood. None when it was not measured.

    The exact pass@k has a block of its own within it.
    """
    entry = results["models"].get(model) or results.get("methods", {}).get(model, {})
    if strategy is None:
        block = entry.get("likelihood") or {}
        for key in BUILT_IN[name].place if name in BUILT_IN else (name,):
            block = (block or {}).get(key)
        return block
    return entry.get("strategies", {}).get(strategy, {}).get(name)


def rows(results: Results) -> list[str]:
    """The rows of tables of values: the checkpoints, and after its last seed each method that has several."""
    last = {entry["checkpoints"][-1]: method for method, entry in results.get("methods", {}).items()}
    return [name for model in results["models"] for name in (model, last.get(model)) if name is not None]


def row_name(results: Results, name: str) -> str:
    """A checkpoint or method as tables of values name it."""
    method = results.get("methods", {}).get(name)
    return name if method is None else f"{name}: mean of {method['seeds']} seeds"


def shown_comparisons(results: Results) -> list[Comparison]:
    """The comparisons that a report has room for: where a method has several seeds, not those of its single seeds."""
    seeds = {name for entry in results.get("methods", {}).values() for name in entry["checkpoints"]}
    return [c for c in comparisons(results) if not {c.a, c.b} & seeds]


def strategies(results: Results) -> list[str]:
    return list(dict.fromkeys(s for m in results["models"].values() for s in m.get("strategies", {})))


def is_oracle(results: Results, strategy: str | None) -> bool:
    """Whether a strategy selects by what a user's prompt does not contain, such as references."""
    return any(m.get("strategies", {}).get(strategy, {}).get("oracle") for m in results["models"].values())


def fair_strategies(results: Results) -> list[str]:
    """The strategies without the oracles; all, if they are all oracles."""
    every = strategies(results)
    return [s for s in every if not is_oracle(results, s)] or every


def labelled(results: Results, strategy: str) -> str:
    """A strategy as tables name it: with whether it is an oracle or tuned."""
    tuned = strategy in results.get("tuned", {}).get("strategies", {})
    labels = ["oracle"] * is_oracle(results, strategy) + ["tuned"] * tuned
    return f"{strategy} ({', '.join(labels)})" if labels else strategy


def answers_listed(results: Results) -> bool:
    """Whether the references list the right answers, as far as is known."""
    return results.get("right_answers", {}).get("listed", True)


def is_shown(results: Results, name: str) -> bool:
    """Whether a report shows a metric: not one that means nothing for these references, unless it has the claim."""
    misleading = name in BUILT_IN and BUILT_IN[name].needs_all_answers and not answers_listed(results)
    return not misleading or (results.get("primary") or {}).get("metric") == name


def quality_metrics(results: Results) -> list[str]:
    """Names of the metrics of completions."""
    return [name for name in _strategy_metrics(results) if metric(results, name).table not in ("chance", "likelihood")]


def _strategy_metrics(results: Results) -> list[str]:
    blocks = [s for m in results["models"].values() for s in m.get("strategies", {}).values()]
    names = dict.fromkeys(name for block in blocks for name, value in block.items() if is_cell(value))
    return [name for name in names if is_shown(results, name)]


def generated(results: Results) -> list[tuple[str, list[Shown]]]:
    """The metrics of what is generated, as tables with their captions: how good it is, then what it looks like."""
    infos = [metric(results, name) for name in quality_metrics(results)]
    good = [info for info in infos if info.table == "quality"]
    return [("", good), ("The shape of the completions", [info for info in infos if info not in good])]


def likelihood_metrics(results: Results) -> list[str]:
    """Names of the likelihood scalars; empty when no model has references to score."""
    blocks = [m.get("likelihood") or {} for m in results["models"].values()]
    names = dict.fromkeys(n for block in blocks for n, v in block.items() if is_cell(v))
    return [name for name in names if is_shown(results, name)]


def shown(info: Shown, found: Mapping[str, Any] | None) -> str:
    """A value as tables have it: with how many completions it is of, where that is not all."""
    return info.value(found["value"]) + of_completions(found) if found else NOTHING


def of_completions(found: Mapping[str, Any]) -> str:
    """What stands behind a value that is not of all completions; else ""."""
    if "completions" not in found:
        return ""
    return f" (of {found['completions']:,} of {found['of']:,} completions)"


def is_cell(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def agreements(results: Results) -> list[str]:
    """One sentence per model: on how many rows greedy decoding and teacher forcing agree."""
    found = []
    for model, entry in results["models"].items():
        counts = entry.get("greedy_and_teacher_forcing")
        if not counts:
            continue
        text = f"{model}: greedy and teacher forcing agree on {counts['agree']:,} of {counts['rows']:,} rows"
        aside = [(counts["near_ties"], "part at a near tie"), (counts["disagree"], "disagree, as many as is tolerated")]
        text += "".join(f", {n:,} {what}" for n, what in aside if n)
        found.append(f"{text}; greedy reproduces a reference on {counts['reproduced']:,}.")
    return found


def pass_curves(results: Results) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Model -> k -> cell of the exact pass@k."""
    curves: dict[str, dict[int, Mapping[str, Any]]] = {}
    if not answers_listed(results):
        return curves
    for name, entry in results["models"].items():
        curve = (entry.get("likelihood") or {}).get(PASS_AT_K)
        if curve:
            curves[name] = {int(k): v for k, v in curve.items()}
    return curves


def comparisons(results: Results) -> list[Comparison]:
    """Every comparison that is shown, the primary one first, otherwise in the order measured."""
    found = []
    for raw in (c for c in results.get("comparisons", ()) if is_shown(results, c["metric"])):
        info = metric(results, raw["metric"])
        strategy_a = raw.get("strategy_a", raw["strategy"])
        values, partial = [], []
        for side, strategy in (("a", strategy_a), ("b", raw["strategy"])):
            found_cell = cell(results, raw[side], strategy, raw["metric"]) or {}
            values.append(raw.get(f"value_{side}", found_cell.get("value")))
            partial.append(of_completions(found_cell))
        verdict = _verdict(raw, info.better)
        if verdict not in ("equal", "unclear"):
            info = _telling(info, *values)
        found.append(
            Comparison(
                a=raw["a"],
                b=raw["b"],
                strategy=raw["strategy"],
                strategy_a=strategy_a,
                metric=info,
                value_a=info.value(values[0]) + partial[0],
                value_b=info.value(values[1]) + partial[1],
                difference=info.difference(raw["difference"]),
                interval=info.difference_interval(raw["ci95"]),
                p=p_text(raw.get("p_value")),
                p_adjusted=p_text(raw.get("p_adjusted")),
                verdict=verdict,
                primary=is_primary(raw, results.get("primary")),
                oracle=any(is_oracle(results, s) for s in (strategy_a, raw["strategy"])),
                raw=raw,
            )
        )
    return sorted(found, key=lambda c: not c.primary)


def adjustment(results: Results) -> str:
    """A sentence: how many secondary comparisons there are, and how many of them hold after the adjustment."""
    count = results.get("adjustment", {}).get("comparisons", 0)
    if not count:
        return ""
    adjusted_ps = (raw.get("p_adjusted") for raw in results["comparisons"])
    held = sum(p is not None and p < LEVEL for p in adjusted_ps)
    return (
        f"There are {count:,} secondary comparisons, those of the curves included. p (Holm) is adjusted for their "
        f"number; it is below {LEVEL:g} for {held:,}. Verdicts use the unadjusted p."
    )


def definitions(results: Results) -> list[Shown]:
    """Every metric that the report shows, each once."""
    names = dict.fromkeys([*likelihood_metrics(results), *_strategy_metrics(results)])
    curve = [PASS_OVER_K] if pass_curves(results) else []
    return [*(metric(results, name) for name in names), *curve]


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, list | tuple):
        yield prefix, ", ".join(map(str, settings))
    else:
        yield prefix, str(settings)


def _verdict(raw: Mapping[str, Any], better: bool | None) -> str:
    low, high = raw["ci95"]
    if low == high == 0:
        return "equal"
    if low is None or high is None or not (low > 0 or high < 0):  # undefined, or the interval holds 0
        return "unclear"
    if (raw.get("p_value") or 0.0) >= LEVEL:  # bootstrap intervals of a handful of rows are too narrow
        return "unclear"
    rose = raw["difference"] > 0
    if better is None:
        return "higher" if rose else "lower"
    return "better" if rose == better else "worse"


def _telling(info: Shown, a: float | None, b: float | None) -> Shown:
    """The metric with the decimals that tell two values apart, up to 4 more; without more where these do not."""
    finer = (dataclasses.replace(info, decimals=info.decimals + more) for more in range(5))
    return next((one for one in finer if one.value(a) != one.value(b)), info)


def _decimals(results: Results, name: str) -> int:
    """Decimals that show two digits of the narrowest interval's half-width; at most 4."""
    cells = [cell(results, model, s, name) for model in results["models"] for s in (None, *strategies(results))]
    widths = [(c["ci95"][1] - c["ci95"][0]) / 2 for c in cells if is_cell(c) and None not in c["ci95"]]
    widths = [w for w in widths if w > 0]
    if not widths:
        return 3
    return min(4, max(0, 1 - math.floor(math.log10(min(widths)))))
