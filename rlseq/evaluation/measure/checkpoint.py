"""Measuring one model: per-row statistics of how likely references are and how good what it generates is.

Every number of a report, and of an evaluation during training, is an aggregate (rlseq.evaluation.aggregate) of the
rows of statistics gathered here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_ids, reference_texts
from rlseq.data.prompts import build_prompts
from rlseq.engine.likelihood import TeacherForced
from rlseq.engine.sampling import stop_ids_of
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Greedy, Sample, Strategy
from rlseq.engine.thoughts import ThinkEnd
from rlseq.evaluation.costs import completions_bar, strategy_cost
from rlseq.evaluation.measure.checks import check_answers
from rlseq.evaluation.measure.decode import decode_by_settings
from rlseq.evaluation.measure.documents import DOCUMENT, Coding, DocumentStatistics, measure_documents
from rlseq.evaluation.measure.loading import load_checkpoint, load_tokenizer
from rlseq.evaluation.measure.partial import (
    DOCUMENTS,
    REFERENCES,
    PartialResults,
    partial_results_of,
    rollouts_as_json,
    rollouts_from_json,
)
from rlseq.evaluation.measure.quality import quality_rows
from rlseq.evaluation.measure.references import (
    agreement_rows,
    check_agreement,
    force_references,
    generation_rows,
    likelihood_rows,
    near_tie_of,
)
from rlseq.evaluation.measure.thoughts import thought_rows
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import COMPLETION, LIKELIHOOD, RowStatistics, rows_as_json, rows_from_json
from rlseq.evaluation.studies.study import Context
from rlseq.evaluation.studies.table import STUDIES, run_studies, run_together, studied_rows, study_completions
from rlseq.scoring import RewardSuite, ScoreTable
from rlseq.types import Prompt, Rollout, column_names


@dataclass
class _Measured:
    """What one process measured, a place for each of its rows."""

    likelihood: list[RowStatistics] = field(default_factory=list)
    strategies: dict[str, list[RowStatistics]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    studies: dict[str, list[RowStatistics]] = field(default_factory=dict)


@dataclass
class ModelStatistics:
    """Per-row statistics of one model on R rows, and the completions they come from."""

    path: str
    likelihood: list[RowStatistics]  # empty dicts where a row has no references
    strategies: dict[str, list[RowStatistics]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    studies: dict[str, list[RowStatistics]] = field(default_factory=dict)  # empty dicts where a study did not run
    documents: DocumentStatistics | None = None  # of text without prompts


def measure_checkpoint(
    name: str,
    path: str,
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    quiet: bool = False,
    baseline: str | None = None,
    documents: Sequence[str] = (),
    output_dir: Path | None = None,
    tuned: Mapping[str, Strategy] | None = None,
    doing: str = "evaluating",
    bar: tqdm | None = None,
) -> tuple[ModelStatistics, list[Prompt]]:
    """Load a checkpoint and its tokenizer and `measure` it, with a progress bar unless `quiet`.

    Args:
        baseline: path of the model that studies compare with; None: this one.
        documents: text without prompts.
        output_dir: where the parts that are finished are kept, and taken up again (rlseq.evaluation.measure.partial).
        tuned: by sweep the one that stands for it.
        doing: the progress bar's label.
        bar: of the whole evaluation, which counts completions; None: one of its own.

    Returns:
        The statistics and the rows as prompts, on every process.

    Raises:
        RlseqError: the checkpoint cannot be loaded, or a column or reward does not work; columns and rewards'
            arguments are checked before the model is loaded.
        ConsistencyError: greedy decoding and teacher forcing disagree, in every process.
    """
    tokenizer = load_tokenizer(name, path)
    prompts = build_prompts(rows, tokenizer, **prompt_options)
    suite.check_columns(column_names(prompts))
    check_answers(settings, prompts)
    load_options = settings.allow_missing_weights, settings.quantization, settings.dtype
    model = load_checkpoint(name, path, *load_options)

    def first() -> torch.nn.Module:
        return model if baseline in (None, path) else load_checkpoint("the first model", baseline, *load_options)

    parts = PartialResults()
    if output_dir is not None:
        checkpoints = [path, baseline or path]
        options = {"tuned": tuned or {}, "doing": doing, "quiet": quiet}
        parts = partial_results_of(
            name, checkpoints, prompts, prompt_options, documents, suite, settings, output_dir, **options
        )
    with contextlib.ExitStack() as own:
        bar = own.enter_context(completions_bar(settings, prompts, quiet=quiet)) if bar is None else bar
        bar.set_description(f"{doing} {name}")
        options = {"name": name, "path": path, "progress": bar.update, "baseline": first, "parts": parts}
        options["tuned"] = tuned
        statistics = measure(model, prompts, tokenizer, suite, settings, **options)
    check_agreement(
        name, statistics.strategies.get(Greedy().spec, []), [prompt.key for prompt in prompts], near_tie_of(model)
    )
    if documents:

        def coded() -> dict[str, Any]:
            found = measure_documents(model, tokenizer, documents, settings, name=name, quiet=quiet)
            coding, rows = dataclasses.asdict(found.coding), rows_as_json(found.rows, DOCUMENT.source)
            return {"coding": coding, "start": found.start, "rows": rows}

        found = parts.get_or_compute(DOCUMENTS, coded)
        coded_rows = rows_from_json(found["rows"], DOCUMENT.source)
        statistics.documents = DocumentStatistics(Coding(**found["coding"]), found["start"], coded_rows)
    return statistics, prompts


def measure(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    suite: RewardSuite,
    settings: ContrastSettings,
    *,
    name: str = "model",
    path: str = "",
    progress: Callable[[int], Any] | None = None,
    baseline: Callable[[], torch.nn.Module] | None = None,
    parts: PartialResults | None = None,
    tuned: Mapping[str, Strategy] | None = None,
) -> ModelStatistics:
    """Measure a model on R rows: likelihood of the references, and each strategy's completions under the rewards.

    Under several processes each takes every n-th row and decodes by itself (the model must be whole on each), and
    all of them get the statistics of all rows.

    Args:
        model: a causal model on this process's device; its train or eval mode is left as it was.
        prompts: the R rows; `references` among their columns give the likelihood part.
        tokenizer: the model's.
        suite: the rewards.
        settings: strategies, samples per row, length, seed.
        name, path: what the records of the samples and the result call the model.
        progress: called with the number of completions done by this process, as `rlseq.evaluation.costs` counts them.
        baseline: loads the model that studies compare with; None: this one.
        parts: what is found of an evaluation that was interrupted, and a place for what gets finished.
        tuned: by sweep, all of those in the settings, the one that stands for it.

    Raises:
        Exception: a reward failed, or anything else; what one process raises, all raise.
    """
    mine = _mine(prompts)
    baseline, progress, parts = baseline or (lambda: model), progress or (lambda done: None), parts or PartialResults()
    with raise_on_all_ranks():
        rows = [prompts[i] for i in mine]
        options = {"name": name, "progress": progress, "baseline": baseline, "parts": parts}
        options["tuned"] = tuned or {}
        found = _measure_rows(model, rows, mine, tokenizer, suite, settings, **options)
    gathered = gather_object([(mine, found)])
    strategies = [strategy.spec for strategy in settings.parsed()]
    whole = ModelStatistics(path, [{}] * len(prompts), {s: [{}] * len(prompts) for s in strategies})
    whole.studies = {name: [{}] * len(prompts) for name in settings.studies}
    for places, part in gathered:
        for local_row, i in enumerate(places):
            whole.likelihood[i] = part.likelihood[local_row]
            for by_name, found_by_name in ((whole.strategies, part.strategies), (whole.studies, part.studies)):
                for key, statistics in found_by_name.items():
                    by_name[key][i] = statistics[local_row] if local_row < len(statistics) else {}
        whole.samples += part.samples
    order = {prompt.key: i for i, prompt in enumerate(prompts)}
    places_of = {spec: i for i, spec in enumerate(strategies)}
    whole.samples.sort(key=lambda r: (places_of[r["strategy"]], order[r["key"]], r["sample"]))
    if any(STUDIES[name].together for name in settings.studies):
        stops = stop_ids_of(model, tokenizer)
        context = Context(
            model=model,
            tokenizer=tokenizer,
            prompts=prompts,
            references=[reference_ids(prompt, tokenizer, stops) for prompt in prompts],
            suite=suite,
            completions={},
            values={},
            settings=settings,
            stop_ids=stops,
            baseline=baseline,
        )
        for study, statistics in run_together(context, parts).items():
            whole.studies[study][: len(statistics)] = statistics
            progress(study_completions(study, studied_rows(study, mine, settings), settings))
    return whole


def _mine(prompts: Sequence[Prompt]) -> list[int]:
    """The rows that this process measures."""
    state = PartialState()
    return list(range(state.process_index, len(prompts), state.num_processes))


def _measure_rows(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    tokenizer: Any,
    suite: RewardSuite,
    settings: ContrastSettings,
    *,
    name: str,
    progress: Callable[[int], Any],
    baseline: Callable[[], torch.nn.Module],
    parts: PartialResults,
    tuned: Mapping[str, Strategy],
) -> _Measured:
    """Measure this process's rows, which have these places in the data, and record every completion."""
    stops = stop_ids_of(model, tokenizer)
    texts = [reference_texts(prompt, tokenizer, stops) for prompt in prompts]
    references = [list(found) for found in texts]
    strings = StopStrings(settings.stop_strings or (), tokenizer)
    think_end = ThinkEnd(settings.think_end, tokenizer)
    cut = [[strings.cuts(ids) for ids in found] for found in references]
    strategies = {strategy.spec: tuned.get(strategy.spec, strategy) for strategy in settings.parsed()}

    @functools.cache  # a part that was found asks for none
    def forced() -> list[list[TeacherForced]]:
        return force_references(model, prompts, references, strategies.values())

    def generated(index: int, spec: str, strategy: Strategy) -> dict[str, Any]:
        groups = decode_by_settings(
            model,
            prompts,
            strategy,
            settings,
            suite=suite,
            stream=index,
            tokenizer=tokenizer,
            progress=lambda rows: progress(strategy_cost(strategy, rows, settings).completions),
        )
        statistics, table = quality_rows(prompts, groups, references, suite)
        if think_end:
            for mine, found in zip(
                statistics, thought_rows(model, prompts, groups, references, think_end), strict=True
            ):
                mine |= found
        more: Sequence[RowStatistics] = []
        if isinstance(strategy, Sample):
            more = generation_rows(strategy, forced(), strategies.values(), settings.max_new_tokens, cut)
        elif isinstance(strategy, Greedy):
            more = agreement_rows(groups, references, forced(), near_tie_of(model), cut)
        for mine, found in zip(statistics, more, strict=False):
            mine |= found
        completions = rollouts_as_json(groups)
        return {
            "completions": completions,
            "statistics": rows_as_json(statistics, COMPLETION.source),
            "records": _records(name, spec, prompts, groups, table),
            "values": table.values,
        }

    def likelihood() -> list[dict[str, Any]]:
        rows = likelihood_rows([list(found.values()) for found in texts], forced())
        return rows_as_json(rows, LIKELIHOOD.source)

    measured = _Measured(rows_from_json(parts.get_or_compute(REFERENCES, likelihood), LIKELIHOOD.source))
    completions: dict[str, Sequence[Sequence[Rollout]]] = {}
    values: dict[str, Mapping[str, Sequence[float | None]]] = {}
    for index, (spec, strategy) in enumerate(strategies.items()):
        if spec in parts.found:
            progress(strategy_cost(strategy, len(prompts), settings).completions)
        part = parts.get_or_compute(spec, functools.partial(generated, index, spec, strategy))
        completions[spec], values[spec] = rollouts_from_json(part["completions"]), part["values"]
        measured.strategies[spec] = rows_from_json(part["statistics"], COMPLETION.source)
        measured.samples += part["records"]
    context = Context(
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        references=references,
        suite=suite,
        completions=completions,
        values=values,
        settings=settings,
        stop_ids=stops,
        baseline=baseline,
        progress=progress,
    )
    measured.studies = run_studies(context, places, parts)
    return measured


def _records(
    name: str, spec: str, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], table: ScoreTable
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl: one per completion."""
    flat = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    return [
        {
            "model": name,
            "strategy": spec,
            "key": prompt.key,
            "prompt": prompt.prompt,
            "references": list(prompt.columns.get("references", ())),
            "sample": rollout.sample,
            "completion": rollout.text,
            "values": dict(scored.values),
            "total": scored.total,
            "logprob": rollout.logprob,
            "length": len(rollout.completion_ids),
            "finish_reason": rollout.finish_reason,
        }
        for (prompt, rollout), scored in zip(flat, table.scored, strict=True)
    ]
