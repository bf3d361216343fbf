"""Evaluation during training: the same few rows measured again and again, without leaving a trace in the run.

A recipe makes a `ValidationEvaluator` and hands it to its trainer as a callable, model in, numbers out, so that the
trainer needs nothing of this room. `learning_warnings` reads what was logged and says what stands in the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from rlseq.data.groups import check_groups, group_name, rows_by_group
from rlseq.errors import DataError
from rlseq.evaluation.aggregate import coverage, matrix, quality_metrics
from rlseq.evaluation.measure.checkpoint import ModelStatistics, measure
from rlseq.evaluation.metrics import EXPECTED_ACCURACY, NLL
from rlseq.evaluation.names import TOTAL, Names
from rlseq.evaluation.report.groups import of_rows
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import COMPLETION, REWARD
from rlseq.scoring import RewardSuite
from rlseq.scoring.calls.isolation import kept_random_states
from rlseq.types import Prompt, column_names

STRATEGIES = ("greedy", "sample")
STEPS = 10  # logged steps in a row that `learning_warnings` takes for more than chance
EVALUATIONS = 3
CONSTANT = 20  # logged steps in a row for which a reward that gives one value is said to be constant
ZERO_STD_LIMIT = 0.8
CLIPPED_LIMIT = 0.9


class ValidationEvaluator:
    """Measures a model on fixed validation rows: `evaluator(model) -> {"greedy/wer": 0.32, ...}`.

    Keys (a value that nothing was measured of is NaN):

    * where the rows have references: `nll_per_token` (nats, by teacher forcing) and `expected_accuracy` (mean over rows
      of the summed probability of the distinct references);
    * under each strategy S of `greedy` and `sample` (ancestral): `S/reward`, the mean total of the optimised rewards;
      `S/NAME`, each reward's mean, optimised or only measured; `S/METRIC`, each corpus metric, such as `per` and
      `wer`; `S/length` (tokens), `S/truncated` (share cut at the limit), `S/logprob` (nats, of a completion),
      `S/repetition` (share of repeated 4-grams), with references `S/exact_match` and `S/length_ratio`, and with
      `think_end` the metrics of thoughts (docs/thoughts.md). As in a contrast, a reward or corpus metric whose name
      another number has is `S/reward/NAME` or `S/corpus/NAME`;
    * `S/NAME/failed`, the share of completions a reward failed on, only where it did;
    * `S/METRIC/present`, the share of completions whose details a corpus metric is of, only where some lack them.

    Twice on the same weights gives the same numbers. The state of torch's, NumPy's and Python's random generators
    and the model's train or eval mode are as before afterwards.

    Args:
        prompts: the validation rows; `references` among their columns give the likelihood part.
        tokenizer: the model's.
        suite: the optimised rewards.
        eval_suite: rewards that are only measured. One that is also optimised is measured once; another of the same
            name gets a number (`NAME-2`).
        max_new_tokens: completions are cut after this many tokens.
        stop_strings: texts that end a completion; None: none.
        think_end: the text that ends a thought in a completion; None: completions have none.
        group_column: the column by whose values every number is given too, as `group/VALUE/KEY`; None: none.
        seed: of the sampling. The rng streams are fixed, so a row always meets the same noise.
        samples_per_row: completions per row under `sample`.
        eval_batch_size: rows decoded together; changes memory and time only.

    Attributes:
        metrics: by key, whether higher is better (None: neither). Every call returns these keys.
        eval_rewards: names of the rewards that are only measured, as they appear in the keys.
        best: the key to choose a checkpoint by, if nobody names one: the first reward of `eval_suite`, else of
            `suite`, under greedy decoding, or without rewards the expected accuracy; higher is better.

    Raises:
        RlseqError: no prompts, or a reward asks for a column that is not there.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        suite: RewardSuite,
        eval_suite: RewardSuite | None = None,
        *,
        max_new_tokens: int,
        stop_strings: Sequence[str] | None = None,
        think_end: str | None = None,
        group_column: str | None = None,
        seed: int = 0,
        samples_per_row: int = 1,
        eval_batch_size: int = 256,
    ):
        if not prompts:
            raise DataError("evaluation during training was given no validation rows")
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.settings = ContrastSettings(
            strategies=STRATEGIES,
            samples_per_row=samples_per_row,
            max_new_tokens=max_new_tokens,
            stop_strings=tuple(stop_strings or ()),
            think_end=think_end,
            seed=seed,
            eval_batch_size=eval_batch_size,
        )
        together, names = measured_together(suite, eval_suite)
        self.suite = together.with_think_end(think_end)
        self.suite.check_columns(column_names(self.prompts))
        self.names = Names.of(self.suite)
        series = self.names.rewards
        self.eval_rewards = tuple(series[name] for name in names if name not in suite.names)
        references = any(prompt.columns.get("references") for prompt in self.prompts)
        self.best = EXPECTED_ACCURACY.name if references else f"greedy/{TOTAL}"
        if first := [*names, *suite.names][:1]:
            self.best = f"greedy/{series[first[0]]}"
        self._likelihood = {metric.name: metric for metric in (NLL, EXPECTED_ACCURACY)} if references else {}
        thinks = think_end is not None
        quality = quality_metrics(self.suite, with_references=references, with_thoughts=thinks)
        self._quality = {name: m for name, m in quality.items() if not m.sampled}  # expected_accuracy says it already
        self.metrics: dict[str, bool | None] = {name: m.higher_is_better for name, m in self._likelihood.items()}
        for strategy in STRATEGIES:
            self.metrics[f"{strategy}/{TOTAL}"] = True
            self.metrics |= {f"{strategy}/{name}": m.higher_is_better for name, m in self._quality.items()}
        self._groups: list[tuple[str, list[int]]] = []
        if group_column is not None:
            check_groups(self.prompts, group_column, "the validation rows")
            self._groups = [(group_name(value), places) for value, places in rows_by_group(self.prompts, group_column)]
        every = dict(self.metrics)
        for group, _ in self._groups:
            self.metrics |= {f"group/{group}/{name}": better for name, better in every.items()}

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """Measure the model.

        Under several processes every one of them calls this, each measures its share of the rows with its own model
        (whole and unwrapped: they decode different numbers of tokens), and all get the same numbers.

        Args:
            model: the causal model, on this process's device.

        Raises:
            RewardError: a reward failed whose `on_error` is "raise", in every process. Under "abstain" and "floor"
                failures never end it, however many: they are counted in `S/NAME/failed`.
        """
        device = next(model.parameters()).device
        with kept_random_states([] if device.type == "cpu" else [device], device.type):
            found = measure(model, self.prompts, self.tokenizer, self.suite, self.settings)
        values = self._values(found)
        for group, places in self._groups:
            keys = {self.prompts[place].key for place in places}
            mine = dataclasses.replace(of_rows(found, places), samples=[s for s in found.samples if s["key"] in keys])
            values |= {f"group/{group}/{name}": value for name, value in self._values(mine).items()}
        return values

    def _values(self, found: ModelStatistics) -> dict[str, float]:
        values = {name: m.aggregate(matrix(found.likelihood, m)) for name, m in self._likelihood.items()}
        for strategy, rows in found.strategies.items():
            totals = [s["total"] for s in found.samples if s["strategy"] == strategy and s["total"] is not None]
            values[f"{strategy}/{TOTAL}"] = sum(totals) / len(totals) if totals else math.nan
            for name, metric in self._quality.items():
                values[f"{strategy}/{name}"] = metric.aggregate(matrix(rows, metric))
                if metric.kind == "corpus" and (part := coverage(metric, rows)):
                    values[f"{strategy}/{name}/present"] = part["completions"] / part["of"]
            for reward, name in self.names.rewards.items():
                failed = sum(row[REWARD("failed", reward)] for row in rows)
                if failed:
                    values[f"{strategy}/{name}/failed"] = failed / sum(row[COMPLETION("samples")] for row in rows)
        return values


def learning_warnings(history: Iterable[Mapping[str, Any]], eval_rewards: Iterable[str] = ()) -> list[str]:
    """What the log says is in the way of learning, each with its cause and what to try.

    Args:
        history: what was logged, in order (`trainer.state.log_history`, or the records of metrics.jsonl). Evaluations
            are records with an evaluator's keys, under `eval_` or bare.
        eval_rewards: `ValidationEvaluator.eval_rewards`.

    Returns:
        Texts that stay the same while their cause does, so that a caller can say each once. What one batch shows by
        itself comes after that batch, the rest after `STEPS` or `CONSTANT` logged steps, or `EVALUATIONS` evaluations.
    """
    history = list(history)
    warnings = [*_batch_warnings(history), *_constant_rewards(history)]
    if _always_above(history, "frac_reward_zero_std", ZERO_STD_LIMIT):
        warnings.append(
            f"In more than {ZERO_STD_LIMIT:.0%} of the groups all samples got the same reward, for {STEPS} logged "
            "steps in a row (frac_reward_zero_std): such groups have advantage 0 and teach nothing. The reward is too "
            "coarse, or the prompts are too easy or too hard for this model: try a reward with partial credit, more "
            "samples per prompt (--num_generations), a higher --temperature, or other prompts."
        )
    if _always_above(history, "completions/clipped_ratio", CLIPPED_LIMIT):
        warnings.append(
            f"More than {CLIPPED_LIMIT:.0%} of the completions were cut at the length limit, for {STEPS} logged steps "
            "in a row (completions/clipped_ratio): the model does not end its texts, so rewards judge fragments. Raise "
            "--max_completion_length, check that training data and tokenizer end a text with a stop token, or teach "
            "the model to stop by teacher forcing first."
        )
    for name in eval_rewards:
        for strategy in reversed(STRATEGIES):
            rises = _moves(history, f"{strategy}/{TOTAL}", 1)
            if rises and _moves(history, f"{strategy}/{name}", -1):
                warnings.append(
                    f"Over the last {EVALUATIONS} evaluations the optimised reward rose while {name}, which is only "
                    f"measured, fell (under {strategy}): the model may be learning to please the reward instead of "
                    "doing the task. Look at completions that score well (`rlseq show`), mend the reward or add this "
                    "one to it, hold the policy nearer its start (--beta, --learning_rate), or keep an earlier "
                    "checkpoint."
                )
                break
    return warnings


def _batch_warnings(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the first batch of its kind shows by itself, in a line each."""
    warnings = []
    for record in history:
        cut, equal = record.get("completions/clipped_ratio"), record.get("frac_reward_zero_std")
        if cut is not None and equal == 1 and cut > CLIPPED_LIMIT:
            longest = record.get("completions/max_length")
            where = f" at {longest:.0f} tokens" if longest is not None else ""
            warnings.append(
                f"{cut:.0%} of the completions were cut{where} and no group differs in reward, so nothing is learnt: "
                "raise --max_completion_length, or name what ends an answer in --stop_strings."
            )
            break
    if any("reward" in record and not _is_number(record["reward"]) for record in history):
        warnings.append(
            "Every reward abstained on every completion of a batch, which teaches nothing: check the rewards on the "
            "data (`rlseq reward check`), their `where` and the columns that they read."
        )
    return warnings


def _constant_rewards(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rewards that gave all completions one value for `CONSTANT` logged steps."""
    warnings = []
    suffix = "/std"
    logged = [record for record in history if "reward" in record][-CONSTANT:]
    for key in logged[-1] if len(logged) == CONSTANT else ():
        if not (key.startswith("rewards/") and key.endswith(suffix)):
            continue
        name = key.removeprefix("rewards/").removesuffix(suffix)
        means = {record.get(f"rewards/{name}/mean") for record in logged}
        if len(means) == 1 and _is_number(*means) and all(record.get(key) == 0 for record in logged):
            warnings.append(
                f"The reward {name} has been {means.pop():g} on every completion for {CONSTANT} logged steps: it "
                "distinguishes no completion. Look at some with `rlseq show`, and check that it can give other values "
                "(`rlseq reward check`)."
            )
    return warnings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def measured_together(suite: RewardSuite, eval_suite: RewardSuite | None) -> tuple[RewardSuite, list[str]]:
    """One suite of both, which no share of failures stops, and the names that the second's rewards have in it.

    Those that `suite` does not hold already come with weight 0: they leave every total what it was.
    """
    rewards, specs, known, names = list(suite.rewards), list(suite.specs), _decisive(suite), []
    for reward, spec in zip(eval_suite.rewards, eval_suite.specs, strict=True) if eval_suite is not None else ():
        name = reward.name
        if known.get(name) != _decisive(eval_suite)[name]:
            taken, number = {other.name for other in rewards}, 2
            while name in taken:
                name, number = f"{reward.name}-{number}", number + 1
            rewards.append(reward.renamed(name))
            specs.append(spec)
        names.append(name)
    weights = [*suite.weights, *[0.0] * (len(rewards) - len(suite.rewards))]
    together = RewardSuite(rewards, weights, max_error_rate=1.0)
    together.specs = specs
    return together, names


def _decisive(suite: RewardSuite) -> dict[str, dict[str, Any]]:
    """By name, all that decides a reward's values."""
    return {
        name: {key: value for key, value in fingerprint.items() if key != "weight"}
        for name, fingerprint in suite.fingerprint().items()
    }


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The finite values logged under a key, or under it after `eval_`, in order."""
    found = (record.get(key, record.get(f"eval_{key}")) for record in history)
    return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]


def _always_above(history: Sequence[Mapping[str, Any]], key: str, limit: float) -> bool:
    last = [record[key] for record in history if key in record][-STEPS:]
    return len(last) == STEPS and all(value is not None and value > limit for value in last)


def _moves(history: Sequence[Mapping[str, Any]], key: str, direction: int) -> bool:
    """Whether each of the last evaluations is above (direction 1) or below (−1) the one before it."""
    last = _series(history, key)[-EVALUATIONS:]
    return len(last) == EVALUATIONS and all((after - before) * direction > 0 for before, after in pairwise(last))
