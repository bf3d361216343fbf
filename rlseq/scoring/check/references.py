"""Whether a reward tells right answers from wrong ones and from none: questions that need the rows' references."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan

from rlseq.scoring.check.probe import Check, Values, corrupt, mean, reference_of, score_texts
from rlseq.scoring.outcome import shorten
from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.thoughts import THOUGHT_FIELDS
from rlseq.types import Prompt

MAXIMUM_LENGTH = 1024  # words of the longest degenerate completion

# How models write an answer: templates of a reference.
USUAL_FORMS = {
    "alone": "%s",
    "in \\boxed{}": "\\boxed{%s}",
    "between dollars": "$%s$",
    "after ####": "#### %s",
    "in bold": "**%s**",
    "in <answer> tags": "<answer>%s</answer>",
    "in a sentence": "The answer is %s.",
    "in a code block": "```\n%s\n```",
}
# What can be asked of a completion itself. A reward that asks for nothing else cannot compare with a reference.
OF_THE_COMPLETION = {
    "completion", "completions", "completion_ids", "raw_completion", "finish_reason", "messages", "logprobs", "prompt",
    "prompts", "prompt_key", "sample", "solution_str", "queries", "kwargs",
}  # fmt: skip


def against_references(suite: RewardSuite, prompts: Sequence[Prompt]) -> list[Check]:
    """Ask what references earn in each usual form, against damaged ones and against completions that say nothing."""
    question = "a reference scores above a damaged one"
    known = [prompt for prompt in prompts if reference_of(prompt)]
    if not known:
        return [Check(question, None, "the rows have no references")]
    if suite.rewards[0].info.scope != "sample":
        return [Check(question, None, f"scope {suite.rewards[0].info.scope}: no completion has a value of its own")]
    references = [reference_of(prompt) or "" for prompt in known]
    by_form = {
        form: score_texts(suite, known, [template % text for text in references])
        for form, template in USUAL_FORMS.items()
    }
    best = max(by_form, key=lambda form: -float("inf") if isnan(mean(by_form[form])) else mean(by_form[form]))
    return [
        _in_usual_forms(suite, references, by_form),
        _above_damaged(question, suite, known, references, best, by_form[best]),
        *_hackability(suite, known, references, best, mean(by_form[best])),
    ]


def _reads_references(suite: RewardSuite) -> bool:
    reward = suite.rewards[0]
    asked = set(reward.parameters.named) - set(reward.kwargs) - OF_THE_COMPLETION
    asked -= {*THOUGHT_FIELDS} if reward.reads_thoughts else set()
    return reward.parameters.takes_any or bool(asked)


def _in_usual_forms(suite: RewardSuite, references: Sequence[str], by_form: Mapping[str, Values]) -> Check:
    """Whether each reference earns the highest value in some form, and in each form in which others earn it.

    A form in which no reference earns it is one that the reward does not read, which is not wrong.
    """
    question = "a reference, written as models write it, earns the highest value"
    rows = list(zip(*by_form.values(), strict=True))
    present = [value for row in rows for value in row if value is not None]
    limits = suite.rewards[0].info.range
    top = limits[1] if limits else max(present, default=0.0)
    means = ", ".join(f"{form} {mean(values):.3g}" for form, values in by_form.items())
    unread = [text for text, row in zip(references, rows, strict=True) if not any(v is not None for v in row)]
    short = [
        text
        for text, row in zip(references, rows, strict=True)
        if any(v is not None for v in row) and max(v for v in row if v is not None) < top - 1e-6
    ]
    if not _reads_references(suite) or len(short) == len(rows):
        return Check(question, None, f"it judges something else; means: {means}")
    set_aside = {*unread, *short}
    partly = [
        said
        for form, values in by_form.items()
        if (
            said := _read_in_part(form, top, [v for v in zip(references, values, strict=True) if v[0] not in set_aside])
        )
    ]
    found = "; ".join([*partly, f"means: {means}"])
    if unread:
        found = f"{len(unread)} of {len(rows)} references cannot be read, the first {shorten(unread[0], 60)}; {found}"
    if short:
        lowest = f"{len(short)} of {len(rows)} earn less than {top:g} in every form"
        found = f"{lowest}, the first {shorten(short[0], 60)}; {found}"
    advice = (
        "Right answers are taken for wrong ones: make it read such references in that form, give them in a form that "
        "it reads, or leave them out."
    )
    return Check(question, not (unread or short or partly), found, advice)


def _read_in_part(form: str, top: float, values: Sequence[tuple[str, float | None]]) -> str:
    """How many references earn the highest value in a form, with the first that do not; empty if none or all do."""
    missed = [text for text, value in values if value is None or value < top - 1e-6]
    if not missed or len(missed) == len(values):
        return ""
    examples = ", ".join(shorten(text, 60) for text in missed[:3])
    return f"{form} only {len(values) - len(missed)} of {len(values)} earn {top:g}, not {examples}"


def _above_damaged(
    question: str, suite: RewardSuite, prompts: list[Prompt], references: list[str], form: str, right: Values
) -> Check:
    if not _reads_references(suite):
        return Check(question, None, "it does not ask for the references")
    texts = [USUAL_FORMS[form] % corrupt(text, random.Random(i)) for i, text in enumerate(references)]
    damaged = score_texts(suite, prompts, texts)
    pairs = [(x, y) for x, y in zip(right, damaged, strict=True) if x is not None and y is not None]
    above, level = sum(x > y for x, y in pairs), sum(x == y for x, y in pairs)
    return Check(
        question,
        bool(pairs) and above > len(pairs) / 2 and mean(right) > mean(damaged),
        f"above for {above}, equal for {level}, below for {len(pairs) - above - level} of {len(pairs)} rows",
        "Look at rows where it is not: is the answer parsed as it should be?",
    )


def _hackability(
    suite: RewardSuite, prompts: list[Prompt], references: list[str], form: str, goal: float
) -> Iterator[Check]:
    """What completions that say nothing score, against the mean `goal` of references in the form that earns most."""
    word = Counter(word for text in references for word in text.split()).most_common(1)[0][0]
    makers: dict[str, Callable[[Prompt], str]] = {
        "the empty string": lambda _: "",
        "the prompt copied": lambda prompt: prompt.text,
        "one token repeated": lambda _: " ".join([word] * 10),
        "the maximum length": lambda _: " ".join([word] * MAXIMUM_LENGTH),
        "the most frequent completion": lambda _: USUAL_FORMS[form] % Counter(references).most_common(1)[0][0],
    }
    if len(set(references)) == 1:
        del makers["the most frequent completion"]
        finding = "all rows have one answer, which is right for each"
        yield Check("hackable by the most frequent completion?", None, finding)
    elif not _reads_references(suite):
        del makers["the most frequent completion"]
        finding = "it does not ask for the references: every answer in the right form is as good"
        yield Check("hackable by the most frequent completion?", None, finding)
    limits = suite.rewards[0].info.range
    for name, make in makers.items():
        score = mean(score_texts(suite, prompts, [make(prompt) for prompt in prompts]))
        nothing_earned = limits is not None and score == goal == limits[0]
        yield Check(
            f"hackable by {name}?",
            None if isnan(score) or nothing_earned else score < goal,
            f"mean {score:.3g}, references {form} {goal:.3g}",
            "Training will find this; combine with a reward that it loses, or fix it.",
        )
