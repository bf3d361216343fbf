"""Tuning of decoding settings on rows of their own, before an evaluation: each model gets its own best.

A strategy written with alternatives (`sample:temperature=0.5/0.7/1`, `rlseq.engine.strategies.Sweep`) stands in the
results under that one name, so that one model's best is compared with another's. All alternatives are measured on the
tuning rows; the best is measured again, on the rows that are evaluated, and nothing else is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlseq.common.escapes import visible
from rlseq.data.prompts import build_prompts, fingerprint, prompt_digest
from rlseq.engine.strategies import Strategy, Sweep, parse_strategy
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.aggregate import matrix, metrics_under, quality_metrics
from rlseq.evaluation.measure.checkpoint import ModelStatistics, measure_checkpoint
from rlseq.evaluation.measure.loading import load_tokenizer
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.results.primary import Primary
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.stats.seeds import methods
from rlseq.scoring import RewardSuite
from rlseq.types import Prompt

Tuning = dict[str, Any]  # the block `tuned` of results.json


def sweeps(settings: ContrastSettings) -> list[Sweep]:
    """The strategies of an evaluation that are swept."""
    return [strategy for strategy in settings.parsed() if isinstance(strategy, Sweep)]


def check_sweeps(settings: ContrastSettings, suite: RewardSuite) -> None:
    """Check, before anything is loaded, that every sweep can be tuned.

    Raises:
        ConfigError: no split to tune on, no rows, or a metric without a better direction.
    """
    found = sweeps(settings)
    if not found:
        return
    if settings.tune_split is None:
        raise ConfigError(
            f"strategy {found[0].spec!r} is to be tuned, and there are no rows to tune on; give one value, or "
            "evaluate with `rlseq evaluate` (or recipes/evaluate.py) and --tune_split"
        )
    for sweep in found:
        name, metric = tuning_metric(settings, sweep, suite)
        if metric.higher_is_better is None:
            raise ConfigError(
                f"strategy {sweep.spec!r} would be tuned by {name}, the metric of --primary, which is neither "
                "better high nor low; give one value, or another --primary"
            )


def tuning_metric(settings: ContrastSettings, sweep: Sweep, suite: RewardSuite) -> tuple[str, Metric]:
    """The metric that a sweep is tuned by: that of the primary comparison if it is of it, else the first reward's."""
    metrics = quality_metrics(suite, with_references=True, with_thoughts=settings.think_end is not None)
    name = next(iter(metrics))
    primary = Primary.of(settings)
    if primary and sweep.spec in (primary.spec, primary.spec_against):
        name = primary.metric
    return name, metrics[name]


def tune(
    models: Mapping[str, str | Path],
    tuning_rows: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    *,
    quiet: bool,
    output_dir: Path | None,
    bar: Any = None,
) -> tuple[Tuning, list[Prompt]]:
    """Measure every alternative of every sweep on the tuning rows, of each model.

    Called by all processes; each gets the same.

    Args:
        models: name -> path; the seeds of a method are tuned together.
        rows: those that are evaluated afterwards.
        output_dir: where finished parts are kept, as of the evaluation itself.
        bar: of the whole evaluation, which counts completions.

    Returns:
        {"rows", "split", "strategies": {sweep: {"metric", "higher_is_better", "models": {model: {"strategy": best,
        "values": {alternative: value}}}}}} and the tuning rows as prompts.

    Raises:
        DataError: there are no tuning rows, one of them has a prompt that is evaluated, or the metric is
            undefined on them.
    """
    if not tuning_rows:
        raise DataError(
            f"there are no rows to tune {sweeps(settings)[0].spec!r} on; give a split that has some, with --tune_split"
        )
    first, path = next(iter(models.items()))
    _validate_no_shared_prompts(tuning_rows, rows, load_tokenizer(first, str(path)), prompt_options)
    alternatives = dict.fromkeys(member.spec for sweep in sweeps(settings) for member in sweep.members)
    alone = dataclasses.replace(settings, strategies=tuple(alternatives), studies=(), likelihood_dataset=None)
    found: dict[str, ModelStatistics] = {}
    for name, path in models.items():
        options: dict[str, Any] = {"output_dir": output_dir, "doing": "tuning for", "bar": bar}
        found[name], prompts = measure_checkpoint(
            name, str(path), tuning_rows, suite, alone, prompt_options, quiet, **options
        )
    block: Tuning = {"rows": len(prompts), "split": settings.tune_split, "strategies": {}}
    for sweep in sweeps(settings):
        name, metric = tuning_metric(settings, sweep, suite)
        values = {model: _values(statistics, sweep, name, metric) for model, statistics in found.items()}
        block["strategies"][sweep.spec] = {
            "metric": name,
            "higher_is_better": metric.higher_is_better,
            "models": {model: {"strategy": None, "values": mine} for model, mine in values.items()},
        }
    _decide(block)
    if PartialState().is_main_process and not quiet:
        print(visible("\n".join(tuning_notes(block))), flush=True)
    return block, prompts


def tuned_strategies(model: str, block: Tuning) -> dict[str, Strategy]:
    """By sweep what is best for a model."""
    return {
        sweep: parse_strategy(entry["models"][model]["strategy"])
        for sweep, entry in block.get("strategies", {}).items()
    }


def tuning_spec(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What tuning depends on beside the settings."""
    return {"tuning": {"rows": len(prompts), "fingerprint": fingerprint(prompts)}} if prompts else {}


def joined_tuning(origins: Mapping[str, tuple[Tuning, str]]) -> Tuning:
    """The tuning of finished evaluations of the same sweeps, under the names of the joined one.

    Args:
        origins: by name in the joined evaluation the block of the finished one, and the model's name there.

    Raises:
        ConfigError: the seeds of a method together would not take what one of them took alone.
    """
    first, _ = next(iter(origins.values()))
    if not first:
        return {}
    block: Tuning = {**first, "strategies": {}}
    for sweep, entry in first["strategies"].items():
        mine = {name: dict(b["strategies"][sweep]["models"][old]) for name, (b, old) in origins.items()}
        block["strategies"][sweep] = {**entry, "models": mine}
    measured = {
        (sweep, name): m["strategy"] for sweep, e in block["strategies"].items() for name, m in e["models"].items()
    }
    _decide(block)
    for (sweep, name), strategy in measured.items():
        together = block["strategies"][sweep]["models"][name]["strategy"]
        if strategy != together:
            raise ConfigError(
                f"{name} was evaluated under {strategy}, its own best of {sweep}, and the seeds of its method "
                f"together take {together}: seeds are tuned together. Evaluate them together."
            )
    return block


def tuning_notes(block: Tuning) -> list[str]:
    """What a reader must know of each tuned strategy, with the numbers behind it."""
    notes = []
    for sweep, entry in block.get("strategies", {}).items():
        parts = []
        for method, seeds in methods(entry["models"]).items():
            means = _means([entry["models"][seed]["values"] for seed in seeds])
            chosen = entry["models"][seeds[0]]["strategy"]
            values = ", ".join(f"{alternative}: {value:.4g}" for alternative, value in means.items())
            parts.append(f"{method} takes {chosen} ({values})")
        notes.append(
            f"{sweep} is tuned for each model by {entry['metric']} "
            f"({'higher' if entry['higher_is_better'] else 'lower'} is better) on {block['rows']:,} rows of "
            f"{block['split']}, none of which is evaluated: {'; '.join(parts)}."
        )
    return notes


def _decide(block: Tuning) -> None:
    """Set for every model what its method takes: the best mean over seeds; of equal ones the first written.

    Raises:
        DataError: no alternative has a value.
    """
    for sweep, entry in block["strategies"].items():
        sign = 1 if entry["higher_is_better"] else -1
        for method, seeds in methods(entry["models"]).items():
            means = _means([entry["models"][seed]["values"] for seed in seeds])
            known = {alternative: sign * value for alternative, value in means.items() if not math.isnan(value)}
            if not known:
                raise DataError(
                    f"strategy {sweep!r} cannot be tuned for {method}: {entry['metric']} is undefined on the "
                    f"{block['rows']:,} rows of {block['split']} under every alternative. Give one value, another "
                    "--tune_split or another --primary."
                )
            for seed in seeds:
                entry["models"][seed]["strategy"] = max(known, key=known.get)


def _means(values: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """By alternative the mean over seeds; NaN where one has none."""
    return {
        alternative: math.fsum(math.nan if v[alternative] is None else v[alternative] for v in values) / len(values)
        for alternative in values[0]
    }


def _values(statistics: ModelStatistics, sweep: Sweep, name: str, metric: Metric) -> dict[str, float | None]:
    found = {}
    for member in sweep.members:
        rows = statistics.strategies[member.spec]
        value = math.nan
        if name in metrics_under({name: metric}, member.spec):
            value = float(metric.aggregate(matrix(rows, metric)))
        found[member.spec] = value if math.isfinite(value) else None
    return found


def _validate_no_shared_prompts(
    tuning_rows: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    prompt_options: Mapping[str, Any],
) -> None:
    """Raise DataError if a prompt is both tuned on and evaluated; prompts that differ only in whitespace are one."""
    evaluated, tuned_on = (
        {
            prompt_digest(prompt.prompt): repr(prompt.prompt)
            for prompt in build_prompts(part, tokenizer, **prompt_options)
        }
        for part in (rows, tuning_rows)
    )
    shared = sorted(text for key, text in tuned_on.items() if key in evaluated)
    if shared:
        raise DataError(
            f"{len(shared):,} of the {len(tuned_on):,} tuning prompts are evaluated too, for example "
            f"{shared[0][:80]}: a setting tuned on what it is judged by looks better than it is. Name other rows with "
            "--tune_split."
        )
