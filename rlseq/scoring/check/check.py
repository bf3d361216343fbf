"""What `rlseq reward check` asks of a reward before a run: is it sound, and can it be gamed?

Each question is a function from rows to a `Check`. Completions are made from the references where there are
any.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.errors import RewardError
from rlseq.scoring.check.probe import (
    Check,
    Item,
    Values,
    as_answer,
    corrupt,
    make_rollout,
    mean,
    reference_of,
    score_items,
    values_of,
)
from rlseq.scoring.check.references import against_references
from rlseq.scoring.corpus import of_completions
from rlseq.scoring.load import load_rewards
from rlseq.scoring.outcome import FAILURES, shorten
from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.table import ScoreTable
from rlseq.types import Prompt, Rollout, column_names

PATIENCE = 10.0  # seconds that any one strange completion may take
LONG = 100_000  # characters
SLOW = 50.0  # completions per second: below it a step of some hundreds waits for the reward

STRANGE = {
    "the empty string": "",
    "100,000 characters": "x" * LONG,
    "100,000 characters of white space": " \n" * (LONG // 2),
    "a lone surrogate": "a\udc80b",
    "a null character": "a\x00b",
    "emoji and right-to-left text": "👩‍👩‍👧 שלום e\u0301",
    "special tokens": "<s></s><pad><|endoftext|><|im_end|>[/INST]",
    "brackets left open": "((({{{[[[$$\\boxed{\\frac{",
    "an empty box": "\\boxed{}",
    "a mark without an answer": "The answer is\n#### ",
    "empty tags": "<answer></answer>",
    "an empty code block": "```python\n```",
    "an empty object": "{}",
    "bold without an answer": "**Answer:** **",
    "a thought that never ends": "<think>\nFirst, ",
    "a thought without an answer": "<think>\n2 + 2\n</think>\n",
    "a refusal": "I'm sorry, but I can't help with that.",
}


def run_checks(
    spec: Mapping[str, Any], prompts: Sequence[Prompt], search_root: Path, *, think_end: str | None = None
) -> list[Check]:
    """Ask everything that needs no model, the cheap questions first; stop where the next makes no sense.

    Args:
        spec: a mapping of reward options; failures become statuses, whatever its `on_error`.
        prompts: rows to try it on, with their columns.
        search_root, think_end: see `load_rewards`.
    """
    plain = {**spec, "on_error": "abstain", "cache": False}
    try:
        load_rewards([spec], search_root=search_root)  # its own options fit together; nothing is started yet
        suite = load_rewards([plain], search_root=search_root, max_error_rate=1.0, think_end=think_end)
    except RewardError as error:
        return [Check("it loads", False, str(error))]
    with suite:
        reward = suite.rewards[0]
        checks = [
            Check("it loads", True, f"signature: {SIGNATURE_NAMES[reward.signature]}; scope: {reward.info.scope}")
        ]
        try:
            suite.check_columns(column_names(prompts))
        except RewardError as error:
            return [*checks, Check("its columns are there", False, str(error))]
        items = _items(suite, prompts)
        try:
            start = time.perf_counter()
            table = score_items(suite, items)
            seconds = time.perf_counter() - start
            values = values_of(suite, table)
            checks.append(_runs(suite, items, table))
            if not checks[-1].passed:
                return checks
            checks += [_alone(suite, items, values), _order(suite, items, values), _twice(suite, items, values)]
            checks.append(_in_range(suite, values))
            checks += _corpus(suite, table)
        except RewardError as error:  # a wrong count
            return [*checks, Check("it runs on these rows", False, str(error))]
        checks += _in_workers(plain, suite, items, values, search_root)
        checks.append(_speed(suite, items, seconds))
        checks += against_references(suite, prompts)
    return checks


def _corpus(suite: RewardSuite, table: Any) -> list[Check]:
    """Whether the details hold the numbers that corpus metrics need: finite ones, at least where there is a value."""
    checks = []
    for name, metric in suite.corpus.items():
        question = f"details for the corpus metric {name}"
        try:
            _, present = of_completions(name, metric, table.details[metric.reward])
        except RewardError as error:
            checks.append(Check(question, False, str(error)))
            continue
        count, valued = len(table.totals), sum(value is not None for value in table.values[metric.reward])
        missing = f"the others are left out; to count them, return {', '.join(metric.statistics)} for all"
        passed = None if 0 < present < valued else present == valued
        finding = f"of {present} of {count} completions" + (f": {missing}" if present < valued else "")
        checks.append(Check(question, passed, finding))
    return checks


SIGNATURE_NAMES = {
    "single": "one at a time",
    "batch": "TRL's batch",
    "verl": "verl's",
    "openrlhf": "OpenRLHF's",
    "verifiers": "verifiers' (completion as messages)",
}


def _items(suite: RewardSuite, prompts: Sequence[Prompt]) -> list[Item]:
    """Three completions per row: right where a reference is known, damaged, and another row's."""
    answers = [reference_of(prompt) or prompt.text for prompt in prompts]
    texts = [
        (answer, corrupt(answer, random.Random(number)), answers[number - 1]) for number, answer in enumerate(answers)
    ]
    return [
        (prompt, make_rollout(prompt, as_answer(suite, text), sample))
        for prompt, three in zip(prompts, texts, strict=True)
        for sample, text in enumerate(three)
    ]


def _runs(suite: RewardSuite, items: list[Item], table: ScoreTable) -> Check:
    question, counts, values = "it runs on these rows", table.failure_counts[suite.names[0]], values_of(suite, table)
    failed, abstained = sum(counts[kind] for kind in FAILURES), counts["abstained"]
    finding = f"{len(items)} completions: {failed} failed, {abstained} abstained"
    if failed:
        row, message = next(iter(table.messages[suite.names[0]].items()))
        return Check(
            question,
            False,
            f"{finding}; {message}, for {shorten(items[row][1].text, 80)}",
            "Fix the first failure; `on_error: abstain` or `floor` is for rare ones.",
        )
    if abstained == len(items):
        advice = "A reward that abstains on everything trains nothing: are these the rows and the references it is for?"
        return Check(question, False, finding, advice)
    present = {value for value in values if value is not None}
    same = f"; all values are {present.pop():g}" if len(present) == 1 else ""
    return Check(question, True, finding + same)


def _alone(suite: RewardSuite, items: list[Item], values: Values) -> Check:
    question = "together equals one at a time"
    scope = suite.rewards[0].info.scope
    if scope == "batch":
        return Check(question, None, "scope batch: it is always given all")
    if scope == "group":
        keys = list(dict.fromkeys(prompt.key for prompt, _ in items))
        parts = [[item for item in items if item[0].key == key] for key in keys]
        question = "all groups together equal one group at a time"
    else:
        parts = [[item] for item in items]
    alone = [value for part in parts for value in values_of(suite, score_items(suite, part))]
    return _same(question, values, alone, items, "Declare @reward(scope='group' or 'batch') if that is meant.")


def _order(suite: RewardSuite, items: list[Item], values: Values) -> Check:
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    shuffled = values_of(suite, score_items(suite, [items[i] for i in order]))
    back = [shuffled[order.index(i)] for i in range(len(items))]
    advice = "A value should not depend on where its row stands; look for state kept between calls."
    return _same("order does not matter", values, back, items, advice)


def _twice(suite: RewardSuite, items: list[Item], values: Values) -> Check:
    again = values_of(suite, score_items(suite, items))
    advice = "A noisy reward cannot be replayed; seed it from the row, or keep verdicts with cache: true."
    return _same("the same twice", values, again, items, advice)


def _same(question: str, a: Values, b: Values, items: list[Item], advice: str) -> Check:
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not _close(x, y)]
    if not differ:
        return Check(question, True, f"{len(a)} values agree")
    i = differ[0]
    where = shorten(items[i][1].text, 80)
    found = f"{len(differ)} of {len(a)} values differ, the first {a[i]} and {b[i]}, for {where}"
    return Check(question, False, found, advice)


def _close(x: float | None, y: float | None) -> bool:
    """Equal up to float32 rounding, which a model in batches of another size may show."""
    return x == y or (x is not None and y is not None and abs(x - y) <= 1e-4 * max(1.0, abs(x), abs(y)))


def _in_range(suite: RewardSuite, values: Values) -> Check:
    present = [value for value in values if value is not None]
    found = f"{min(present):g} to {max(present):g}" if present else "no values"
    declared = suite.rewards[0].info.range
    if declared is None:
        advice = "@reward(range=(lowest, highest)) lets on_error: floor work."
        return Check("values are in the stated range", None, f"{found}; no range is stated", advice)
    low, high = declared
    return Check(
        "values are in the stated range",
        all(low <= value <= high for value in present),
        f"{found}, stated {low:g} to {high:g}",
        "State the range it really has.",
    )


def _in_workers(
    spec: Mapping[str, Any], suite: RewardSuite, items: list[Item], values: Values, search_root: Path
) -> Iterator[Check]:
    """Load it in a worker process, where a strange completion that hangs it can be survived."""
    question = "it runs in worker processes (timeout, workers)"
    prompt = items[0][0]
    strange = [(prompt, make_rollout(prompt, text, sample)) for sample, text in enumerate(STRANGE.values())]
    try:
        apart: dict[str, Any] = {
            "search_root": search_root,
            "max_error_rate": 1.0,
            "think_end": suite.rewards[0].think_end,
        }
        isolated = load_rewards([{**spec, "timeout": PATIENCE}], **apart)
    except RewardError as error:
        yield Check(question, False, str(error))
        yield _survives(suite, strange)
        return
    with isolated:
        try:
            there = values_of(suite, score_items(isolated, items))
            yield _same(question, values, there, items, "Values from a worker differ: is there state in the module?")
            yield _survives(isolated, strange)
        except RewardError as error:
            yield Check(question, False, str(error), "Leave out timeout and workers, or make it loadable alone.")


def _survives(suite: RewardSuite, strange: list[Item]) -> Check:
    table = score_items(suite, strange)
    names = list(STRANGE)
    messages = table.messages[suite.names[0]]
    failed = "; ".join(f"{names[row]}: {shorten(message, 120)}" for row, message in messages.items())
    return Check(
        "it survives strange completions",
        not messages,
        failed or ", ".join(names),
        "A model writes such things; return a low value or None for them, and set timeout.",
    )


def _speed(suite: RewardSuite, items: list[Item], seconds: float) -> Check:
    calls, start = len(items), time.perf_counter() - seconds
    while time.perf_counter() - start < 0.3:  # the first time alone says little of a fast one
        score_items(suite, items)
        calls += len(items)
    rate = calls / (time.perf_counter() - start)
    finding = f"{rate:,.3g} completions per second" if rate < 100 else f"{rate:,.0f} completions per second"
    if rate < SLOW:
        finding += "; slow: try `workers: n` (CPU), an async function (waiting) or `cache: true` (the same again)"
    return Check("speed", None, finding)


def spread(suite: RewardSuite, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]]) -> Check:
    """Whether a model's own samples differ in reward: a group of equal rewards teaches GRPO nothing."""
    items = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    totals = iter(score_items(suite, items).totals)
    values = [[next(totals) for _ in group] for group in groups]
    present = [[value for value in group if value is not None] for group in values]
    alive = sum(len(set(group)) > 1 for group in present)
    share = alive / max(1, len(groups))
    average = mean([value for group in present for value in group])
    return Check(
        "samples of a prompt differ in reward",
        share >= 0.1,
        f"{alive} of {len(groups)} groups ({share:.0%}); mean reward {average:.3g}",
        "Groups of equal rewards have no advantage: train by SFT first, generate more samples, choose "
        "prompts of middle difficulty, or grade more finely.",
    )
