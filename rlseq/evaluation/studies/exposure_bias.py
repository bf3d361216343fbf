"""Exposure bias: entropy and quality after prefixes that the model sampled, against those of references."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlseq.engine.likelihood import score
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.decode import columns_of
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.names import Names
from rlseq.evaluation.statistics import Pair, RowStatistics, Source
from rlseq.evaluation.stats.estimators import RatioOfSums, SumOfRatios
from rlseq.evaluation.studies.exposure_bias_report import ALONE, BEYOND, EXACT, GAP, MODEL, REFERENCE, section_of
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, summarise
from rlseq.scoring import RewardSuite
from rlseq.types import Rollout

_POSITIONS = 64  # of the curves of entropy
_EXPOSURE = Source("exposure_bias")
_NO_REFERENCE = _EXPOSURE("no_reference")
_SPLICED, _WHOLE = "spliced", "whole_reference"  # the control's two sides


@dataclass(frozen=True)
class Continued:
    """The continuations of a reference's prefix and of a sampled one.

    Attributes:
        right: whether the sampled prefix begins a reference.
        values: (side, metric) -> what the metric says of the whole completion, None where it abstains.
    """

    right: bool
    values: Mapping[tuple[str, str], float | None]


@dataclass(frozen=True)
class Row:
    """A row: by side the entropies of each sequence by position, and by prefix length its pairs."""

    entropies: Mapping[str, list[list[float]]]
    pairs: dict[int, list[Continued]]


class ExposureBias(Study):
    """Entropy of the next token by position, and quality by the length of a forced prefix: of a reference, or sampled.

    He et al. 2021, "Exposure Bias versus Self-Recovery", compare continuations of prefixes from data and from the
    model. Here sample i of a row is paired with its reference i mod n, and each prefix length k continues the first k
    tokens of both by ancestral sampling, with the same noise: where the two are equal, so are the completions. A pair
    counts where both have more than k tokens, stop excluded.

    A control tells what the prefix alone costs: its first k sampled tokens and then the rest of a reference (one that
    begins so, or else the pair's), against the pair's reference. What the gap has beyond that is harm to the
    continuation (below 0) or recovery (above 0).
    """

    name = "exposure_bias"

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Refuse no lengths, and lengths named twice."""
        lengths = settings.prefix_lengths
        shown = " ".join(map(str, lengths))
        if not lengths:
            raise ConfigError("--prefix_lengths is empty; expected numbers of tokens")
        if len(set(lengths)) < len(lengths):
            raise ConfigError(f"--prefix_lengths names a length twice: {shown}")

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """Samples, what follows two prefixes of each length, and the entropies of references and samples."""
        samples = rows * settings.samples_per_row
        return samples * (1 + 2 * len(settings.prefix_lengths)), references + samples

    def sample(self, context: Context) -> list[Row | None]:
        """Sample, and score what follows each prefix; None for a row without references."""
        rows = [row for row, references in enumerate(context.references) if references]
        records: list[Row | None] = [None] * len(context.prompts)
        if rows:
            groups = context.sample(self.name, [context.prompts[row] for row in rows])
            sampled = {row: [r.completion_ids for r in group] for row, group in zip(rows, groups, strict=True)}
            for row, entropies in _entropies(context, sampled).items():
                records[row] = Row(entropies, {})
            for length in context.settings.prefix_lengths:
                for row, pair in _continuations(context, sampled, length):
                    records[row].pairs.setdefault(length, []).append(pair)
        context.progress(len(context.prompts))
        return records

    def statistics(self, records: list[Row | None]) -> list[RowStatistics]:
        """Per row, of sides S reference and model:

        entropy(S)     by position, the mean over the row's sequences that reach it (nats)
        pairs(k), right(k), sum(k, S, M), count(k, S, M)    sums over pairs, of prefix length k and metric M
        """
        return [{_NO_REFERENCE: 1.0} if record is None else _row_statistics(record) for record in records]

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """{"models": {model: {"entropy": {side: {position: cell}}, "continued": {k: {"rows", "pairs", "right": cell,
        "metrics": {metric: {side: cell}}}}}}, "comparisons": [...], "rows", "rows_without_references"}.

        Sides of entropy are reference, model and difference (model − reference, on the rows that have both); those of
        metrics the same, and of rewards prefix_alone and beyond too. Comparisons are of the metrics between models.
        """
        without = sum(_NO_REFERENCE in row for row in next(iter(found.values())))
        found = {
            model: [row for row in rows if _EXPOSURE("entropy", REFERENCE) in row] for model, rows in found.items()
        }
        block: dict[str, Any] = {"rows": len(next(iter(found.values()))), "rows_without_references": without}
        if not block["rows"]:
            return block
        block["models"] = {model: {"entropy": {}, "continued": {}} for model in found}
        _entropy_results(block, found, settings)
        _continued_results(block, found, settings)
        return block

    def section(self, results: Mapping[str, Any]) -> Section:
        """Entropy by position; quality by the length of the prefix, a table and a figure per metric."""
        return section_of(results["studies"][self.name], results)


class _Entropy:
    """In the place of log-probs, the entropy of each distribution: `score` then gives entropies by position."""

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)
        return entropy.expand_as(logits)  # the same whatever token follows


def _entropies(
    context: Context, sampled: Mapping[int, Sequence[tuple[int, ...]]]
) -> dict[int, dict[str, list[list[float]]]]:
    """By row and side the entropies of its sequences, by position."""
    sequences = [(row, REFERENCE, ids) for row in sampled for ids in context.references[row]]
    sequences += [(row, MODEL, ids) for row, group in sampled.items() for ids in group]
    prompts = [context.prompts[row].prompt_ids for row, _, _ in sequences]
    entropies = score(context.model, prompts, [ids for *_, ids in sequences], strategy=_Entropy())
    found: dict[int, dict[str, list[list[float]]]] = {row: {} for row in sampled}
    for (row, side, _), values in zip(sequences, entropies, strict=True):
        found[row].setdefault(side, []).append(values[:_POSITIONS].tolist())
    return found


def _continuations(
    context: Context, sampled: Mapping[int, Sequence[tuple[int, ...]]], length: int
) -> list[tuple[int, Continued]]:
    """Continue the first `length` tokens of each pair's reference and sample, and score them: (row, pair)."""
    pairs = [
        (row, i, context.references[row][i % len(context.references[row])], ids)
        for row, group in sampled.items()
        for i, ids in enumerate(group)
    ]
    pairs = [pair for pair in pairs if all(_content(ids, context) > length for ids in pair[2:])]
    if not pairs:
        return []
    places = [row for row, *_ in pairs]
    prompts = [context.prompts[row] for row in places]
    sides: dict[str, list[Rollout]] = {}
    for side, which in ((REFERENCE, 2), (MODEL, 3)):
        groups = context.sample(
            ExposureBias.name,
            prompts,
            part="continuations",  # not the stream of the sampled prefix: the rest would depend on it twice
            num_samples=1,
            samples=[[i] for _, i, *_ in pairs],
            prefixes=[pair[which][:length] for pair in pairs],
            max_new_tokens=context.settings.max_new_tokens - length,
        )
        sides[side] = [rollout for (rollout,) in groups]
    matching = [  # the pair's reference first
        [r for r in (reference, *context.references[row]) if r[:length] == ids[:length]]
        for row, _, reference, ids in pairs
    ]
    spliced = [
        (*ids[:length], *(right or [reference])[0][length:])
        for (_, _, reference, ids), right in zip(pairs, matching, strict=True)
    ]
    sides[_SPLICED] = _as_rollouts(sides[MODEL], spliced, context.tokenizer)
    sides[_WHOLE] = _as_rollouts(sides[MODEL], [reference for _, _, reference, _ in pairs], context.tokenizer)

    names = Names.of(context.suite).rewards
    values: list[dict[tuple[str, str], float | None]] = [{} for _ in pairs]
    for side, rollouts in sides.items():
        found = context.suite.score(rollouts, columns_of(context.prompts, places)).values
        named = {names[reward]: column for reward, column in found.items()}
        if side in (REFERENCE, MODEL):
            named[EXACT] = [
                float(r.completion_ids in context.references[place]) for place, r in zip(places, rollouts, strict=True)
            ]
        for metric, column in named.items():
            for mine, value in zip(values, column, strict=True):
                mine[side, metric] = value
    return [(row, Continued(bool(right), mine)) for row, right, mine in zip(places, matching, values, strict=True)]


def _row_statistics(record: Row) -> RowStatistics:
    row: RowStatistics = {}
    for side, found in record.entropies.items():
        columns = [[v[t] for v in found if t < len(v)] for t in range(max(map(len, found)))]
        row[_EXPOSURE("entropy", side)] = [sum(column) / len(column) for column in columns]
    for length, pairs in record.pairs.items():
        row[_EXPOSURE("pairs", length)] = float(len(pairs))
        row[_EXPOSURE("right", length)] = float(sum(pair.right for pair in pairs))
        for side, metric in pairs[0].values:
            column = [pair.values[side, metric] for pair in pairs]
            row[_EXPOSURE("sum", length, side, metric)] = sum((value or 0.0 for value in column), 0.0)
            row[_EXPOSURE("count", length, side, metric)] = float(sum(value is not None for value in column))
    return row


def _content(ids: Sequence[int], context: Context) -> int:
    """Tokens of a completion, stop excluded."""
    return len(ids) - (ids[-1] in context.stop_ids)


def _as_rollouts(like: Sequence[Rollout], completions: Sequence[tuple[int, ...]], tokenizer: Any) -> list[Rollout]:
    """Completions that were not sampled, as rollouts of the same prompts and samples."""
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    raws = tokenizer.batch_decode(completions, skip_special_tokens=False)
    return [
        dataclasses.replace(
            rollout,
            completion_ids=ids,
            loss_mask=(False,) * len(ids),
            logprobs=(0.0,) * len(ids),
            text=text,
            text_with_special_tokens=raw,
            messages=None if rollout.messages is None else ({"role": "assistant", "content": text},),
            finish_reason="stop",
        )
        for rollout, ids, text, raw in zip(like, completions, texts, raws, strict=True)
    ]


def _entropy_results(block: dict[str, Any], found: Mapping[str, Sequence[RowStatistics]], settings: Any) -> None:
    by_position: dict[str, list[RowStatistics]] = {}
    counts: dict[str, dict[tuple[str, int], int]] = {}
    for model, rows in found.items():
        by_position[model], counts[model] = [], {}
        for row in rows:
            sides = {side: row.get(_EXPOSURE("entropy", side), []) for side in (REFERENCE, MODEL)}
            sides[GAP] = [b - a for a, b in zip(sides[REFERENCE], sides[MODEL], strict=False)]
            flat = {(side, t): value for side, values in sides.items() for t, value in enumerate(values)}
            row = {_EXPOSURE("entropy", *place): value for place, value in flat.items()}
            by_position[model].append(row | {_EXPOSURE("rows", *place): 1.0 for place in flat})
            for place in flat:
                counts[model][place] = counts[model].get(place, 0) + 1
    places = sorted({place for model in counts.values() for place in model})
    metrics = {
        place: StudyMetric(Pair(_EXPOSURE("entropy", *place), _EXPOSURE("rows", *place)), RatioOfSums())
        for place in places
    }
    for model, cells in summarise(by_position, metrics, settings, compare=False)["models"].items():
        for (side, t), cell in cells.items():
            rows = counts[model].get((side, t), 0)
            if rows:
                block["models"][model]["entropy"].setdefault(side, {})[str(t)] = {**cell, "rows": rows}


def _continued_results(block: dict[str, Any], found: Mapping[str, Sequence[RowStatistics]], settings: Any) -> None:
    names = dict.fromkeys(
        key.params[2]
        for rows in found.values()
        for row in rows
        for key in row
        if key.name == "sum" and key.params[1] == MODEL
    )
    metrics: dict[tuple[int, str, str], StudyMetric] = {}
    for length in settings.prefix_lengths:
        metrics[length, "", "right"] = StudyMetric(
            Pair(_EXPOSURE("right", length), _EXPOSURE("pairs", length)), RatioOfSums()
        )
        for name in names:
            columns = {
                side: Pair(_EXPOSURE("sum", length, side, name), _EXPOSURE("count", length, side, name))
                for side in (REFERENCE, MODEL, _WHOLE, _SPLICED)
            }
            metrics[length, name, REFERENCE] = StudyMetric(columns[REFERENCE], RatioOfSums())
            metrics[length, name, MODEL] = StudyMetric(columns[MODEL], RatioOfSums())
            gap, alone = columns[REFERENCE] + columns[MODEL], columns[_WHOLE] + columns[_SPLICED]
            metrics[length, name, GAP] = StudyMetric(gap, SumOfRatios((-1, 1)))
            if name != EXACT:  # which does not add up over tokens
                metrics[length, name, ALONE] = StudyMetric(alone, SumOfRatios((-1, 1)))
                metrics[length, name, BEYOND] = StudyMetric(gap + alone, SumOfRatios((-1, 1, 1, -1)))
    summary = summarise(found, metrics, settings)
    for model, cells in summary["models"].items():
        rows = found[model]
        continued = block["models"][model]["continued"]
        for length in settings.prefix_lengths:
            pairs = [row.get(_EXPOSURE("pairs", length), 0.0) for row in rows]
            entry = {"rows": sum(n > 0 for n in pairs), "pairs": int(sum(pairs)), "metrics": {}}
            continued[str(length)] = entry
            if entry["rows"]:
                entry["right"] = cells[length, "", "right"]
                for (k, name, side), cell in cells.items():
                    if k == length and name:
                        entry["metrics"].setdefault(name, {})[side] = cell
    block["comparisons"] = [
        {**c, "prefix": str(length), "metric": name, "side": side}
        for c in summary["comparisons"]
        for length, name, side in [c["metric"]]
        if name
    ]
