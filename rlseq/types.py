"""A rollout as data: the frozen types that travel from the data set to the report.

Axis letters, used in every shape comment and suffix of the code base:

    P prompts    G samples per prompt    B = P·G rollouts    T completion tokens    V vocabulary

Masks are boolean and True marks a token that is trained or counted. Log-probabilities are natural logarithms
(nats), times are seconds, lengths are tokens. Nothing here is padded: padding and packing happen in one place,
when a batch of tensors is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Messages = Sequence[Mapping[str, Any]]


class Absent:
    """Stands in a list of a column's values for a row that lacks the column, which None need not mean."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"  # the one there is, in another process too


ABSENT = Absent()


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, ready to be continued.

    Attributes:
        key: names the row; stable across runs, processes and orders, and distinct even for equal rows.
        prompt: the prompt as the user wrote it: text, or chat messages (`role`, `content`).
        prompt_ids: its token ids, special tokens included.
        columns: every other column of the row; rewards ask for them by name. `references` (a list of
            texts) holds the right answers where there are any.
        template_options: further variables of the chat template; references are rendered with the same ones.
    """

    key: str
    prompt: str | Messages
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as text; for chat data, the contents of its messages, one per line."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content", "")) for message in self.prompt)


def transcript(prompt: str | Messages) -> str:
    """A prompt to be read: text, or a line `role: content` per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def column_names(prompts: Iterable[Prompt]) -> list[str]:
    """The columns that any of these prompts has, `prompt` last: each may lack some."""
    return [*dict.fromkeys(name for prompt in prompts for name in prompt.columns if name != "prompt"), "prompt"]


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns of prompts as lists, `prompt` among them; ABSENT where a prompt lacks one."""
    columns = {name: [prompt.columns.get(name, ABSENT) for prompt in prompts] for name in column_names(prompts)[:-1]}
    return columns | {"prompt": [prompt.prompt for prompt in prompts]}


@dataclass(frozen=True)
class Rollout:
    """One completion of a model, never changed afterwards.

    Attributes:
        prompt_key: `Prompt.key` of the prompt it continues.
        sample: which of the prompt's G samples it is, 0..G-1.
        completion_ids: the T sampled token ids, the stop token included when there is one.
        loss_mask: T booleans; False marks tokens the model did not choose (tool output, forced prefix).
        logprobs: T log-probs (nats) of the tokens under the distribution they were sampled from: temperature and
            truncation applied. For strategies that search rather than sample (greedy, beam), under the model's
            unwarped distribution. Empty where they are unknown.
        text: the completion decoded without special tokens, up to the stop string if one ended it.
        text_with_special_tokens: the completion decoded with them.
        messages: for chat data, the messages the completion adds; None for text.
        finish_reason: "stop" (ended by a stop token or a stop string) or "length" (cut at the limit).
        strategy: the spec of the decoding strategy that produced it.
    """

    prompt_key: str
    sample: int
    completion_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    text: str
    text_with_special_tokens: str
    messages: Messages | None
    finish_reason: str
    strategy: str

    @classmethod
    def from_ids(
        cls,
        prompt_key: str,
        completion_ids: Iterable[int],
        text: str,
        *,
        sample: int = 0,
        loss_mask: Iterable[bool] | None = None,
        logprobs: Iterable[float] = (),
        text_with_special_tokens: str | None = None,
        messages: Messages | None = None,
        chat: bool = False,
        finish_reason: str = "stop",
        strategy: str = "",
    ) -> Rollout:
        """Make a rollout of T token ids and their text; what is not given follows from them.

        Args:
            prompt_key, completion_ids, text, sample, finish_reason, strategy: as the attributes.
            loss_mask: T booleans; None: every token is the model's own.
            logprobs: T numbers; empty where they are unknown.
            text_with_special_tokens: None: as `text`.
            messages: what the completion adds to a conversation; None with `chat`: `text`, said by the assistant.
            chat: whether the prompt is a list of messages.

        Raises:
            ValueError: `loss_mask` or `logprobs` has another length than the ids.
        """
        ids = tuple(completion_ids)
        mask = (True,) * len(ids) if loss_mask is None else tuple(loss_mask)
        known = tuple(logprobs)
        if len(mask) != len(ids) or len(known) not in (0, len(ids)):
            raise ValueError(f"{len(ids)} token ids with {len(mask)} entries of loss_mask and {len(known)} log-probs")
        if messages is None and chat:
            messages = ({"role": "assistant", "content": text},)
        return cls(
            prompt_key=prompt_key,
            sample=sample,
            completion_ids=ids,
            loss_mask=mask,
            logprobs=known,
            text=text,
            text_with_special_tokens=text if text_with_special_tokens is None else text_with_special_tokens,
            messages=messages,
            finish_reason=finish_reason,
            strategy=strategy,
        )

    @property
    def logprob(self) -> float:
        """Log-prob of the whole completion (nats): the sum over its tokens; NaN where they are unknown."""
        return float(sum(self.logprobs)) if self.logprobs or not self.completion_ids else math.nan


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its rewards.

    Attributes:
        rollout: the rollout.
        values: value by reward name; None where the reward abstained or failed.
        status: by reward name: "ok", "abstained", "error", "timeout" or "invalid".
        total: Σ weight·value over the values present, times Σ|weight| over all rewards / Σ|weight| over those
            present (so one that abstains changes no scale); None if every reward abstained.
        details: by reward name, what the reward returned beside its value (logged; corpus aggregates read it).
    """

    rollout: Rollout
    values: Mapping[str, float | None]
    status: Mapping[str, str]
    total: float | None
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
