"""The report's figures, as SVG that follows the page's colours, and a run's `curves.png`.

A figure is plotted once, in the literal colours below. Inside the page each colour becomes a CSS variable, so
that the same figure serves light and dark; on disk the literal colours stay.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlseq.common.escapes import visible
from rlseq.evaluation.stats.seeds import methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c1d21", "#6b6e76", "#dedfe3", "#fefefe"
SERIES = ("#7d828c", "#1f5fbf", "#b8561a", "#27805c", "#8a4a9e", "#a3862b")  # the base is grey on purpose
CREATOR = "rlseq"  # in the metadata of each SVG
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_CSS = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"} | {
    color: f"--series-{i}" for i, color in enumerate(SERIES)
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, readable by a screen reader
    "svg.hashsalt": "rlseq",  # equal data gives equal bytes
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

# What a training run may log, in the order shown: title, and keys it may go by (the first present is plotted).
TRAINING_SERIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward (mean over rollouts)", ("reward",)),
    ("Reward (standard deviation over rollouts)", ("reward_std",)),
    ("NLL of references (nats per token)", ("reference_nll", "eval_reference_nll", "eval_nll_per_token")),
    ("Expected accuracy", ("expected_accuracy", "eval_expected_accuracy")),
    ("KL to the reference model (nats)", ("kl", "objective/kl")),
    ("Entropy (nats per token)", ("entropy", "policy/entropy")),
    ("Completion length (tokens)", ("completions/mean_length", "length")),
    ("Groups with equal rewards (share)", ("frac_reward_zero_std",)),
    ("Log-prob of chosen completions (nats)", ("logps/chosen",)),
    ("Log-prob of rejected completions (nats)", ("logps/rejected",)),
    ("Loss", ("loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
_CURVES_PNG = ("Reward (mean", "NLL of", "Expected accuracy", "KL to", "Entropy", "Completion length", "Log-prob of")


def styled(more: Mapping[str, Any] | None = None) -> Any:
    """A context in which figures are plotted in the report's style."""
    import matplotlib  # late: no run need wait for it to start

    return matplotlib.rc_context({**_STYLE, **(more or {})})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def to_svg(figure: Figure) -> str:
    """The figure as a standalone SVG document in its literal colours."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": CREATOR})
    return buffer.getvalue()


def write_svgs(svgs: Mapping[str, str], folder: Path) -> None:
    """Write NAME.svg of each name, and remove those that `to_svg` made of an earlier evaluation, but no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.stem not in svgs and f"<dc:title>{CREATOR}</dc:title>" in path.read_text("utf-8", errors="replace"):
            path.unlink()
    for name, svg in svgs.items():
        (folder / f"{name}.svg").write_text(visible(svg), encoding="utf-8")


def inline_svg(svg: str, name: str, label: str) -> str:
    """The `<svg>` element alone, for a page: CSS variables for colours, ids that no other figure uses."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    for color, variable in _CSS.items():
        body = body.replace(color, f"var({variable})")
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def color_of(models: Sequence[str], model: str) -> str:
    """The series colour of a model: its method's place in the list, so that every figure and table agrees."""
    for i, (method, checkpoints) in enumerate(methods(models).items()):
        if model in (method, *checkpoints):
            return SERIES[i % len(SERIES)]
    raise ValueError(f"{model!r} is none of {', '.join(models)}")


def legend_above(axes: Any, handles: Sequence[Any]) -> None:
    """A legend above the plot, in as many columns as leave room to plot."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(5, len(handles), 60 // (longest + 5)))
    axes.legend(handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9)


def samples_axis(axes: Any, ks: Sequence[int]) -> None:
    """The logarithmic axis of k samples, with these k."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("k samples")


def plane(
    points: Mapping[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]],
    models: Sequence[str],
    arrows: Sequence[tuple[str, str]],
    *,
    x_label: str,
    y_label: str,
    y_higher_is_better: bool,
    y_percent: bool,
) -> Figure:
    """Likelihood against quality: one point per (model, strategy), and an arrow from a to b for each strategy.

    Args:
        points: (model, strategy) -> (likelihood, quality), each `{"value", "ci95"}`. Likelihood is an NLL,
            small values at the right; quality has better values at the top: up and right is better.
        arrows: pairs (a, b) of models.
    """
    scale = 100.0 if y_percent else 1.0
    strategies = list(dict.fromkeys(strategy for _, strategy in points))
    with styled():
        figure = new_figure(5.6, 4.0)
        axes = figure.subplots()
        centre = {key: (x["value"], y["value"] * scale) for key, (x, y) in points.items()}
        for (model, strategy), (x, y) in points.items():
            cx, cy = centre[model, strategy]
            color = color_of(models, model)
            axes.plot(x["ci95"], [cy, cy], color=color, lw=1.1, alpha=0.75, zorder=2)
            axes.plot([cx, cx], [v * scale for v in y["ci95"]], color=color, lw=1.1, alpha=0.75, zorder=2)
            marker = MARKERS[strategies.index(strategy) % len(MARKERS)]
            axes.plot(cx, cy, marker, color=color, ms=7, mec=PAPER, mew=1.0, zorder=4)
        for a, b in arrows:
            for strategy in strategies:
                if (a, strategy) in centre and (b, strategy) in centre:
                    axes.annotate(
                        "",
                        xy=centre[b, strategy],
                        xytext=centre[a, strategy],
                        arrowprops={
                            "arrowstyle": "-|>",
                            "color": MUTED,
                            "lw": 1.0,
                            "shrinkA": 6,
                            "shrinkB": 6,
                        },
                        zorder=3,
                    )
        handles = [
            axes.plot([], [], MARKERS[i % len(MARKERS)], color=MUTED, ms=6, label=strategy)[0]
            for i, strategy in enumerate(strategies)
        ] + [axes.plot([], [], "-", color=color_of(models, m), lw=3, label=m)[0] for m in methods(models)]
        axes.margins(0.12)
        axes.invert_xaxis()
        if not y_higher_is_better:
            axes.invert_yaxis()
        axes.set_xlabel(x_label + "  →  references more likely")
        axes.set_ylabel(y_label + (" (%)" if y_percent else "") + "  →  better")
        legend_above(axes, handles)
    return figure


def pass_at_k_curves(
    curves: Mapping[str, Mapping[int, Mapping[str, Any]]],
    monte_carlo: Mapping[str, Mapping[int, float]],
    models: Sequence[str],
) -> Figure:
    """Exact pass@k of each model with its 95% band, and the estimate from samples as open circles."""
    with styled():
        figure = new_figure(5.6, 3.6)
        axes = figure.subplots()
        for model, curve in curves.items():
            ks = sorted(curve)
            color = color_of(models, model)
            low, high = (np.array([curve[k]["ci95"][side] for k in ks]) * 100 for side in (0, 1))
            axes.fill_between(ks, low, high, color=color, alpha=0.16, lw=0)
            axes.plot(ks, [curve[k]["value"] * 100 for k in ks], color=color, lw=1.8, label=f"{model}, exact")
            estimated = monte_carlo.get(model, {})
            if estimated:
                axes.plot(
                    list(estimated),
                    [100 * v for v in estimated.values()],
                    "o",
                    mfc="none",
                    mec=color,
                    mew=1.3,
                    ms=7,
                    label=f"{model}, samples",
                )
        ks = sorted({k for curve in curves.values() for k in curve})
        samples_axis(axes, ks)
        axes.set_ylabel("at least one right (%)")
        axes.legend(loc="lower right", fontsize=9)
    return figure


def curves(
    lines: Sequence[tuple[str, str, str, Mapping[float, Mapping[str, Any]]]],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
) -> Figure:
    """Values with 95% bands over a whole number.

    Args:
        lines: (label, colour, line style, x -> `{"value", "ci95"}`) each; undefined values leave a gap.
    """
    scale = 100.0 if percent else 1.0
    with styled():
        figure = new_figure(5.6, 3.6)
        axes = figure.subplots()
        for label, color, style, cells in lines:
            xs = sorted(cells)
            values, low, high = (
                np.array([math.nan if v is None else v * scale for v in side], dtype=float)
                for side in zip(*((cells[x]["value"], *cells[x]["ci95"]) for x in xs), strict=True)
            )
            axes.fill_between(xs, low, high, color=color, alpha=0.12, lw=0)
            axes.plot(xs, values, style, color=color, lw=1.7, marker="o", ms=3.5, label=label)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label + (" (%)" if percent else ""))
        columns = 1 if max(len(label) for label, *_ in lines) > 26 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, fontsize=9)
    return figure


def file_names(kind: str, metrics: Sequence[str]) -> list[str]:
    """By metric a name for the file of its figure, of letters, digits and hyphens; all are different."""
    found: list[str] = []
    for metric in metrics:
        base = name = f"{kind}-" + re.sub("[^a-zA-Z0-9]+", "-", metric)
        number = 1
        while any(name in (other, f"{other}-difference") or other == f"{name}-difference" for other in found):
            number += 1
            name = f"{base}-{number}"
        found.append(name)
    return found


def training_series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Title -> (steps, values) of every known series that was logged with finite numbers at least twice."""
    keys = {key for row in metrics for key in row}
    wanted = [(title, next((key for key in names if key in keys), None)) for title, names in TRAINING_SERIES]
    parts = sorted(k for k in keys if re.fullmatch(r"rewards/.+/mean", k))
    if len(parts) > 1:  # with one reward the series above says it already
        wanted[1:1] = [(f"Reward {key.removeprefix('rewards/').removesuffix('/mean')}", key) for key in parts]
    series = {}
    for title, key in wanted:
        pairs = [(row["step"], row[key]) for row in metrics if "step" in row and _is_finite(row.get(key))]
        if key is not None and len(pairs) > 1:
            series[title] = ([float(x) for x, _ in pairs], [float(y) for _, y in pairs])
    return series


def training_curve(title: str, steps: Sequence[float], values: Sequence[float]) -> Figure:
    """One logged quantity over optimiser steps: what was logged, and its running mean on top."""
    with styled():
        figure = new_figure(3.7, 2.35)
        _plot_curve(figure.subplots(), title, steps, values)
    return figure


def write_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Write curves.png: reward, likelihood, KL, entropy and length over steps, as far as logged.

    Returns:
        The path, or None when nothing was logged that could be plotted.
    """
    series = {t: s for t, s in training_series(metrics).items() if t.startswith(("Reward ", *_CURVES_PNG))}
    series.pop("Reward (standard deviation over rollouts)", None)
    if not series:
        return None
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    with styled({"figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = new_figure(3.7 * columns, 2.5 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, (steps, values)) in zip(grid, series.items(), strict=False):
            _plot_curve(axes, title, steps, values)
        for axes in grid[len(series) :]:
            axes.set_visible(False)
        figure.savefig(path, dpi=150)
    return Path(path)


def _plot_curve(axes: Any, title: str, steps: Sequence[float], values: Sequence[float]) -> None:
    window = max(1, len(values) // 15)
    smooth = len(values) >= 30
    axes.plot(steps, values, color=SERIES[1], lw=0.8 if smooth else 1.6, alpha=0.35 if smooth else 1.0)
    if smooth:
        axes.plot(steps, running_mean(values, window), color=SERIES[1], lw=1.8)
    axes.set_title(title, loc="left", pad=6)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over a centred window of 2·window + 1 points, narrower (still centred) near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    place = np.arange(len(values))
    half = np.minimum(window, np.minimum(place, place[::-1]))
    return (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
