"""What k samples hold: pass@k, the best of k and the majority vote of k, for k in powers of two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy  # its stats load on first use, which takes a second
import torch

from rlseq.config.arguments import COVERAGE
from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.measures import exact_pass_at_k, reference_probability
from rlseq.engine.stop_strings import StopStrings
from rlseq.evaluation.measure.decode import columns_of
from rlseq.evaluation.measure.references import SAMPLING_ROUNDING
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.names import Names
from rlseq.evaluation.statistics import Pair, RowStatistics, Source, Statistic
from rlseq.evaluation.stats.estimators import RatioOfSums, best_of_k, pass_at_k
from rlseq.evaluation.stats.majority import win_chances
from rlseq.evaluation.studies.coverage_report import section_of
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, summarise
from rlseq.scoring import RewardSuite

LARGEST = int(COVERAGE.most)  # samples per row, and the largest k of the exact curve
_COVERAGE = Source("coverage")
_JUDGED = _COVERAGE("judged")
_CURVES = {"pass": "pass_at_k", "exact": "exact_pass_at_k", "majority_right": "majority.exact_match"}
_REWARD_CURVES = {"best": "best_of_k", "majority": "majority"}
_HELD_TOKENS = 2**22  # completions of at most this many tokens are held at once, one row at least


@dataclass(frozen=True)
class Sampled:
    """A row's n samples.

    Attributes:
        answers: their texts, which vote.
        values: by reward (n,) values, NaN where it abstained or failed.
        right: whether each is a reference; None if the row has no references.
        p: the probability that one sample is a reference, exactly.
    """

    answers: Sequence[str]
    values: Mapping[str, np.ndarray]
    right: Sequence[bool] | None = None
    p: float | None = None


class Coverage(Study):
    """n ancestral samples per row, and what a choice of k among them gives, in expectation over the choice.

    For k in powers of two up to n:

    * `pass_at_k`: the chance that one of k equals a reference by token ids, 1 − C(n−c, k) / C(n, k) where c of n do
      (Chen et al. 2021, eq. 1)
    * `exact_pass_at_k`: the same without sampling, 1 − (1 − p)^k with p the summed probability of the references, up to
      k = 256; and `agreement`, how far the two are apart in standard errors of the sampling
    * `best_of_k.R`: the expected largest reward R among k, over the choices of k in which some have a value
    * `majority.exact_match`, `majority.R`: the chance that the most frequent text among k is a reference, and its
      expected reward
    """

    name = "coverage"

    def check(self, settings: Any, suite: RewardSuite) -> None:
        """Nothing can be wrong beside the range of coverage_samples."""

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """n samples a row, and its references."""
        return rows * settings.coverage_samples, references

    def sample(self, context: Context) -> list[Sampled]:
        """Sample and score, at most `_HELD_TOKENS` at once."""
        settings, n = context.settings, context.settings.coverage_samples
        names = Names.of(context.suite).rewards
        chances = _chances(context)
        at_once = max(1, _HELD_TOKENS // (n * settings.max_new_tokens))
        records: list[Sampled] = []
        for start in range(0, len(context.prompts), at_once):
            prompts = context.prompts[start : start + at_once]
            groups = context.sample(self.name, prompts, num_samples=n, progress=context.progress)
            columns = columns_of(prompts, [row for row in range(len(prompts)) for _ in range(n)])
            values = context.suite.score([rollout for group in groups for rollout in group], columns).values
            by_reward = {names[r]: np.array(v, dtype=float).reshape(-1, n) for r, v in values.items()}  # (R, n)
            for i, group in enumerate(groups):
                references = context.references[start + i]
                records.append(
                    Sampled(
                        [rollout.text.strip() for rollout in group],
                        {name: found[i] for name, found in by_reward.items()},
                        right=[rollout.completion_ids in references for rollout in group] if references else None,
                        p=chances[start + i],
                    )
                )
        return records

    def statistics(self, records: list[Sampled]) -> list[RowStatistics]:
        """`row_statistics` of each row."""
        return [row_statistics(record) for record in records]

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """Curves, differences and agreement of the rows that were studied.

        {"samples": n, "rows": R, "models": {model: {curve: {k: {"value", "ci95"}}}},
        "comparisons": [{"a", "b", "curve", "differences": {k: {"difference", "ci95"}}, "sign_changes": [[k, k]]}],
        "agreement": {model: {"differences": {k: {"difference", "standard_error"}}, "agrees"}}}; k is a text.
        """
        studied = [i for i, rows in enumerate(zip(*found.values(), strict=True)) if any(rows)]
        if not studied:
            return None
        found = {model: [rows[i] for i in studied] for model, rows in found.items()}
        keys = dict.fromkeys(key for rows in found.values() for row in rows for key in row)
        summary = summarise(found, _metrics(keys), settings)
        models: dict[str, Any] = {}
        for model, cells in summary["models"].items():
            for (curve, k), cell in cells.items():
                models.setdefault(model, {}).setdefault(curve, {})[str(k)] = cell
        compared: dict[tuple[str, str, str], dict[str, Any]] = {}
        for c in summary["comparisons"]:
            curve, k = c["metric"]
            mine = compared.setdefault((c["a"], c["b"], curve), {})
            mine[str(k)] = {"difference": c["difference"], "ci95": c["ci95"]}
        return {
            "samples": settings.coverage_samples,
            "rows": len(studied),
            "models": models,
            "comparisons": [
                {"a": a, "b": b, "curve": curve, "differences": d, "sign_changes": sign_changes(d)}
                for (a, b, curve), d in compared.items()
            ],
            "agreement": {model: _agreement(rows) for model, rows in found.items() if _COVERAGE("pass", 1) in keys},
        }

    def section(self, results: Mapping[str, Any]) -> Section:
        """A pair of figures and of tables for success and for each reward, and a table of the agreement."""
        return section_of(results["studies"][self.name], results)


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, … up to `largest`."""
    return [2**i for i in range(largest.bit_length())]


def row_statistics(record: Sampled) -> RowStatistics:
    """The sufficient statistics of a row's n samples, for each k a number, k the first parameter.

    Where a reward abstains on a sample, a choice of k counts if one of its samples has a value, and is worth the best
    of these: best(k, R) is the expected sum over such choices and best_count(k, R) their share. A majority of k is a
    text; it is worth the mean over its samples in the choice, and where some abstain counts for the share with a value.
    Since samples of one text are exchangeable, that is the mean over all of its samples.
    """
    answers, right, p = record.answers, record.right, record.p
    n = len(answers)
    ks = powers_of_two(n)
    places: dict[str, int] = {}
    answer_of = np.array([places.setdefault(answer, len(places)) for answer in answers])  # (n,)
    votes = np.bincount(answer_of)
    wins = np.stack([win_chances(votes, k) for k in ks]) / votes  # (K, m) a sample of the text
    statistics: RowStatistics = {}
    if right is not None:
        hits = np.array(right, dtype=float)
        _add(statistics, "pass", ks, _pass_table(n)[int(hits.sum())])
        _add(statistics, "majority_right", ks, wins[:, answer_of] @ hits)
        chance = torch.tensor([p], dtype=torch.double)
        exact_ks = powers_of_two(LARGEST)
        _add(statistics, "exact", exact_ks, [float(exact_pass_at_k(chance, k)) for k in exact_ks])
        exact = np.array([statistics[_COVERAGE("exact", k)] for k in ks])
        # What the sampling of n alone does to the estimate, squared: c ~ B(n, p)
        _add(
            statistics,
            "variance",
            ks,
            scipy.stats.binom.pmf(np.arange(n + 1), n, min(p, 1.0)) @ (_pass_table(n) - exact) ** 2,
        )
        statistics[_JUDGED] = 1.0
    for reward, found in record.values.items():
        present = np.isfinite(found)
        held = _pass_table(n)[int(present.sum())]  # (K,) the share of choices with a value
        least = found[present].min() if present.any() else 0.0
        filled = np.where(present, found, least)  # a choice with no value is then worth `least`, which is taken off
        best = np.array([best_of_k(filled, k) for k in ks]) - least * (1 - held)
        _add(statistics, "best", ks, best, reward)
        _add(statistics, "best_count", ks, held, reward)
        _add(statistics, "majority", ks, wins[:, answer_of] @ np.where(present, found, 0.0), reward)
        _add(statistics, "majority_count", ks, wins[:, answer_of] @ present, reward)
    return statistics


def sign_changes(differences: Mapping[str, Mapping[str, Any]]) -> list[list[int]]:
    """The pairs of neighbouring k between which the difference changes its sign; where it is 0, k is passed over."""
    signs = [(int(k), d["difference"] > 0) for k, d in differences.items() if abs(d["difference"]) > SAMPLING_ROUNDING]
    return [[k, after] for (k, sign), (after, other) in itertools.pairwise(signs) if sign != other]


def _chances(context: Context) -> list[float]:
    """By row the chance that one sample is a reference: the summed probability of those that can be sampled whole."""
    strings = StopStrings(context.settings.stop_strings or (), context.tokenizer)
    fitting = [
        (row, ids)
        for row, found in enumerate(context.references)
        for ids in found
        if len(ids) <= context.settings.max_new_tokens and not strings.cuts(ids)
    ]
    prompts = [context.prompts[row].prompt_ids for row, _ in fitting]
    logprobs = [to_float64(tokens).sum() for tokens in score(context.model, prompts, [ids for _, ids in fitting])]
    total = torch.stack(logprobs).cpu() if logprobs else torch.zeros(0, dtype=torch.double)
    rows = torch.tensor([row for row, _ in fitting], dtype=torch.long)
    return reference_probability(total, rows, len(context.prompts)).tolist()


@cache
def _pass_table(n: int) -> np.ndarray:
    """(n + 1, K): pass@k of n samples of which c = 0 … n are right."""
    return pass_at_k(n, np.arange(n + 1)[:, None], np.array(powers_of_two(n)))


def _add(statistics: RowStatistics, name: str, ks: Sequence[int], values: Sequence[float], *params: str) -> None:
    statistics |= {_COVERAGE(name, k, *params): float(value) for k, value in zip(ks, values, strict=True)}


def _metrics(keys: Collection[Statistic]) -> dict[tuple[str, int], StudyMetric]:
    """(curve, k) -> the ratio of sums of the statistics there are."""
    metrics: dict[tuple[str, int], StudyMetric] = {}
    for key in keys:
        if key.name in _CURVES:
            metrics[_CURVES[key.name], key.params[0]] = StudyMetric(Pair(key, _JUDGED), RatioOfSums())
        if key.name in _REWARD_CURVES:
            k, reward = key.params
            pair = Pair(key, _COVERAGE(f"{key.name}_count", k, reward))
            metrics[f"{_REWARD_CURVES[key.name]}.{reward}", k] = StudyMetric(pair, RatioOfSums())
    return metrics


def _agreement(rows: Sequence[RowStatistics]) -> dict[str, Any]:
    """Estimate − exact at each k, its standard error, and whether all are within 3 of these (and rounding)."""
    judged = [row for row in rows if _JUDGED in row]
    differences = {}
    for key in judged[0]:
        if key.name == "pass":
            (k,) = key.params
            gap = sum(row[key] - row[_COVERAGE("exact", k)] for row in judged) / len(judged)
            error = math.sqrt(sum(row[_COVERAGE("variance", k)] for row in judged)) / len(judged)
            differences[str(k)] = {"difference": gap, "standard_error": error}
    agrees = all(abs(d["difference"]) <= 3 * d["standard_error"] + SAMPLING_ROUNDING for d in differences.values())
    return {"differences": differences, "agrees": agrees}
