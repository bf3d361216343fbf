"""The contrast: how likely a model finds the references, and how good what it generates is, on the same rows.

Rows of statistics first, then aggregates, then intervals: every number of the report is an aggregate of the
per-row statistics gathered here, so that a bootstrap only resamples rows (a row with all its samples).
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlseq.data import build_prompts, fingerprint, reference_ids
from rlseq.decoding import Beam, Strategy, parse_strategy
from rlseq.errors import ConfigError, DataError, ModelError, did_you_mean
from rlseq.evaluation.stats import ExpRatioOfSums, RatioOfSums, bootstrap_many, paired_bootstrap_many
from rlseq.likelihood import score
from rlseq.sampler import sample, stop_ids_of
from rlseq.scoring import RewardSuite
from rlseq.search import beam
from rlseq.types import Prompt, Rollout

PASS_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCHEMA = 1
RowStatistics = dict[str, float]  # name of a statistic -> its sum over the row's references or samples


@dataclass(frozen=True)
class ContrastSettings:
    """What is measured, and how; part of every result's signature.

    Attributes:
        strategies: decoding strategies as `rlseq.decoding.parse_strategy` reads them.
        samples_per_row: completions drawn a row under strategies that sample.
        max_new_tokens: completions are cut after so many tokens.
        seed: of the sampling and of the bootstrap.
        resamples: bootstrap resamples, and sign flips of the permutation test.
        batch_rows: rows decoded together; changes memory and time only.
        primary: the one comparison with a claim, `metric:strategy`; the rest are exploratory.
        primary_against: strategy of the first model that the primary comparison is made with, if another.
    """

    strategies: tuple[str, ...] = ("greedy", "sample", "beam")
    samples_per_row: int = 4
    max_new_tokens: int = 256
    seed: int = 0
    resamples: int = 10_000
    batch_rows: int = 256
    primary: str | None = None
    primary_against: str | None = None

    def parsed(self) -> list[Strategy]:
        """The strategies as objects."""
        return [parse_strategy(text) for text in self.strategies]


@dataclass
class ModelStatistics:
    """Per-row statistics of one model on R rows, and the completions they come from."""

    path: str
    likelihood: list[RowStatistics]  # empty dicts where a row has no references
    strategies: dict[str, list[RowStatistics]]
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Metric:
    """A number for a set of rows: an aggregate over named per-row statistics, and how to read it."""

    statistics: tuple[str, ...]
    aggregate: Any
    higher_is_better: bool | None
    description: str
    percent: bool = False
    kind: str = "mean"


@dataclass(frozen=True)
class _CorpusAggregate:
    """A reward's corpus metric as an aggregate of a statistics matrix (n, K)."""

    metric: Any

    def __call__(self, stats: np.ndarray) -> float:
        return float(self.from_sums(stats.sum(axis=0)))

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return self.metric.compute({name: sums[..., i] for i, name in enumerate(self.metric.statistics)})


@dataclass(frozen=True)
class _BitsPerByte(RatioOfSums):
    """Σ nats / (ln 2 · Σ bytes)."""

    def from_sums(self, sums: np.ndarray) -> np.ndarray:
        return super().from_sums(sums) / np.log(2)


LIKELIHOOD_METRICS = {
    "nll_per_token": Metric(
        ("nll", "tokens"),
        RatioOfSums(),
        False,
        "mean next-token loss over the references, stop included (nats)",
    ),
    "perplexity": Metric(("nll", "tokens"), ExpRatioOfSums(), False, "exp of the NLL per token"),
    "bits_per_byte": Metric(
        ("nll", "bytes"),
        _BitsPerByte(),
        False,
        "bits to code a byte of reference text; free of the tokenizer",
    ),
    "sequence_logprob": Metric(
        ("sequence_logprob", "references"), RatioOfSums(), True, "mean log-prob of a whole reference (nats)"
    ),
    "exact_accuracy": Metric(
        ("p_correct", "rows"),
        RatioOfSums(),
        True,
        "chance that one ancestral sample is one of the references: mean Σ exp(log-prob), no sampling noise",
        percent=True,
    ),
    **{
        f"exact_pass_at_k.{k}": Metric(
            (f"pass_at_{k}", "rows"),
            RatioOfSums(),
            True,
            f"chance that {k} samples hold a right one",
            percent=True,
        )
        for k in PASS_AT
    },
}

# What is measured of any completion; a reward of one of these names is listed as reward.<name>.
COMPLETION_METRICS = {
    "exact_match": Metric(
        ("exact_match", "with_references"),
        RatioOfSums(),
        True,
        "share of completions whose tokens are those of a reference",
        percent=True,
        kind="accuracy",
    ),
    "length": Metric(("length", "samples"), RatioOfSums(), None, "mean tokens, stop included"),
    "truncated": Metric(
        ("truncated", "samples"), RatioOfSums(), False, "share of completions cut at the limit", percent=True
    ),
    "logprob": Metric(
        ("logprob", "samples"), RatioOfSums(), None, "mean log-prob of a completion under its own strategy (nats)"
    ),
}


def contrast(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    *,
    settings: ContrastSettings | None = None,
    prompt_options: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate named checkpoints on the same rows and compare each with the first.

    Args:
        models: name -> path or hub id. The first is `a` in every comparison.
        rows: the data set's rows, as `rlseq.data.load_rows` gives them.
        suite: the rewards that measure quality.
        settings: strategies, samples, seed.
        prompt_options: how rows become prompts, as `rlseq.data.build_prompts` takes them.
        output_dir: results.json, per_example.jsonl and samples.jsonl are written there.
        quiet: no progress bars.

    Returns:
        The results, in the shape of results.json. Under several processes each row is computed once and the
        first process has the result; the others get an empty dict.

    Raises:
        RlseqError: a setting, model, column or reward that does not work; strategies, the primary comparison
            and columns are checked before any model is loaded.
    """
    settings = settings or ContrastSettings()
    strategies = settings.parsed()
    if not models:
        raise ConfigError("no models were named; give at least one as NAME=PATH")
    if not rows:
        raise DataError("the data set is empty")
    check_settings(settings, suite)
    state = PartialState()
    found: dict[str, ModelStatistics] = {}
    for name, path in models.items():
        found[name], data = _measure(name, str(path), rows, suite, strategies, settings, prompt_options or {}, quiet)
    if not state.is_main_process:
        return {}
    metrics = _metrics(found, suite)
    results = {
        "schema": SCHEMA,
        "signature": _signature(settings, suite, data, prompt_options or {}),
        "rows": len(rows),
        "models": _model_results(found, metrics, settings),
        "comparisons": _comparisons(found, metrics, settings),
        "metrics": {
            name: {
                "higher_is_better": m.higher_is_better,
                "kind": m.kind,
                "description": m.description,
                "percent": m.percent,
            }
            for name, m in {**metrics, **LIKELIHOOD_METRICS}.items()
        },
        "primary": _primary(settings, list(models)),
        "notes": [],
    }
    if not any(any(statistics.likelihood) for statistics in found.values()):
        results["notes"].append("The data has no references: the likelihood part is skipped.")
    if output_dir is not None:
        write_results(results, found, Path(output_dir), rows_of=data)
    return results


def contrast_and_report(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    *,
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    output_dir: Path,
    title: str,
    metrics_file: Path | None = None,
) -> dict[str, Any]:
    """`contrast`, then report.html, report.md and plots/ beside its results, and a short table on the terminal.

    `metrics_file` is a training run's metrics.jsonl, whose curves the report shows.
    """
    from rlseq.evaluation.report import print_summary, write_report

    results = contrast(models, rows, suite, settings=settings, prompt_options=prompt_options, output_dir=output_dir)
    if results:
        samples, per_example = (read_jsonl(output_dir / name) for name in ("samples.jsonl", "per_example.jsonl"))
        curves = read_jsonl(metrics_file) if metrics_file is not None and metrics_file.is_file() else None
        report = write_report(results, samples, output_dir, per_example=per_example, metrics=curves, title=title)
        print_summary(results)
        print(f"report: {report}", flush=True)
    return results


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _measure(
    name: str,
    path: str,
    rows: Sequence[Mapping[str, Any]],
    suite: RewardSuite,
    strategies: Sequence[Strategy],
    settings: ContrastSettings,
    prompt_options: Mapping[str, Any],
    quiet: bool,
) -> tuple[ModelStatistics, list[Prompt]]:
    """Measure one checkpoint; under several processes each takes every n-th row and the first gathers them."""
    state = PartialState()
    tokenizer = _load(AutoTokenizer, name, path, padding_side="left")
    prompts = build_prompts(rows, tokenizer, **prompt_options)
    suite.check_columns(["prompt", *prompts[0].columns])
    if (settings.primary or "").startswith("exact_match:") and not any(p.columns["references"] for p in prompts):
        raise ConfigError(f"--primary is {settings.primary!r}, but the data has no references to match")
    model = _load(AutoModelForCausalLM, name, path, dtype=torch.float32, use_safetensors=True)
    model.to(state.device).eval()
    mine = list(range(state.process_index, len(prompts), state.num_processes))
    local = [prompts[i] for i in mine]
    stops = stop_ids_of(model, tokenizer)
    bar = tqdm(
        total=len(local) * (len(strategies) + 1),
        desc=f"evaluating {name}",
        unit="row",
        disable=quiet or not state.is_main_process,
        leave=False,
    )

    references = [reference_ids(prompt, tokenizer, stops) for prompt in local]
    likelihood = _likelihood_rows(model, local, references)
    bar.update(len(local))
    by_strategy: dict[str, list[RowStatistics]] = {}
    samples: list[dict[str, Any]] = []
    for index, strategy in enumerate(strategies):
        common = {"max_new_tokens": settings.max_new_tokens, "stop_ids": stops, "tokenizer": tokenizer}
        if isinstance(strategy, Beam):
            groups = beam(
                model, local, strategy=strategy, batch_rows=settings.batch_rows, progress=bar.update, **common
            )
        else:
            groups = sample(
                model,
                local,
                strategy=strategy,
                num_samples=settings.samples_per_row if strategy.samples else 1,
                seed=settings.seed,
                draw=index,
                batch_rows=settings.batch_rows * (settings.samples_per_row if strategy.samples else 1),
                progress=bar.update,
                **common,
            )
        statistics, records = _quality_rows(name, strategy, local, groups, references, suite)
        by_strategy[strategy.signature] = statistics
        samples += records
    bar.close()
    gathered = gather_object([(mine, likelihood, by_strategy, samples)])
    whole = ModelStatistics(path, [{}] * len(prompts), {s.signature: [{}] * len(prompts) for s in strategies})
    for places, part_likelihood, part_strategies, part_samples in gathered:
        for local_row, i in enumerate(places):
            whole.likelihood[i] = part_likelihood[local_row]
            for signature, statistics in part_strategies.items():
                whole.strategies[signature][i] = statistics[local_row]
        whole.samples += part_samples
    order = {prompt.key: i for i, prompt in enumerate(prompts)}
    places_of = {s.signature: i for i, s in enumerate(strategies)}
    whole.samples.sort(key=lambda r: (places_of[r["strategy"]], order[r["key"]], r["sample"]))
    return whole, prompts


def _load(kind: Any, name: str, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"cannot load model {name!r} from {path!r}: {reason}") from error


def _likelihood_rows(
    model: Any, prompts: Sequence[Prompt], references: Sequence[Sequence[tuple[int, ...]]]
) -> list[RowStatistics]:
    pairs = [(row, ids) for row, found in enumerate(references) for ids in found]
    logprobs = score(model, [prompts[row].prompt_ids for row, _ in pairs], [ids for _, ids in pairs]) if pairs else []
    statistics: list[RowStatistics] = [{} for _ in prompts]
    for (row, ids), token_logprobs in zip(pairs, logprobs, strict=True):
        logprob = token_logprobs.double().sum().item()
        mine = statistics[row]
        mine["nll"] = mine.get("nll", 0.0) - logprob
        mine["tokens"] = mine.get("tokens", 0.0) + len(ids)
        mine["sequence_logprob"] = mine.get("sequence_logprob", 0.0) + logprob
        mine["references"] = mine.get("references", 0.0) + 1
        mine["p_correct"] = mine.get("p_correct", 0.0) + float(np.exp(logprob))
    for prompt, mine in zip(prompts, statistics, strict=True):
        if mine:
            texts = set(prompt.columns["references"])
            mine["bytes"] = float(sum(len(text.encode()) for text in texts))
            mine["rows"] = 1.0
            p = min(mine["p_correct"], 1.0)
            for k in PASS_AT:
                mine[f"pass_at_{k}"] = float(-np.expm1(k * np.log1p(-p))) if p < 1 else 1.0
    return statistics


def _quality_rows(
    name: str,
    strategy: Strategy,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Sequence[tuple[int, ...]]],
    suite: RewardSuite,
) -> tuple[list[RowStatistics], list[dict[str, Any]]]:
    flat = [(row, rollout) for row, group in enumerate(groups) for rollout in group]
    columns = {key: [prompts[row].columns.get(key) for row, _ in flat] for key in prompts[0].columns} if prompts else {}
    columns["prompt"] = [prompts[row].messages_or_text for row, _ in flat]
    table = suite.score([rollout for _, rollout in flat], columns)
    statistics: list[RowStatistics] = [{} for _ in prompts]
    records = []

    def add(row: int, key: str, value: float) -> None:
        statistics[row][key] = statistics[row].get(key, 0.0) + value

    for (row, rollout), scored in zip(flat, table.scored, strict=True):
        add(row, "samples", 1)
        add(row, "length", len(rollout.completion_ids))
        add(row, "truncated", float(rollout.finish_reason == "length"))
        add(row, "logprob", rollout.logprob)
        if references[row]:
            add(row, "exact_match", float(rollout.completion_ids in references[row]))
            add(row, "with_references", 1)
        for reward in suite.names:
            value = scored.values[reward]
            add(row, f"{reward}:sum", value or 0.0)
            add(row, f"{reward}:count", float(value is not None))
            add(row, f"{reward}:failed", float(scored.status[reward] not in ("ok", "abstained")))
        for metric in suite.corpus.values():
            details = scored.details[metric.reward]
            for key in metric.statistics:
                statistics[row][f"{metric.reward}.{key}"] = statistics[row].get(f"{metric.reward}.{key}", 0.0) + float(
                    details.get(key, 0.0)
                )
        records.append(
            {
                "model": name,
                "strategy": strategy.signature,
                "key": prompts[row].key,
                "prompt": prompts[row].messages_or_text,
                "references": list(prompts[row].columns.get("references", ())),
                "sample": rollout.sample,
                "completion": rollout.text,
                "values": dict(scored.values),
                "total": scored.total,
                "logprob": rollout.logprob,
                "length": len(rollout.completion_ids),
                "finish_reason": rollout.finish_reason,
            }
        )
    return statistics, records


def _metrics(found: Mapping[str, ModelStatistics], suite: RewardSuite) -> dict[str, Metric]:
    """The quality metrics: each reward's mean, the corpus aggregates, then what is measured of any completion."""
    metrics: dict[str, Metric] = {}
    for reward, name in _reward_metrics(suite).items():
        metrics[name] = Metric(
            (f"{reward}:sum", f"{reward}:count"),
            RatioOfSums(),
            True,
            "mean reward over completions",
            kind="reward",
        )
    for name, corpus in suite.corpus.items():
        metrics[name] = Metric(
            tuple(f"{corpus.reward}.{key}" for key in corpus.statistics),
            _CorpusAggregate(corpus),
            corpus.higher_is_better,
            corpus.description,
            percent=True,
            kind="corpus",
        )
    measured = dict(COMPLETION_METRICS)
    if not any(row for statistics in found.values() for row in statistics.likelihood):
        del measured["exact_match"]
    return metrics | measured


def _reward_metrics(suite: RewardSuite) -> dict[str, str]:
    """The metric of each reward: its own name, unless a metric that is always there has it."""
    return {name: f"reward.{name}" if name in COMPLETION_METRICS else name for name in suite.names}


def check_settings(settings: ContrastSettings, suite: RewardSuite) -> None:
    """Check, before anything is loaded, that the strategies can be read and the primary comparison will be measured.

    Raises:
        ConfigError: a strategy that cannot be read or is named twice; a primary comparison of an unknown metric
            (the message names the nearest) or of a strategy that is not among the strategies.
    """
    measured = [strategy.signature for strategy in settings.parsed()]
    if len(set(measured)) < len(measured):
        raise ConfigError(f"a strategy is named twice in {', '.join(settings.strategies)}")
    if settings.primary is None:
        if settings.primary_against is not None:
            raise ConfigError(f"--primary_against {settings.primary_against!r} needs --primary METRIC:STRATEGY")
        return
    metric, colon, strategy = settings.primary.partition(":")
    if not colon:
        raise ConfigError(f"--primary is {settings.primary!r}; expected METRIC:STRATEGY, for example wer:greedy")
    known = [*_reward_metrics(suite).values(), *suite.corpus, *COMPLETION_METRICS]
    if metric not in known:
        raise ConfigError(
            f"--primary names no metric of this evaluation: {metric!r}; there are {', '.join(known)}."
            + did_you_mean(metric, known)
        )
    for flag, text in (("primary", strategy), ("primary_against", settings.primary_against)):
        if text is not None and parse_strategy(text).signature not in measured:
            raise ConfigError(
                f"--{flag} names the strategy {text!r}, which is not among --strategies {' '.join(measured)}."
                + did_you_mean(text, measured)
            )


def _matrix(rows: Sequence[RowStatistics], metric: Metric) -> np.ndarray:
    return np.array([[row.get(key, 0.0) for key in metric.statistics] for row in rows])  # (R, K)


def _model_results(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> dict[str, Any]:
    tables: dict[tuple[str, str | None, str], tuple[np.ndarray, Any]] = {}
    for name, statistics in found.items():
        if any(statistics.likelihood):
            for metric_name, metric in LIKELIHOOD_METRICS.items():
                tables[name, None, metric_name] = (_matrix(statistics.likelihood, metric), metric.aggregate)
        for strategy, rows in statistics.strategies.items():
            for metric_name, metric in metrics.items():
                tables[name, strategy, metric_name] = (_matrix(rows, metric), metric.aggregate)
    intervals = bootstrap_many(tables, seed=settings.seed, resamples=settings.resamples)
    results: dict[str, Any] = {}
    for (name, strategy, metric_name), interval in intervals.items():
        model = results.setdefault(name, {"path": found[name].path, "likelihood": {}, "strategies": {}})
        place = model["likelihood"] if strategy is None else model["strategies"].setdefault(strategy, {})
        if "." in metric_name and strategy is None:
            metric_name, _, key = metric_name.partition(".")
            place = place.setdefault(metric_name, {})
            metric_name = key
        place[metric_name] = {"value": interval.value, "ci95": list(interval.ci95)}
    return results


def _comparisons(
    found: Mapping[str, ModelStatistics], metrics: Mapping[str, Metric], settings: ContrastSettings
) -> list[dict[str, Any]]:
    names = list(found)
    pairs: dict[tuple[str, str, str | None, str | None, str], tuple[np.ndarray, np.ndarray, Any]] = {}

    def compare(a: str, b: str, strategy_a: str | None, strategy_b: str | None, name: str, metric: Metric) -> None:
        sides = [
            found[m].likelihood if s is None else found[m].strategies[s] for m, s in ((a, strategy_a), (b, strategy_b))
        ]
        pairs[a, b, strategy_a, strategy_b, name] = (
            _matrix(sides[0], metric),
            _matrix(sides[1], metric),
            metric.aggregate,
        )

    a = names[0]
    for b in names[1:]:
        if any(found[a].likelihood):
            for name, metric in LIKELIHOOD_METRICS.items():
                compare(a, b, None, None, name, metric)
        for strategy in found[a].strategies:
            for name, metric in metrics.items():
                compare(a, b, strategy, strategy, name, metric)
        if settings.primary and settings.primary_against:
            name, _, strategy = settings.primary.partition(":")
            against = parse_strategy(settings.primary_against).signature
            compare(a, b, against, parse_strategy(strategy).signature, name, metrics[name])
    found_pairs = paired_bootstrap_many(pairs, seed=settings.seed, resamples=settings.resamples) if pairs else {}
    return [
        {
            "a": a,
            "b": b,
            "strategy": strategy_b,
            **({"strategy_a": strategy_a} if strategy_a != strategy_b else {}),
            "metric": name,
            "difference": result.difference,
            "ci95": list(result.ci95),
            "p_value": result.p_value,
        }
        for (a, b, strategy_a, strategy_b, name), result in found_pairs.items()
    ]


def _primary(settings: ContrastSettings, names: list[str]) -> dict[str, str] | None:
    if settings.primary is None or len(names) < 2:
        return None
    metric, _, strategy = settings.primary.partition(":")
    primary = {"metric": metric, "strategy": parse_strategy(strategy).signature, "a": names[0], "b": names[1]}
    against = primary["strategy"]
    if settings.primary_against:
        against = parse_strategy(settings.primary_against).signature
    return primary if against == primary["strategy"] else {**primary, "strategy_a": against}


def _signature(
    settings: ContrastSettings,
    suite: RewardSuite,
    prompts: Sequence[Prompt],
    prompt_options: Mapping[str, Any],
) -> dict[str, Any]:
    """What a number depends on: equal signatures and equal weights give equal results."""
    import transformers

    import rlseq

    shown = dataclasses.asdict(settings)
    shown.pop("batch_rows")
    return {
        "versions": {
            "rlseq": rlseq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {**shown, "strategies": list(settings.strategies), "prompt": dict(prompt_options)},
        "seed": settings.seed,
        "rewards": suite.signature(),
        "data": {"rows": len(prompts), "fingerprint": fingerprint(prompts)},
    }


def write_results(
    results: Mapping[str, Any],
    found: Mapping[str, ModelStatistics],
    output_dir: Path,
    *,
    rows_of: Sequence[Prompt],
) -> None:
    """Write results.json, per_example.jsonl (a line a model and row) and samples.jsonl (a line a completion)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    with (output_dir / "per_example.jsonl").open("w", encoding="utf-8") as file:
        for name, statistics in found.items():
            for i, prompt in enumerate(rows_of):
                likelihood = statistics.likelihood[i]
                record = {
                    "model": name,
                    "key": prompt.key,
                    "prompt": prompt.messages_or_text,
                    "references": list(prompt.columns.get("references", ())),
                    **{
                        key: likelihood[key] for key in ("nll", "tokens", "sequence_logprob", "p_correct") if likelihood
                    },
                    "strategies": {s: rows[i] for s, rows in statistics.strategies.items()},
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with (output_dir / "samples.jsonl").open("w", encoding="utf-8") as file:
        for statistics in found.values():
            for record in statistics.samples:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


__all__ = [
    "ContrastSettings",
    "Metric",
    "check_settings",
    "contrast",
    "contrast_and_report",
    "read_jsonl",
    "write_results",
]
