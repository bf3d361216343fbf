"""The report's section on exposure bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlseq.evaluation.metrics import EXACT_MATCH
from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.studies.study import Section, Table

REFERENCE, MODEL = "reference", "model"
GAP, ALONE, BEYOND = "difference", "prefix_alone", "beyond"
EXACT = EXACT_MATCH.name
_NATS = tables.Shown(decimals=3)


def section_of(block: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    """The block of `rlseq.evaluation.studies.exposure_bias.ExposureBias.results` as tables and figures."""
    title = "Exposure bias: model prefixes against reference prefixes"
    if not block["rows"]:
        return Section("exposure_bias", title, "Skipped: the data has no references, and so no reference prefixes.", "")
    without = block["rows_without_references"]
    shown = [_entropy_table(block), _pairs_table(block)]
    figures = {"exposure-bias-entropy": _entropy_figure(block, list(results["models"]))}
    metrics = dict.fromkeys(
        name for m in block["models"].values() for entry in m["continued"].values() for name in entry["metrics"]
    )
    for number, name in enumerate(name for name in metrics if tables.is_shown(results, name)):
        shown.append(_quality_table(block, results, name))
        figures[f"exposure-bias-quality-{number}"] = _quality_figure(block, results, name)
    if len(block["models"]) > 1:
        shown.append(_comparison_table(block, results))
    return Section(
        "exposure_bias",
        title,
        "Entropy (nats) of the next-token distribution after t tokens of a reference, and of what the model "
        "itself sampled: mean over rows, at each position over the sequences that reach it. Quality: the first "
        "k tokens of a reference or of a sample are forced, the model samples the rest, and the whole completion "
        "is scored; model − reference is what the model's prefixes cost. A right prefix begins a reference. "
        "Prefix alone: the model prefix followed by the rest of a reference, less the reference itself. Beyond: "
        "model − reference less that; below 0 the continuation suffers too, above 0 it recovers."
        + (f" {without:,} rows without references are left out." if without else ""),
        "a reference prefix reveals a part of the answer, so that model − reference alone is no measure of exposure "
        "bias, and changes with k for that reason. Prefix alone takes this off only where a reward adds up over "
        "tokens, and only as well as model and reference tokens align at k. Later positions and longer prefixes cover "
        "only rows that are long enough: other ones for each k, model and side.",
        shown,
        figures,
    )


def _entropy_table(block: Mapping[str, Any]) -> Table:
    """Positions 0, 1, 2, 4, 8, ...; the plot has all."""
    rows = []
    for model, entry in block["models"].items():
        for t, reference in entry["entropy"][REFERENCE].items():
            if int(t) & (int(t) - 1) == 0:
                model_cell, gap = (entry["entropy"].get(side, {}).get(t) for side in (MODEL, GAP))
                counts = [f"{cell['rows'] if cell else 0:,}" for cell in (reference, model_cell)]
                rows.append(
                    [
                        model,
                        t,
                        *counts,
                        *(_NATS.cell(cell) for cell in (reference, model_cell)),
                        _NATS.change(gap, "value"),
                    ]
                )
    head = ["Model", "Position", "Rows, reference", "Rows, model", "Reference", "Model prefix"]
    head.append("Model − reference, rows with both")
    return Table(head, rows, "Entropy of the next token (nats) by tokens read")


def _pairs_table(block: Mapping[str, Any]) -> Table:
    share = tables.Shown(percent=True)
    rows = [
        [model, length, f"{found['rows']:,}", f"{found['pairs']:,}", share.cell(found.get("right"))]
        for model, entry in block["models"].items()
        for length, found in entry["continued"].items()
    ]
    return Table(["Model", "k", "Rows", "Pairs", "Right model prefixes"], rows, "What is continued")


def _quality_table(block: Mapping[str, Any], results: Mapping[str, Any], name: str) -> Table:
    info, rows = tables.metric(results, name), []
    parts = [] if name == EXACT else [ALONE, BEYOND]
    for model, entry in block["models"].items():
        for length, found in entry["continued"].items():
            cells = found["metrics"].get(name, {})
            shown = [info.cell(cells.get(side)) for side in (REFERENCE, MODEL)]
            shown += [info.change(cells.get(side), "value") for side in (GAP, *parts)]
            rows.append([model, length, *shown])
    head = ["Model", "k", "Reference prefix", "Model prefix", "Model − reference"]
    head += ["Prefix alone", "Beyond"] if parts else []
    return Table(head, rows, f"{info.label} of completions begun by k forced tokens")


def _comparison_table(block: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    rows = []
    for c in sorted(block["comparisons"], key=lambda c: c["metric"]):  # stable: by prefix within
        if c["side"] == GAP and c["difference"] is not None and tables.is_shown(results, c["metric"]):
            info = tables.metric(results, c["metric"])
            rows.append([f"{c['b']} − {c['a']}", info.label, c["prefix"], info.change(c)])
    return Table(
        ["Models", "Metric", "k", "Difference of model − reference"], rows, "Does the gap differ between models?"
    )


def _entropy_figure(block: Mapping[str, Any], models: Sequence[str]) -> tuple[str, str]:
    lines = [
        (f"{model}, {side}", plots.color_of(models, model), style, _by_number(entry["entropy"][side]))
        for model, entry in block["models"].items()
        for side, style in ((REFERENCE, "--"), (MODEL, "-"))
    ]
    figure = plots.curves(lines, x_label="position: tokens read", y_label="entropy of the next token (nats)")
    return "Entropy after reference (dashed) and model prefixes, with 95% bands over rows", plots.to_svg(figure)


def _quality_figure(block: Mapping[str, Any], results: Mapping[str, Any], name: str) -> tuple[str, str]:
    info = tables.metric(results, name)
    lines = [
        (f"{model}, {side}", plots.color_of(list(results["models"]), model), style, cells)
        for model, entry in block["models"].items()
        for side, style in ((REFERENCE, "--"), (MODEL, "-"))
        if (cells := _by_number({k: e["metrics"][name][side] for k, e in entry["continued"].items() if e["rows"]}))
    ]
    figure = plots.curves(lines, x_label="k forced tokens", y_label=info.label, percent=info.percent)
    return f"{info.label} after reference (dashed) and model prefixes, with 95% bands over rows", plots.to_svg(figure)


def _by_number(cells: Mapping[str, Mapping[str, Any]]) -> dict[float, Mapping[str, Any]]:
    return {float(key): cell for key, cell in cells.items()}
