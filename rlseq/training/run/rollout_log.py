"""Every rollout on disk: one file per batch of rollouts, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.formats import ROLLOUTS
from rlseq.scoring.outcome import json_ready
from rlseq.scoring.specs.fingerprint import content_hash
from rlseq.training.rollouts import MicroBatch
from rlseq.training.run.faults import writing
from rlseq.types import Prompt, Rollout, ScoredRollout


def rollout_records(
    step: int,
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    advantages: Sequence[float],
    told: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One record a rollout: what was asked, what came back, and what it earned.

    The `completion` is what rewards score. Where tools were called that is the last answer alone. `messages` are there
    where they are more than one answer with that text. All that a reward can ask for is there, as it was, so that a
    replay scores the same rollout; but of the other columns of the data set only a hash, by which a replay that reads
    the data set again sees that they are the same.

    Args:
        step: the first optimizer step that trains on them.
        prompts: the prompt of each rollout.
        scored: the rollouts with their values.
        advantages: of each rollout; of one with an advantage a token, their mean.
        told: columns of each rollout that are not of its prompt (from a rollout_func or an environment). Those that
            JSON cannot hold exactly are named in `unlogged_columns`.
    """
    told = told if told is not None else [{}] * len(scored)
    return [
        {
            "step": step,
            "prompt_key": one.rollout.prompt_key,
            "sample": one.rollout.sample,
            "prompt": prompt.prompt,
            "references": prompt.columns.get("references", []),
            "completion": one.rollout.text,
            "raw_completion": one.rollout.text_with_special_tokens,
            "completion_ids": list(one.rollout.completion_ids),
            "logprobs": list(one.rollout.logprobs),
            **({"messages": json_ready(one.rollout.messages)} if _says_more(one.rollout) else {}),
            "values": dict(one.values),
            "status": dict(one.status),
            "details": json_ready({name: dict(details) for name, details in one.details.items()}),
            "total": one.total,
            "advantage": advantage,
            "logprob": one.rollout.logprob if one.rollout.logprobs else None,
            "length": len(one.rollout.completion_ids),
            "finish_reason": one.rollout.finish_reason,
            **_columns(prompt, more),
        }
        for prompt, one, advantage, more in zip(prompts, scored, advantages, told, strict=True)
    ]


def _columns(prompt: Prompt, told: Mapping[str, Any]) -> dict[str, Any]:
    """Of a rollout's columns: those told of it by value, those of its prompt by hash (references are logged)."""
    exact = {name: value for name, value in told.items() if _is_json(value)}
    hashes = {
        name: content_hash(value)
        for name, value in prompt.columns.items()
        if name not in ("references", "prompt") and name not in told
    }
    parts = {
        "rollout_columns": exact,
        "unlogged_columns": [name for name in told if name not in exact],
        "column_hashes": hashes,
    }
    return {name: part for name, part in parts.items() if part}


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it was."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RuntimeError):  # an object; NaN, or an array's truth
        return False


def _says_more(rollout: Rollout) -> bool:
    """Whether the messages of a rollout are other than the one that its text makes."""
    return rollout.messages is not None and list(rollout.messages) != [{"role": "assistant", "content": rollout.text}]


def calls_tools(messages: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether the turns of a rollout are more than one answer; a call whose result found no room is a turn alone."""
    return any(message.get("role") != "assistant" or message.get("tool_calls") for message in messages or ())


def trained_records(
    batch: MicroBatch, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout], tokenizer: Any
) -> list[dict[str, Any]]:
    """One record a row of a micro-batch of training: the prompt, and of a rollout the sample and its rewards.

    Args:
        batch: its B rows.
        prompts: all prompts, by index.
        scored: rollouts of the round; one that is not among them (after resuming) has no values.
        tokenizer: turns completions into text.
    """
    found = {(one.rollout.prompt_key, tuple(one.rollout.completion_ids)): one for one in scored}
    records = []
    for row, index in enumerate(batch.prompt_index):
        prompt = prompts[index]
        record = {"prompt_key": prompt.key, "prompt": prompt.prompt, "prompt_ids": batch.prompt_ids[row]}
        if batch.completion_ids is not None:
            ids = batch.completion_ids[row]
            one = found.get((prompt.key, ids))
            record |= {
                "completion": tokenizer.decode(ids, skip_special_tokens=True),
                "completion_ids": ids,
                "values": dict(one.values) if one else None,
                "total": one.total if one else None,
                "advantage": batch.advantages[row].tolist(),
            }
        records.append(record)
    return records


class RolloutLog:
    """Writes batches of rollouts to FOLDER/STEP.jsonl, and a step's further batches to STEP-PART.jsonl."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step, self.part = -1, 0  # of the last batch

    def write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of a batch; `step` is the first optimizer step that trains on it."""
        self.step, self.part = step, self.part + 1 if step == self.step else 0
        path = self.folder / (f"{step:06d}-{self.part}.jsonl" if self.part else f"{step:06d}.jsonl")
        partial = path.with_suffix(".partial")
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = [visible(json.dumps(ROLLOUTS.stamp(record), ensure_ascii=False)) + "\n" for record in records]
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(path)
