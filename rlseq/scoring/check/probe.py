"""Shared by the checks of `rlseq reward check`: their result, and the scores of completions that no model sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlseq.scoring.suite import RewardSuite
from rlseq.scoring.table import ScoreTable
from rlseq.types import Prompt, Rollout, columns_of


@dataclass(frozen=True)
class Check:
    """The answer to one question: `passed` is None if it does not apply; `advice` says what to do."""

    question: str
    passed: bool | None
    finding: str
    advice: str = ""


Item = tuple[Prompt, Rollout]
Values = Sequence[float | None]


def make_rollout(prompt: Prompt, text: str, sample: int = 0) -> Rollout:
    """A rollout of a text that no model sampled: token ids stand for its words, and its log-probs are 0."""
    count = len(text.split())
    return Rollout.from_ids(
        prompt.key,
        range(count),
        text,
        sample=sample,
        logprobs=(0.0,) * count,
        chat=not isinstance(prompt.prompt, str),
        strategy="written",
    )


def score_items(suite: RewardSuite, items: Sequence[Item]) -> ScoreTable:
    """Score (prompt, rollout) pairs."""
    return suite.score([rollout for _, rollout in items], columns_of([prompt for prompt, _ in items]))


def reference_of(prompt: Prompt) -> str | None:
    references = prompt.columns.get("references") or []
    return references if isinstance(references, str) else references[0] if references else None


def corrupt(text: str, rng: random.Random) -> str:
    """A text with its digits changed, and about a quarter of its words (at least one) dropped, doubled or swapped."""
    words = [_other_digits(word) for word in text.split()] or ["?"]
    for _ in range(max(1, len(words) // 4)):
        place = rng.randrange(len(words))
        action = rng.choice(("drop", "double", "swap")) if len(words) > 1 else "double"
        if action == "drop":
            del words[place]
        elif action == "double":
            words.insert(place, words[place])
        else:
            words[place - 1], words[place] = words[place], words[place - 1]
    damaged = " ".join(words)
    return damaged if words != text.split() else f"{damaged} {damaged}"


def _other_digits(word: str) -> str:
    return "".join(str((int(c) + 1) % 10) if c in "0123456789" else c for c in word)


def values_of(suite: RewardSuite, table: ScoreTable) -> list[float | None]:
    return table.values[suite.names[0]]


def as_answer(suite: RewardSuite, text: str) -> str:
    """The completion whose answer is this text: behind an empty thought, where the reward reads thoughts or answers."""
    reward = suite.rewards[0]
    return f"{reward.think_end}\n{text}" if reward.reads_thoughts else text


def score_texts(suite: RewardSuite, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    texts = [as_answer(suite, text) for text in texts]
    items = [(prompt, make_rollout(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]
    return values_of(suite, score_items(suite, items))


def mean(values: Values) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else float("nan")
