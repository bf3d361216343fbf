"""The report of a contrast: one HTML file that needs nothing else, the same tables in Markdown, and plots.

Everything here presents numbers that were computed before. It decides nothing but what comes first: the
primary comparison, then what it cost in likelihood.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from rlseq.common.escapes import visible
from rlseq.common.tables import render_table, terminal_width
from rlseq.evaluation.audit import report as audit_report
from rlseq.evaluation.browser.page import FILE_NAME
from rlseq.evaluation.metrics import CHANCE_METRICS, EXACT_MATCH, NLL, PASS_METRICS, TOKEN_LOGPROB
from rlseq.evaluation.report import groups, plots, tables
from rlseq.evaluation.report.headline import make_headline
from rlseq.evaluation.report.samples import SamplePairs, monte_carlo_pass_at_k, pair_samples
from rlseq.evaluation.report.tables import Results
from rlseq.evaluation.studies import compression
from rlseq.evaluation.studies.table import sections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PASS_KS_IN_TABLE = (1, 2, 4, 8, 16, 64, 256)


def write_report(
    results: Results,
    samples: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    per_example: Iterable[Mapping[str, Any]] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    title: str | None = None,
) -> Path:
    """Write report.html, report.md and plots/*.svg.

    Args:
        results: the contents of results.json.
        samples: rows of samples.jsonl, the completions shown side by side.
        output_dir: where the files go; made if missing.
        per_example: rows of per_example.jsonl; adds each row's chance to be right to the samples shown.
        metrics: logged steps of a training run (metrics.jsonl); adds its curves.
        title: heading of the report; by default the names of the models.

    Returns:
        The path of report.html.
    """
    output_dir = Path(output_dir)
    samples = list(samples)
    figures = _figures(results, samples, metrics or ())
    shown = [*groups.sections(results), *sections(results), *compression.sections(results)]
    shown += audit_report.section(output_dir.absolute().parent)
    for section in shown:
        figures |= section.figures
    plots.write_svgs({name: svg for name, (_, svg) in figures.items()}, output_dir / "plots")

    context = _context(results, samples, list(per_example or ()), title)
    context["sections"] = shown
    context["browser"] = f"../{FILE_NAME}" if (output_dir.absolute().parent / FILE_NAME).is_file() else None
    context["figures"] = {
        name: (label, Markup(plots.inline_svg(svg, name, label))) for name, (label, svg) in figures.items()
    }
    context["training"] = [name for name in figures if name.startswith("training-")]
    page = output_dir / "report.html"
    page.write_text(_render("template.html.jinja", context, html=True), encoding="utf-8")
    (output_dir / "report.md").write_text(_render("template.md.jinja", context, html=False), encoding="utf-8")
    return page


def print_summary(results: Results) -> None:
    """Print a short table of the results to the terminal: one line per model and strategy."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=terminal_width())

    def say(words: str, style: str = "") -> None:
        console.print(Text(visible(words), style=style), highlight=False)

    quality = [tables.metric(results, name) for name in tables.quality_metrics(results)]
    quality = [info for info in quality if _says_something(results, info) and info.name != TOKEN_LOGPROB.name]
    rows: list[list[str]] = []
    partial: list[str] = []
    for strategy in tables.strategies(results):
        for model in results["models"]:
            cells = [tables.cell(results, model, strategy, info.name) for info in quality]
            partial += [
                f"* {info.label} of {model} under {strategy}{said}"
                for info, found in zip(quality, cells, strict=True)
                if found and (said := tables.of_completions(found))
            ]
            values = (
                info.value(found["value"]) + "*" * bool(tables.of_completions(found)) if found else tables.NOTHING
                for info, found in zip(quality, cells, strict=True)
            )
            rows.append([model, tables.labelled(results, strategy), *values])
    header = ("model", "decoding", *(info.label for info in quality))
    say(f"{results['rows']:,} rows, 95% intervals in report.html", "italic")
    print(render_table(rows, header, right=range(2, len(header)), keys=2) + "\n")
    for line in partial:
        say(line)
    names = tables.likelihood_metrics(results)
    for model in results["models"]:
        parts = [(tables.metric(results, n), tables.cell(results, model, None, n)) for n in names]
        line = ", ".join(f"{info.label} {info.value(c['value'])}" for info, c in parts if c)
        say(f"{model}: {line or 'likelihood skipped: no references'}")
    headline = make_headline(results)
    say(headline.finding, "bold")
    say(" ".join(filter(None, [headline.certainty, headline.cost, headline.source])))


def _says_something(results: Results, info: Any) -> bool:
    """Whether a share of what goes wrong (truncated, repeated) happens at all: one that is 0 everywhere is left out."""
    if not info.fault:
        return True
    shown = [
        tables.cell(results, model, s, info.name) for s in tables.strategies(results) for model in results["models"]
    ]
    return any(cell and cell["value"] for cell in shown)


def _context(
    results: Results,
    samples: Sequence[Mapping[str, Any]],
    per_example: Sequence[Mapping[str, Any]],
    title: str | None,
) -> dict[str, Any]:
    headline = make_headline(results)
    found = tables.shown_comparisons(results)
    curves = tables.pass_curves(results)
    models = list(results["models"])
    pair = (found[0].a, found[0].b) if found else (None, models[-1])
    return {
        "title": title or headline.title,
        "headline": headline,
        "results": results,
        "models": models,
        "rows": tables.rows(results),
        "colors": {
            name: f"var(--series-{plots.SERIES.index(plots.color_of(models, name))})" for name in tables.rows(results)
        },
        "tables": tables,
        "strategies": tables.strategies(results),
        "generated": tables.generated(results),
        "likelihood": [tables.metric(results, n) for n in tables.likelihood_metrics(results)],
        "comparisons": [c for c in found if c.metric.table != "curve"],
        "pass_curves": curves,
        "pass_ks": [k for k in _PASS_KS_IN_TABLE if any(k in curve for curve in curves.values())],
        "pass_metric": tables.metric(results, PASS_METRICS[1].name),
        "check": _accuracy_check(results),
        "pair": pair,
        "several_pairs": len({(c.a, c.b) for c in found}) > 1,
        "side_pair": (side_pair := tuple(_checkpoint(results, name) for name in pair)),
        "side": _side(results, samples, per_example, side_pair),
        "definitions": tables.definitions(results),
        "spec": list(tables.flatten(results.get("spec", {}))),
    }


def _checkpoint(results: Results, name: str | None) -> str | None:
    """A checkpoint, or the first seed of a method."""
    return results.get("methods", {}).get(name, {}).get("checkpoints", [name])[0]


def _side(
    results: Results, samples: Sequence[Any], per_example: Sequence[Any], pair: tuple[str | None, str]
) -> SamplePairs | None:
    available = tables.fair_strategies(results)
    if not available:
        return None
    strategy = (results.get("primary") or {}).get("strategy")
    if strategy is None:
        strategy = "greedy" if "greedy" in available else available[0]
    listed = tables.answers_listed(results)  # else a row's chance of a reference is not one of being right
    return pair_samples(samples, *pair, strategy, per_example=per_example if listed else ())


def _accuracy_check(results: Results) -> list[dict[str, Any]]:
    """The exact chance of a reference beside the share of samples that were one: two estimates of one number."""
    rows: list[dict[str, Any]] = []
    if not tables.answers_listed(results):
        return rows
    for strategy in tables.strategies(results):
        for model in results["models"]:
            exact, *never = (tables.cell(results, model, strategy, name) for name in CHANCE_METRICS)
            sampled = tables.cell(results, model, strategy, EXACT_MATCH.name)
            if exact and sampled:
                infos = [tables.metric(results, name) for name in CHANCE_METRICS]
                rows.append(
                    {
                        "model": model,
                        "strategy": strategy,
                        "exact": infos[0].value(exact["value"]),
                        "exact_interval": infos[0].interval(exact["ci95"]),
                        "sampled": infos[0].value(sampled["value"]),
                        "interval": infos[0].interval(sampled["ci95"]),
                        "agrees": "yes" if _agree(results["models"][model], strategy, exact, sampled) else "no",
                        "never": [
                            (info.label, info.value(found["value"]), info.interval(found["ci95"]))
                            for info, found in zip(infos[1:], never, strict=True)
                        ],
                    }
                )
    return rows


def _agree(entry: Mapping[str, Any], strategy: str, exact: Mapping[str, Any], sampled: Mapping[str, Any]) -> bool:
    gap = entry.get("sampled_and_exact", {}).get(strategy)
    if gap is not None:
        return gap["agrees"]
    low, high = sampled["ci95"]  # of results that say no more
    return low <= exact["value"] <= high


def write_plane(results: Results, path: str | Path) -> Path | None:
    """Write the figure of likelihood against quality as a PNG.

    Returns:
        The path, or None where the results have nothing to plot.
    """
    found = _plane(results) if results else None
    if found is None:
        return None
    found[1].savefig(path, dpi=150, facecolor=plots.PAPER)
    return Path(path)


def _plane(results: Results) -> tuple[str, Figure] | None:
    """The description and figure of likelihood against quality, where both were measured."""
    models = list(results["models"])
    primary = (results.get("primary") or {}).get("metric")
    names = [n for n in tables.quality_metrics(results) if tables.metric(results, n).better is not None]
    name = primary if primary in names else next(iter(names), None)
    if name is None:
        return None
    info = tables.metric(results, name)
    points = {
        (model, strategy): (nll, quality)
        for strategy in tables.fair_strategies(results)
        for model in models
        if (nll := tables.cell(results, model, None, NLL.name))
        and (quality := tables.cell(results, model, strategy, name))
        and quality["value"] is not None
    }
    if not points:
        return None
    pairs = dict.fromkeys((c["a"], c["b"]) for c in results.get("comparisons", ()))
    figure = plots.plane(
        points,
        models,
        list(pairs),
        x_label="NLL per token (nats)",
        y_label=info.label,
        y_higher_is_better=bool(info.better),
        y_percent=info.percent,
    )
    return f"{info.label} against NLL per token", figure


def _figures(
    results: Results, samples: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Name -> (description, SVG). Figures whose data is absent are absent."""
    models = list(results["models"])
    figures = {}
    found = _plane(results)
    if found is not None:
        figures["plane"] = (found[0], plots.to_svg(found[1]))
    curves = tables.pass_curves(results)
    if curves:
        estimated = monte_carlo_pass_at_k(samples, "sample", results["rows"])
        figure = plots.pass_at_k_curves(curves, estimated, models)
        figures["pass-at-k"] = ("Chance that k samples hold a right one", plots.to_svg(figure))
    for i, (title, (steps, values)) in enumerate(plots.training_series(metrics).items()):
        figures[f"training-{i}"] = (title, plots.to_svg(plots.training_curve(title, steps, values)))
    return figures


def _markdown_cell(text: Any) -> str:
    """Text inside a Markdown table cell: nothing in it is markup, a link or a line break."""
    text = str(text).replace("\\", "\\\\").replace("\r", "").replace("\n", " ⏎ ")
    for character in "|`*_[]<>#~":
        text = text.replace(character, "\\" + character)
    return text


def _render(template: str, context: Mapping[str, Any], *, html: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown_cell
    environment.filters["number"] = tables.number
    return visible(environment.get_template(template).render(context))
