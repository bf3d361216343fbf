"""The report's section on coverage: tables of the curves over k, and their plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.studies.study import Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXACT = "exact_pass_at_k"
_LINES = ("-", "--", ":")  # of a family's curves, in turn


@dataclass(frozen=True)
class _Family:
    """The curves of one metric: of the best of k, of their majority and, of exact match, of the first without sampling.

    `curves` are (name in results.json, label), in the order of `_LINES`.
    """

    info: tables.Shown
    curves: tuple[tuple[str, str], ...]

    @property
    def scale(self) -> float:
        return 100.0 if self.info.percent else 1.0


def section_of(block: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    """For each metric a plot and a table of values, and of differences if there are; then the agreement."""
    models, shown, figures = list(results["models"]), [], {}
    families = list(_families(block, results))
    names = plots.file_names("coverage", [family.info.name for family in families])
    for name, family in zip(names, families, strict=True):
        info, (solid, dashed, *dotted) = family.info, (label for _, label in family.curves)
        shown.append(_values(block, family))
        curves = {
            (model, curve): found[curve]
            for model, found in block["models"].items()
            for curve, _ in family.curves
            if curve != _EXACT and curve in found
        }
        lines = f"with 95% bands. Solid: {solid}; dashed: {dashed}"
        said = f"{info.label} over k samples, {lines}"
        figures[name] = (said, plots.to_svg(_plot(curves, models, family, "value")))
        compared = {(c["b"], c["curve"]): c for c in block["comparisons"] if c["curve"] in dict(family.curves)}
        if compared:
            shown.append(_differences(block, family, list(compared.values())))
            gaps = {place: c["differences"] for place, c in compared.items()}
            said = f"{info.label}: difference to {next(iter(compared.values()))['a']}, {lines}"
            said += "; dotted: exact, without sampling" if dotted else ""
            figures[f"{name}-difference"] = (said, plots.to_svg(_plot(gaps, models, family, "difference")))
    if block["agreement"]:
        shown.append(_agreement(block))
    return Section(
        "coverage-sampled",
        "Coverage: what k samples hold",
        f"From n = {block['samples']} ancestral samples of each of {block['rows']:,} rows (temperature 1, no "
        "truncation), the expectation over all choices of k among them: that at least one equals a reference (pass@k, "
        "Chen et al. 2021), the largest reward (best of k), and the success and reward of the most frequent text "
        "(majority of k; of texts that tie, each with the same chance). With 95% bootstrap intervals over rows, each "
        "for one k by itself.",
        "at least one right and best of k know the answer: they say what the samples hold, not what a decoder would "
        "find. A model that gains at k = 1 and loses at large k has sharpened what its start could do already (Yue et "
        "al. 2025). Majorities at k near n are close to the one majority of these n samples, so that they have more of "
        "its noise. A completion that was cut at the length limit votes like any other. Where a reward abstains, a "
        "choice of k counts as far as it has a value.",
        shown,
        figures,
    )


def _families(block: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[_Family]:
    curves = dict.fromkeys(curve for found in block["models"].values() for curve in found)
    if "pass_at_k" in curves and tables.answers_listed(results):
        parts = (
            ("pass_at_k", "at least one right"),
            ("majority.exact_match", "majority right"),
            (_EXACT, "at least one right, exact"),
        )
        yield _Family(tables.metric(results, "exact_match"), parts)
    for name in results["metrics"]:
        if f"best_of_k.{name}" in curves:
            parts = ((f"best_of_k.{name}", "best of k"), (f"majority.{name}", "majority of k"))
            yield _Family(tables.metric(results, name), parts)


def _values(block: Mapping[str, Any], family: _Family) -> Table:
    ks, info, rows = _ks(block), family.info, []
    for curve, label in family.curves:
        for model, found in block["models"].items():
            if curve in found:
                cells = [found[curve][k] for k in ks]
                rows.append([model, label, *map(info.cell, cells)])
    return Table(["Model", "Of k samples", *(f"k = {k}" for k in ks)], rows, info.label)


def _differences(block: Mapping[str, Any], family: _Family, compared: Sequence[Mapping[str, Any]]) -> Table:
    ks, info, labels = _ks(block), family.info, dict(family.curves)
    rows, said = [], []
    for c in sorted(compared, key=lambda c: list(labels).index(c["curve"])):
        pair = f"{c['b']} − {c['a']}"
        cells = [c["differences"][k] for k in ks]
        rows.append([pair, labels[c["curve"]], *map(info.change, cells)])
        said.append(f"{pair}, {labels[c['curve']]}: {in_words(c)}.")
    head = ["Models", "Of k samples", *(f"k = {k}" for k in ks)]
    return Table(head, rows, f"{info.label}: differences", " ".join(said))


def in_words(comparison: Mapping[str, Any]) -> str:
    """At which k the interval is clear of 0, on which side, and where the difference changes its sign."""
    sides: dict[str, list[str]] = {"above": [], "below": []}
    for k, d in comparison["differences"].items():
        low, high = d["ci95"]
        if low is not None and low > 0:
            sides["above"].append(k)
        elif high is not None and high < 0:
            sides["below"].append(k)
    parts = [f"{side} 0, interval included, at k = {', '.join(ks)}" for side, ks in sides.items() if ks]
    changes = [f"between k = {k} and {after}" for k, after in comparison["sign_changes"]]
    return "; ".join([*(parts or ["no interval is clear of 0"]), f"changes sign {', '.join(changes) or 'nowhere'}"])


def _agreement(block: Mapping[str, Any]) -> Table:
    rows = []
    for model, found in block["agreement"].items():
        k, worst = max(
            found["differences"].items(),
            key=lambda item: abs(item[1]["difference"]) / max(item[1]["standard_error"], 1e-9),
        )
        gap = tables.number(100 * worst["difference"], 2, signed=True)
        error = tables.number(100 * worst["standard_error"], 2)
        rows.append([model, k, f"{gap} pp", f"{error} pp", "yes" if found["agrees"] else "no"])
    return Table(
        ["Model", "k", "Sampled − exact", "Standard error", "Agree"],
        rows,
        "Check: at least one right, sampled against exact",
        "The k where the two are furthest apart, in standard errors of the sampling, which follow from the exact "
        "chances. They agree if they are within three of these at every k; else sampling or scoring has a fault.",
    )


def _ks(block: Mapping[str, Any]) -> list[str]:
    """Every k up to n; the exact curve has more."""
    found = dict.fromkeys(k for model in block["models"].values() for curve in model.values() for k in curve)
    return [k for k in found if int(k) <= block["samples"]]


def _plot(
    curves: Mapping[tuple[str, str], Mapping[str, Any]], models: Sequence[str], family: _Family, kind: str
) -> Figure:
    """One line per model and curve over k on a logarithmic axis, with its band; the exact curve has none."""
    info, lines = family.info, dict(zip((curve for curve, _ in family.curves), _LINES, strict=False))
    ks = sorted({int(k) for cells in curves.values() for k in cells})
    with plots.styled():
        figure = plots.new_figure(5.6, 3.6)
        axes = figure.subplots()
        for (model, curve), cells in curves.items():
            color, places = plots.color_of(models, model), [int(k) for k in cells]
            points = np.array([[c[kind], *c["ci95"]] for c in cells.values()], dtype=float) * family.scale  # (K, 3)
            if curve != _EXACT:
                alpha = 0.16 if lines[curve] == "-" else 0.07  # two bands of a model lie on each other
                axes.fill_between(places, points[:, 1], points[:, 2], color=color, alpha=alpha, lw=0)
            axes.plot(places, points[:, 0], lines[curve], color=color, lw=1.8)
        if kind == "difference":
            axes.axhline(0, color=plots.MUTED, lw=1.0, zorder=1)
        plots.samples_axis(axes, ks)
        unit = (" (pp)" if kind == "difference" else " (%)") if info.percent else ""
        axes.set_ylabel(info.label + (": difference" if kind == "difference" else "") + unit)
        colors = {model: plots.color_of(models, model) for model, _ in curves}
        handles = [axes.plot([], [], color=color, lw=3, label=model)[0] for model, color in colors.items()]
        for curve, label in family.curves:
            if any(curve == estimate for _, estimate in curves):
                handles += axes.plot([], [], lines[curve], color=plots.MUTED, lw=1.8, label=label)
        plots.legend_above(axes, handles)
    return figure
