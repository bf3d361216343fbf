"""The contrast: how likely a model finds the references, and how good what it generates is, on the same rows.

Rows of statistics first, then aggregates, then intervals: every number of the report is an aggregate of the
per-row statistics gathered here, so that a bootstrap only resamples rows (a row with all its samples).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlseq.common.escapes import visible
from rlseq.common.formats import METRICS, RESULTS
from rlseq.common.ranks import raise_on_all_ranks
from rlseq.config.validation.validate import check_declared
from rlseq.data.prompts import build_prompts, columns_of_rows, fingerprint
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.aggregate import (
    comparisons,
    model_results,
    quality_metrics,
)
from rlseq.evaluation.costs import completions_bar, describe_costs
from rlseq.evaluation.measure.checkpoint import ModelStatistics, measure_checkpoint
from rlseq.evaluation.measure.checks import check_models
from rlseq.evaluation.measure.decode import ANSWERS, check_choosers, oracles, prompt_columns
from rlseq.evaluation.measure.documents import check_documents, check_windows, load_documents
from rlseq.evaluation.measure.loading import load_tokenizer
from rlseq.evaluation.measure.partial import remove_partial_results, resume_hint, versions
from rlseq.evaluation.measure.references import solution_note
from rlseq.evaluation.metrics import LIKELIHOOD_METRICS, Metric
from rlseq.evaluation.report.groups import group_results
from rlseq.evaluation.report.notes import partial_notes
from rlseq.evaluation.results.clusters import check_clusters, clusters_note, clusters_of, summed
from rlseq.evaluation.results.files import finite_or_null, read_jsonl, say_replaced, spec_on_file, write_results
from rlseq.evaluation.results.folder import claimed
from rlseq.evaluation.results.methods import method_comparisons, method_results
from rlseq.evaluation.results.primary import (
    adjusted,
    check_primary,
    primary_comparison,
    validate_no_oracle_claim,
    with_primary_name,
)
from rlseq.evaluation.right_answers import answers_note, right_answers
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import LIKELIHOOD, RowStatistics
from rlseq.evaluation.stats.seeds import methods, seed_notes
from rlseq.evaluation.studies.compression import document_results, lossy_notes
from rlseq.evaluation.studies.table import check_studies, study_results
from rlseq.evaluation.tune_decoding import check_sweeps, sweeps, tune, tuned_strategies, tuning_notes, tuning_spec
from rlseq.scoring import RewardSuite
from rlseq.types import Prompt


def contrast(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    *,
    settings: ContrastSettings | None = None,
    prompt_options: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    quiet: bool = False,
    data_name: str = "",
    tuning_rows: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Evaluate named checkpoints on the same rows and compare each with the first.

    Args:
        models: name -> path or hub id. The first is `a` in every comparison. `rl#1`, `rl#2` are two training seeds of
            the method `rl` (rlseq.evaluation.stats.seeds).
        rows: the data set's rows, as `rlseq.data.rows.load_rows` gives them.
        suite: the rewards that measure quality.
        settings: strategies, samples, seed.
        prompt_options: how rows become prompts, as `rlseq.data.prompts.build_prompts` takes them.
        output_dir: results.json, per_example.jsonl and samples.jsonl are written there. What is finished of an
            evaluation that gets killed is kept there, and taken up by the next with equal weights, data and settings.
        quiet: no progress bars.
        data_name: what the results call the data.
        tuning_rows: rows of the same columns, none of them evaluated, on which strategies with alternatives are tuned
            (rlseq.evaluation.tune_decoding).

    Returns:
        The results, in the shape of results.json. Under several processes each row is computed once and the
        first process has the result; the others get an empty dict.

    Raises:
        RlseqError: a setting, model, column or reward that does not work; strategies, the primary comparison
            and columns are checked before any model is loaded.
    """
    settings, prompt_options = settings or ContrastSettings(), prompt_options or {}
    options = {"quiet": quiet, "data_name": data_name, "tuning_rows": tuning_rows}
    with contextlib.ExitStack() as held:
        results = _contrast(models, rows, suite, settings, prompt_options, output_dir, held, **options)
        if results and output_dir is not None:
            remove_partial_results(Path(output_dir))
    return results


@raise_on_all_ranks(exchange=False)  # called as a library too, where no recipe does it
def _contrast(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    output_dir: str | Path | None,
    held: contextlib.ExitStack,
    quiet: bool = False,
    data_name: str = "",
    tuning_rows: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """`contrast`, after which what it finished is still kept, and the folder claimed until `held` is closed.

    `notes` stand before its own.
    """
    if not models:
        raise ConfigError("no models were named; give at least one as NAME=PATH")
    if not rows:
        raise DataError("the data set is empty")
    methods(models)
    suite = suite.with_think_end(settings.think_end)
    settings = with_primary_name(settings, suite)
    check_settings(settings, suite, rows, prompt_options)
    chosen_by = oracles(
        settings.parsed(), suite, {*columns_of_rows(rows), "references"}, prompt_columns(prompt_options)
    )
    check_windows(settings, models)
    warnings = check_models(models, rows, prompt_options, settings, suite, tuning_rows)
    documents = load_documents(settings)
    state = PartialState()
    if state.is_main_process and not quiet:
        for warning in warnings:
            print(visible(f"rlseq: warning: {warning}"), flush=True)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        held.enter_context(claimed(folder))
        if state.is_main_process and not quiet:
            say_replaced(folder)
    first, path = next(iter(models.items()))
    tokenizer = load_tokenizer(first, str(path))
    planned = [build_prompts(some, tokenizer, **prompt_options) if some else [] for some in (rows, tuning_rows)]
    if state.is_main_process and not quiet:
        print(visible(f"rlseq: {describe_costs(settings, planned[0], len(models), planned[1])}"), flush=True)
    with completions_bar(settings, *planned, models=len(models), quiet=quiet) as bar:
        tuned, tuned_on = {}, []
        if sweeps(settings):
            options = {"quiet": quiet, "output_dir": folder, "bar": bar}
            tuned, tuned_on = tune(models, tuning_rows, rows, suite, settings, prompt_options, **options)
        found: dict[str, ModelStatistics] = {}
        for name, path in models.items():
            found[name], data = measure_checkpoint(
                name,
                str(path),
                rows,
                suite,
                settings,
                prompt_options,
                quiet,
                baseline=str(next(iter(models.values()))),
                documents=documents,
                output_dir=folder,
                tuned=tuned_strategies(name, tuned),
                bar=bar,
            )
    if not state.is_main_process:
        return {}
    results = assemble(
        found,
        data,
        suite,
        settings,
        spec=_spec(settings, suite, data, prompt_options) | tuning_spec(tuned_on),
        chosen_by=chosen_by,
        tuned=tuned,
        documents=documents,
        data_name=data_name,
    )
    results["notes"][:0] = notes
    if folder is not None:
        write_results(results, found, folder, rows_of=data)
    return results


def assemble(
    found: Mapping[str, ModelStatistics],
    prompts: Sequence[Prompt],
    suite: RewardSuite,
    settings: ContrastSettings,
    *,
    spec: Mapping[str, Any],
    chosen_by: Mapping[str, Sequence[str]],
    tuned: Mapping[str, Any],
    documents: Sequence[str],
    data_name: str,
) -> dict[str, Any]:
    """The results, in the shape of results.json, from the row statistics of named checkpoints on the same R rows.

    Args:
        found: by checkpoint its statistics; `rl#1`, `rl#2` are seeds of one method.
        prompts: the R rows.
        chosen_by: of each strategy that is an oracle the columns that it reads.
        tuned: what was tuned of strategies with alternatives, as `rlseq.evaluation.tune_decoding.tune` gives it.
        documents: text without prompts, as `rlseq.evaluation.measure.documents.load_documents` gives it.
        data_name: what the results call the data.
    """
    with_references = any(any(statistics.likelihood) for statistics in found.values())
    thinks = settings.think_end is not None
    metrics = quality_metrics(suite, with_references=with_references, with_thoughts=thinks)
    primary = primary_comparison(settings, list(methods(found)))
    clusters = clusters_of(settings.cluster_column, prompts)
    resampled = summed(found, clusters)
    compared = [*method_comparisons(resampled, metrics, settings), *comparisons(resampled, metrics, settings)]
    compared, adjustment = adjusted(compared, primary, list(found))
    results = {
        RESULTS.key: RESULTS.version,
        "spec": spec,
        "reward_funcs": [spec_on_file(spec) for spec in suite.specs],
        "data_name": data_name,
        "rows": len(prompts),
        "models": model_results(found, metrics, settings, resampled),
        "methods": method_results(resampled, metrics, settings),
        "comparisons": compared,
        "adjustment": adjustment,
        "metrics": {name: metric.as_json() for name, metric in {**metrics, **LIKELIHOOD_METRICS}.items()},
        "studies": study_results({n: s.studies for n, s in found.items()}, settings, metrics),
        "primary": primary,
        **({"groups": group_results(found, prompts, metrics, settings)} if settings.group_column is not None else {}),
        "oracles": chosen_by,
        "right_answers": right_answers(_generated_rows(found), settings.right_answers),
        "notes": seed_notes(found),
    }
    if not with_references:
        results["notes"].append("The data has no references: the likelihood part is skipped.")
    else:
        scored = next(iter(found.values())).likelihood
        counts = LIKELIHOOD("tokens"), LIKELIHOOD("references")
        tokens, references = (sum(row.get(count, 0.0) for row in scored) for count in counts)
        texts = [text for prompt in prompts for text in prompt.columns.get("references", ())]
        results["notes"] += filter(None, [solution_note(texts, tokens / references, suite.names)])
    if settings.cluster_column is not None and clusters is not None:
        results["clusters"] = {"column": settings.cluster_column, "clusters": len(set(clusters))}
        results["notes"].append(clusters_note(settings.cluster_column, clusters, settings.studies))
    results["notes"] += filter(None, [answers_note(results["right_answers"])])
    results["notes"] += partial_notes(results, suite)
    if tuned:
        results["tuned"] = tuned
        results["notes"] += tuning_notes(tuned)
    for strategy, columns in chosen_by.items():
        for model in results["models"].values():
            model["strategies"][strategy]["oracle"] = True
        results["notes"].append(
            f"{strategy} is an oracle: it chooses among samples by a reward that reads {', '.join(columns)}. Its "
            "numbers say what a perfect judge could gain from the samples; they are no way to decode."
        )
    coded = {name: statistics.documents for name, statistics in found.items() if statistics.documents is not None}
    if coded:
        results["documents"] = document_results(coded, documents, settings)
        results["notes"] += lossy_notes(results["documents"])
    return finite_or_null(results)  # a metric that nothing was measured of is null, in memory as on file


def _generated_rows(found: Mapping[str, ModelStatistics]) -> Iterator[RowStatistics]:
    for statistics in found.values():
        for rows in statistics.strategies.values():
            yield from rows


def contrast_and_report(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    *,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    output_dir: Path,
    title: str = "",
    metrics_file: Path | None = None,
    data_name: str = "",
    tuning_rows: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """`contrast`, then report.html, report.md and plots/ beside its results, and a short table on the terminal.

    `metrics_file` is a training run's metrics.jsonl, whose curves the report shows. The title is by default the names
    of the methods and of the data. `notes` are sentences that the results and the report are to hold.
    """
    with contextlib.ExitStack() as held:
        try:
            given = {"data_name": data_name, "tuning_rows": tuning_rows, "notes": notes}
            results = _contrast(models, rows, suite, settings, prompt_options, output_dir, held, **given)
            if results:
                logged = metrics_file is not None and metrics_file.is_file()
                curves = read_jsonl(metrics_file, METRICS) if logged else None
                report_on(results, output_dir, title=title, metrics=curves)
        except KeyboardInterrupt:
            if PartialState().is_main_process:
                print(resume_hint(output_dir), file=sys.stderr, flush=True)
            raise
        if results:
            remove_partial_results(output_dir)
    return results


def report_on(
    results: Mapping[str, Any],
    output_dir: Path,
    *,
    title: str = "",
    metrics: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the report of what is in a folder, and print its summary."""
    from rlseq.evaluation.report.write import print_summary, write_report

    samples, per_example = (read_jsonl(output_dir / name) for name in ("samples.jsonl", "per_example.jsonl"))
    if not title:
        title = " against ".join(methods(results["models"]))
        title += f" on {results['data_name']}" if results["data_name"] else ""
    report = write_report(results, samples, output_dir, per_example=per_example, metrics=metrics, title=title)
    print_summary(results)
    print(visible(f"report: {report}"), flush=True)


def check_settings(
    settings: ContrastSettings,
    suite: RewardSuite,
    rows: Sequence[Mapping[str, Any]] = (),
    prompt_options: Mapping[str, Any] | None = None,
) -> None:
    """Check, before a model is loaded, that the strategies can be read and the primary comparison will be measured.

    Args:
        rows: those to evaluate, whose columns tell which strategies are oracles; without them, columns that hold
            answers wherever met do.
        prompt_options: how they become prompts.

    Raises:
        ConfigError: a strategy that cannot be read, is named twice or chooses by what is no reward here; a primary
            comparison of an unknown metric (the message names the nearest), of a strategy that is not among the
            strategies, or of an oracle.
    """
    measured = [strategy.spec for strategy in settings.parsed()]
    if len(set(measured)) < len(measured):
        raise ConfigError(f"a strategy is named twice in {', '.join(settings.strategies)}")
    check_choosers(settings.parsed(), suite)
    check_declared(settings)
    check_clusters(settings.cluster_column, rows)
    check_studies(settings, suite)
    check_documents(settings)
    settings = with_primary_name(settings, suite)
    check_primary(settings, measured)
    knowing = oracles(settings.parsed(), suite, ANSWERS)
    if rows:
        columns = {*columns_of_rows(rows), "references"}
        knowing |= oracles(settings.parsed(), suite, columns, prompt_columns(prompt_options or {}))
    validate_no_oracle_claim(settings, knowing)
    check_sweeps(settings, suite)


def _spec(
    settings: ContrastSettings,
    suite: RewardSuite,
    prompts: Sequence[Prompt],
    prompt_options: Mapping[str, Any],
) -> dict[str, Any]:
    """What a number depends on: equal specs and equal weights give equal results."""
    shown = settings.reproducibility_fields()
    if settings.likelihood_dataset is None:
        shown = {name: value for name, value in shown.items() if not name.startswith("likelihood_")}
    return {
        "versions": versions(),
        "settings": {
            **shown,
            "prompt": dict(prompt_options),
        },
        "seed": settings.seed,
        "rewards": suite.fingerprint(),
        "data": {"rows": len(prompts), "fingerprint": fingerprint(prompts)},
    }


__all__ = [
    "ContrastSettings",
    "Metric",
    "check_settings",
    "contrast",
    "contrast_and_report",
    "read_jsonl",
    "write_results",
]
