"""Every study of a contrast by name, and running those that were asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.engine.model.info import eval_mode
from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.measure.partial import STUDY, PartialResults
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.statistics import RowStatistics, rows_as_json, rows_from_json
from rlseq.evaluation.studies.coverage import Coverage
from rlseq.evaluation.studies.exposure_bias import ExposureBias
from rlseq.evaluation.studies.kl import KL
from rlseq.evaluation.studies.lookahead import Lookahead
from rlseq.evaluation.studies.map import MAP
from rlseq.evaluation.studies.ranking import Ranking
from rlseq.evaluation.studies.sharpening import Sharpening
from rlseq.evaluation.studies.study import Context, Section, Study
from rlseq.scoring import RewardSuite

STUDIES: dict[str, Study] = {
    study.name: study for study in (Ranking(), MAP(), ExposureBias(), Lookahead(), Sharpening(), KL(), Coverage())
}


def check_studies(settings: Any, suite: RewardSuite) -> None:
    """Check, before anything is loaded, that every study is known and can work.

    Raises:
        ConfigError: an unknown study (the message names the nearest) or one named twice, no rows, or a setting of a
            study that cannot work.
    """
    for name in settings.studies:
        if name not in STUDIES:
            raise ConfigError(
                f"--studies names no study: {name!r}; there are {', '.join(STUDIES)}, and all or none alone."
                + did_you_mean(name, STUDIES)
            )
    if len(set(settings.studies)) < len(settings.studies):
        raise ConfigError(f"a study is named twice in {', '.join(settings.studies)}")
    for name in settings.studies:
        STUDIES[name].check(settings, suite)


def studied_rows(name: str, places: Sequence[int], settings: Any) -> int:
    """How many of the rows with these places in the data, in rising order, a study runs on."""
    first = STUDIES[name].rows(settings)
    return len(places) if first is None else sum(place < first for place in places)


def study_completions(name: str, rows: int, settings: Any) -> int:
    """How many completions a study decodes for rows of one model, at most."""
    return STUDIES[name].cost(rows, 0, settings)[0]


def run_studies(context: Context, places: Sequence[int], parts: PartialResults) -> dict[str, list[RowStatistics]]:
    """Each study's statistics of the rows with these places in the data; of a costly one, of the first ones.

    Studies that need all rows at once are left to `run_together`.

    Args:
        parts: what is found of an evaluation that was interrupted, and a place for what gets finished.
    """
    found: dict[str, list[RowStatistics]] = {}
    with eval_mode(context.model):
        for name in context.settings.studies:
            if STUDIES[name].together:
                continue
            rows = studied_rows(name, places, context.settings)
            progress = functools.partial(_report_completions, context, name)
            part = dataclasses.replace(
                context, prompts=context.prompts[:rows], references=context.references[:rows], progress=progress
            )
            if STUDY.format(name) in parts.found:
                progress(rows)
            found[name] = _once(parts, name, functools.partial(STUDIES[name].measure, part) if rows else list)
    return found


def _report_completions(context: Context, name: str, rows: int) -> None:
    context.progress(study_completions(name, rows, context.settings))


def run_together(context: Context, parts: PartialResults) -> dict[str, list[RowStatistics]]:
    """The statistics of the studies that need all rows at once, of these first rows of the data.

    Called by all processes with all rows. The first process measures, and every one gets what it found.

    Raises:
        Exception: what the first process raised, in all.
    """

    def measured(name: str, part: Context) -> list[RowStatistics]:
        found: list[RowStatistics] = []
        with raise_on_all_ranks():
            if PartialState().is_main_process:
                found = STUDIES[name].measure(part)
        (found,) = broadcast_object_list([found])
        return found

    results: dict[str, list[RowStatistics]] = {}
    with eval_mode(context.model):
        for name in (name for name in context.settings.studies if STUDIES[name].together):
            rows = studied_rows(name, range(len(context.prompts)), context.settings)
            part = dataclasses.replace(context, prompts=context.prompts[:rows], references=context.references[:rows])
            results[name] = _once(parts, name, functools.partial(measured, name, part))
    return results


def _once(parts: PartialResults, name: str, measure: Callable[[], list[RowStatistics]]) -> list[RowStatistics]:
    return rows_from_json(parts.get_or_compute(STUDY.format(name), lambda: rows_as_json(measure(), name)), name)


def study_results(
    found: Mapping[str, Mapping[str, Sequence[RowStatistics]]], settings: Any, metrics: Mapping[str, Metric]
) -> dict[str, dict[str, Any]]:
    """The blocks of the studies that have something to say, from model -> study -> rows."""
    blocks = {}
    for name in settings.studies:
        rows = {model: studies[name] for model, studies in found.items()}
        if not any(any(r) for r in rows.values()):
            continue
        block = STUDIES[name].results(rows, settings, metrics)
        if block is not None:
            blocks[name] = block
    return blocks


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The report's sections of the studies in results.json, in the order of `STUDIES`."""
    return [study.section(results) for study in _measured(results)]


def headlines(results: Mapping[str, Any], a: str, b: str) -> list[str]:
    """What the studies in results.json say of b against a in the head of the report."""
    return [said for study in _measured(results) if (said := study.headline(results, a, b))]


def _measured(results: Mapping[str, Any]) -> list[Study]:
    blocks = results.get("studies") or {}
    return [study for name, study in STUDIES.items() if name in blocks]
