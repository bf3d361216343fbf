"""The report's section on own and gold prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.evaluation.metrics import EXACT_MATCH
from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.studies.study import Section, Table

GOLD, OWN = "gold", "own"
GAP, ALONE, BEYOND = "difference", "prefix_alone", "beyond"
EXACT = EXACT_MATCH.name


def prefixes_section(block: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    """The block of `rlseq.evaluation.studies.prefixes.Prefixes.results` as tables and figures."""
    title = "Own prefixes against gold prefixes"
    if not block["rows"]:
        return Section("prefixes", title, "Skipped: the data has no references, and so no gold prefixes.", "")
    without = block["rows_without_references"]
    shown = [_entropy_table(block), _pairs_table(block)]
    drawn = {"prefixes-entropy": _entropy_figure(block, list(results["models"]))}
    metrics = dict.fromkeys(
        name for m in block["models"].values() for entry in m["continued"].values() for name in entry["metrics"]
    )
    for number, name in enumerate(metrics):
        shown.append(_quality_table(block, results, name))
        drawn[f"prefixes-quality-{number}"] = _quality_figure(block, results, name)
    if len(block["models"]) > 1:
        shown.append(_comparison_table(block, results))
    return Section(
        "prefixes",
        title,
        "Entropy (nats) of the next-token distribution after t tokens of a reference (gold), and of what the model "
        "itself sampled (own): mean over rows, at each position over the sequences that reach it. Quality: the first "
        "k tokens of a reference or of an own sample are forced, the model samples the rest, and the whole completion "
        "is scored; own − gold is what own prefixes cost. A right own prefix begins a reference. "
        "Prefix alone: the own prefix followed by the rest of a reference, less the reference itself. Beyond: "
        "own − gold less that; below 0 the continuation suffers too, above 0 it recovers."
        + (f" {without:,} rows without references are left out." if without else ""),
        "a gold prefix gives a part of the answer away, so that own − gold is no measure of exposure bias by itself, "
        "and changes with k for that alone. Prefix alone takes this off only where a reward adds up over tokens, and "
        "only as well as own and gold tokens align at k. Later positions and longer prefixes are of the rows that are "
        "so long: other ones for each k, and for each model and side.",
        shown,
        drawn,
    )


def _entropy_table(block: Mapping[str, Any]) -> Table:
    """Positions 0, 1, 2, 4, 8, ...; the plot has all."""
    rows = []
    for model, entry in block["models"].items():
        for t, gold in entry["entropy"][GOLD].items():
            if int(t) & (int(t) - 1) == 0:
                own, gap = (entry["entropy"].get(side, {}).get(t) for side in (OWN, GAP))
                counts = [f"{cell['rows'] if cell else 0:,}" for cell in (gold, own)]
                rows.append([model, t, *counts, *(_plain(cell) for cell in (gold, own)), _plain(gap, signed=True)])
    head = ["Model", "Position", "Rows, gold", "Rows, own", "Gold", "Own", "Own − gold, rows with both"]
    return Table(head, rows, "Entropy of the next token (nats) by tokens read")


def _pairs_table(block: Mapping[str, Any]) -> Table:
    share = tables.Shown(percent=True)
    rows = [
        [model, length, f"{found['rows']:,}", f"{found['pairs']:,}", _value(share, found.get("right"))]
        for model, entry in block["models"].items()
        for length, found in entry["continued"].items()
    ]
    return Table(["Model", "k", "Rows", "Pairs", "Right own prefixes"], rows, "What is continued")


def _quality_table(block: Mapping[str, Any], results: Mapping[str, Any], name: str) -> Table:
    info, rows = tables.metric(results, name), []
    parts = [] if name == EXACT else [ALONE, BEYOND]
    for model, entry in block["models"].items():
        for length, found in entry["continued"].items():
            cells = found["metrics"].get(name, {})
            shown = [_value(info, cells.get(side)) for side in (GOLD, OWN)]
            shown += [_difference(info, cells.get(side)) for side in (GAP, *parts)]
            rows.append([model, length, *shown])
    head = ["Model", "k", "Gold prefix", "Own prefix", "Own − gold"]
    head += ["Prefix alone", "Beyond"] if parts else []
    return Table(head, rows, f"{info.label} of completions begun by k forced tokens")


def _comparison_table(block: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    rows = []
    for c in sorted(block["comparisons"], key=lambda c: c["metric"]):  # stable: by prefix within
        if c["side"] == GAP and c["difference"] is not None:
            info = tables.metric(results, c["metric"])
            text = f"{info.difference(c['difference'])} ({info.difference_interval(c['ci95'])})"
            rows.append([f"{c['b']} − {c['a']}", info.label, c["prefix"], text])
    return Table(["Models", "Metric", "k", "Difference of own − gold"], rows, "Does the gap differ between models?")


def _entropy_figure(block: Mapping[str, Any], models: Sequence[str]) -> tuple[str, str]:
    lines = [
        (f"{model}, {side}", plots.color_of(models, model), style, _by_number(entry["entropy"][side]))
        for model, entry in block["models"].items()
        for side, style in ((GOLD, "--"), (OWN, "-"))
    ]
    figure = plots.curves(lines, x_label="position: tokens read", y_label="entropy of the next token (nats)")
    return "Entropy after gold (dashed) and own prefixes, with 95% bands over rows", plots.to_svg(figure)


def _quality_figure(block: Mapping[str, Any], results: Mapping[str, Any], name: str) -> tuple[str, str]:
    info = tables.metric(results, name)
    lines = [
        (f"{model}, {side}", plots.color_of(list(results["models"]), model), style, cells)
        for model, entry in block["models"].items()
        for side, style in ((GOLD, "--"), (OWN, "-"))
        if (cells := _by_number({k: e["metrics"][name][side] for k, e in entry["continued"].items() if e["rows"]}))
    ]
    figure = plots.curves(lines, x_label="k forced tokens", y_label=info.label, percent=info.percent)
    return f"{info.label} after gold (dashed) and own prefixes, with 95% bands over rows", plots.to_svg(figure)


def _by_number(cells: Mapping[str, Mapping[str, Any]]) -> dict[float, Mapping[str, Any]]:
    return {float(key): cell for key, cell in cells.items()}


def _plain(cell: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if cell is None:
        return tables.NOTHING
    value, low, high = (tables.number(x, 3, signed=signed) for x in (cell["value"], *cell["ci95"]))
    return f"{value} ({low} to {high})"


def _value(info: tables.Shown, cell: Mapping[str, Any] | None) -> str:
    return tables.NOTHING if cell is None else f"{info.value(cell['value'])} ({info.interval(cell['ci95'])})"


def _difference(info: tables.Shown, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return tables.NOTHING
    return f"{info.difference(cell['value'])} ({info.difference_interval(cell['ci95'])})"
