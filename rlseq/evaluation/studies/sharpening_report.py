"""The study of sharpening as a section of the report: curves of quality over entropy, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.studies.study import Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ONE = "1.0"
_SHAPE = {
    "entropy": tables.Shown("entropy", "Entropy (nats)", decimals=2),
    "unique": tables.Shown("unique", "Distinct", percent=True),
    "top": tables.Shown("top", "Most frequent", percent=True),
    "truncated": tables.Shown("truncated", "Truncated", percent=True),
}


def section_of(block: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    """Figures, then gaps, diversity and values by temperature."""
    models = list(block["models"])
    measured = block["models"][models[0]][_ONE]["quality"]
    infos = [tables.metric(results, name) for name in measured if tables.is_shown(results, name)]
    found = [_gap_table(block, infos, results)] if block["gaps"] else []
    if block["comparisons"]:
        found.append(_diversity_table(block))
    return Section(
        "sharpening",
        "How much of the gain is sharpening?",
        "Quality against the entropy of what is sampled, as the temperature T varies (Caccia et al. 2020). Entropy is "
        "−mean log q(y) over samples y of q, the model's distribution at T: in nats per completion. The line through "
        f"the points of {models[0]} is what its temperature alone can reach; the gap at equal entropy is how far "
        f"another model lies above it. With 95% bootstrap intervals over the first {block['rows']:,} rows; both curves "
        f"are recomputed from each resample's rows. {block['samples_per_row']} samples per row and temperature.",
        "a completion that is cut at the length limit counts with the log-probability of the prefix, so where many are "
        "cut the entropies are too low. Between two temperatures the curve is a straight line: where the true one "
        "bends downwards it lies above the line, and gaps are somewhat too large; more --temperatures make that small. "
        "Equal entropy is not equal diversity among good completions. Shares of distinct and of most frequent "
        "completions depend on the number of samples, and compare at equal numbers only.",
        [*found, _temperature_table(block, infos)],
        {
            figure: (
                f"{info.label} against entropy; numbers are temperatures, dotted lines the gaps at temperature 1",
                plots.to_svg(_curves(block, info)),
            )
            for figure, info in zip(plots.file_names("sharpening", [info.name for info in infos]), infos, strict=True)
        },
    )


def _gap_table(block: Mapping[str, Any], infos: Sequence[tables.Shown], results: Mapping[str, Any]) -> Table:
    by_name = {info.name: info for info in infos}
    rows = []
    for gap in (gap for gap in block["gaps"] if gap["metric"] in by_name):
        info = by_name[gap["metric"]]
        low, high = (tables.number(x, 1) for x in gap["range"])
        rows.append(
            [
                tables.row_name(results, gap["b"]),
                info.label,
                _difference(info, gap["total"]),
                _difference(info, gap.get("sharpening")),
                _difference(info, gap["by_temperature"][_ONE]),
                _difference(info, gap["mean"]),
                f"{low} to {high}",
            ]
        )
    base = block["gaps"][0]["a"]
    note = (
        "Gain = sharpening + gap. Sharpening is what the first model gains when cooled to the other's entropy; it is "
        "stated where the other's entropy at T = 1 is the lower one. n/a: the entropy is outside those of the first "
        "model, or not lower. The mean gap is over all entropies, in nats, that both models reach."
    )
    if any(_partly(cell) for gap in block["gaps"] for cell in (gap["by_temperature"][_ONE], gap["mean"])):
        note += " *: in some resamples the entropy is outside; the interval is over the others."
    if any("claim" in gap for gap in block["gaps"]):
        note += " Of a method: the mean over its seeds, with intervals over seeds and rows."
    if not block["rising"]:
        note += f" The entropy of {base} does not rise with the temperature: its points are joined in order of entropy."
    head = ["Model", "Quality", "Gain", "Sharpening", "Gap at equal entropy"]
    return Table([*head, "Mean gap", "Over entropies"], rows, f"Gains over {base} at T = 1, b − a", note)


def _diversity_table(block: Mapping[str, Any]) -> Table:
    names = [name for name in _SHAPE if name != "truncated"]
    names = [name for name in names if name in block["models"][next(iter(block["models"]))][_ONE]]
    rows: dict[str, list[str]] = {}
    for c in block["comparisons"]:
        if c["metric"] in names:
            cell = {"value": c["difference"], "ci95": c["ci95"]}
            rows.setdefault(c["b"], [c["b"]]).append(_difference(_SHAPE[c["metric"]], cell))
    base = block["comparisons"][0]["a"]
    return Table(
        ["Model", *(_SHAPE[name].label for name in names)], list(rows.values()), f"Diversity at T = 1, b − {base}"
    )


def _temperature_table(block: Mapping[str, Any], infos: Sequence[tables.Shown]) -> Table:
    rows = []
    shape = [name for name in _SHAPE if name in block["models"][next(iter(block["models"]))][_ONE]]
    for model, points in block["models"].items():
        for temperature, point in points.items():
            cells = [(_SHAPE[name], point[name]) for name in shape]
            cells[1:1] = [(info, point["quality"][info.name]) for info in infos]
            rows.append([model, temperature, *(info.cell(cell) for info, cell in cells)])
    labels = [_SHAPE[name].label for name in shape]
    labels[1:1] = [info.label for info in infos]
    return Table(["Model", "T", *labels], rows, "By temperature")


def _difference(info: tables.Shown, cell: Mapping[str, Any] | None) -> str:
    return info.change(cell, "value") + "*" * (cell is not None and _partly(cell))


def _partly(cell: Mapping[str, Any]) -> bool:
    return cell["value"] is not None and cell.get("defined", 1) < 1


def _curves(block: Mapping[str, Any], info: tables.Shown) -> Figure:
    """One line per model in order of entropy, its temperatures beside the points, and the gaps at temperature 1."""
    scale = 100.0 if info.percent else 1.0
    models = list(block["models"])
    with plots.styled():
        figure = plots.new_figure(5.6, 4.0)
        axes = figure.subplots()
        for place, (model, points) in enumerate(block["models"].items()):
            color = plots.color_of(models, model)
            line = sorted(_points(points, info.name))
            axes.plot([p[0] for p in line], [p[1] * scale for p in line], "o-", color=color, lw=1.5, ms=4, label=model)
            for entropy, value, temperature in line:
                axes.annotate(
                    temperature,
                    (entropy, value * scale),
                    xytext=(0, -11 if place == 0 else 5),  # of the base below its line, of others above theirs
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=color,
                )
                low, high = points[temperature]["quality"][info.name]["ci95"]
                axes.plot([entropy, entropy], [low * scale, high * scale], color=color, lw=0.9, alpha=0.6)
        for gap in block["gaps"]:
            cell, model = gap["by_temperature"][_ONE], block["models"].get(gap["b"])  # a method has no one point
            if model is not None and gap["metric"] == info.name and cell["value"] is not None:
                point = model[_ONE]
                top = point["quality"][info.name]["value"]
                ends = [(top - cell["value"]) * scale, top * scale]
                axes.plot([point["entropy"]["value"]] * 2, ends, ":", color=plots.color_of(models, gap["b"]), lw=1.3)
        axes.margins(0.1)
        axes.set_xlabel("entropy (nats per completion)")
        axes.set_ylabel(info.label + (" (%)" if info.percent else ""))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(3, len(models)), fontsize=9)
    return figure


def _points(points: Mapping[str, Any], quality: str) -> Iterator[tuple[float, float, str]]:
    """(entropy, quality, temperature) where both are defined."""
    for temperature, point in points.items():
        entropy, value = point["entropy"]["value"], point["quality"][quality]["value"]
        if entropy is not None and value is not None:
            yield entropy, value, temperature


def headline(results: Mapping[str, Any], a: str, b: str) -> str:
    """How much of the gain at temperature 1 a lower temperature gives too."""
    for gap in results["studies"]["sharpening"].get("gaps", []):
        shown = (gap["a"], gap["b"]) == (a, b) and tables.is_shown(results, gap["metric"])
        if shown and "residual" in gap and gap["total"]["value"] is not None:
            info = tables.metric(results, gap["metric"])
            total, sharpening, residual = (
                info.difference(gap[part]["value"]) for part in ("total", "sharpening", "residual")
            )
            label, interval = _inside(info.label), info.difference_interval(gap["residual"]["ci95"])
            if gap["residual"]["value"] is None:
                return (
                    f"In plain sampling {label} differs by {total}: how much of it a lower temperature gives {a} is "
                    f"not known, as none of those studied makes its samples as little varied as those of {b}."
                )
            if gap["total"]["value"] <= 0:
                return (
                    f"In plain sampling {label} differs by {total}, and a lower temperature of equal entropy gives {a} "
                    f"{sharpening}; the residual is {residual} (95% interval {interval})."
                )
            return (
                f"In plain sampling {label} gains {total}: {sharpening} of it {a} gains, too, at a lower temperature "
                f"of equal entropy; the residual is {residual} (95% interval {interval})."
            )
    return ""


def _inside(label: str) -> str:
    """A label within a sentence: its first letter small, unless it is an abbreviation."""
    return label[:1].lower() + label[1:] if label[1:2].islower() else label
