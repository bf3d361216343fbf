"""Rows of a data set for the commands: prompts to check a reward on, and the columns that a log of rollouts lacks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.common.formats import RUN_CONFIG
from rlseq.errors import RewardError, RlseqError
from rlseq.scoring.replay import Logged, check_log
from rlseq.scoring.specs.fingerprint import content_hash
from rlseq.scoring.suite import RewardSuite
from rlseq.types import ABSENT, Prompt

DEFAULTS = {
    "train_split": "train",
    "dataset_config": None,
    "prompt_column": "prompt",
    "reference_column": "references",
    "prompt_template": None,
    "reference_template": None,
    "merge_references": False,
    "system_prompt": None,
}


def prompts_of(args: Any, tokenizer: Any) -> list[Prompt]:
    """The first `args.train_rows` rows of the data set that the settings name; made-up ones if they name none."""
    if args.dataset_name is None:
        print("No --dataset_name: tried on made-up rows.\n", file=sys.stderr, flush=True)
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
        answers = [" ".join([*words[i:], *words[:i], str(10 + i)]) for i in range(len(words))]
        texts = [f"Count from {word}, then add ten." for word in words]
        ids = (tokenizer or _WordTokenizer())(text=texts)["input_ids"]
        return [
            Prompt(f"row-{i}", texts[i], tuple(ids[i]), {"references": [answer]})
            for i, answer in enumerate(answers[: args.train_rows])
        ]
    return _load(args.dataset_name, _given(args) | args.prompt_options(), tokenizer, args.train_rows)


def with_columns(suite: RewardSuite, logged: Logged, path: Path, args: Any) -> Logged:
    """Rollouts with the columns that the rewards ask for: of the log or, where it lacks some, of the data set.

    The data set is the one that the flags name, or else that of the run whose config.yaml is in `path`. A log keeps the
    prompt's key, by which its row is found, and hashes of the row's columns. The columns of the run's own data set must
    have these hashes; for a data set named by flags, a warning says which do not.

    Raises:
        RewardError: the columns are found in neither, or are not what the run scored; or a prompt of the log is not in
            the data set.
    """
    check_log(suite, logged)
    of_run, name, required = _config_of(path), args.dataset_name, True
    if name is None:
        lacking, required = _lacking(suite, logged)
        name = of_run.get("dataset_name")
        if not lacking:
            return logged
        if name is None:
            hint = "name the data set of these rollouts with --dataset_name, to read it there."
            return _without(logged, required, f"{lacking} Or {hint}")
    options = {key: value for key, value in of_run.items() if key != "dataset_name"} | _given(args)
    try:
        prompts = {prompt.key: prompt for prompt in _load(name, options, None)}
    except RlseqError as error:
        why = f"the data set {name}, for columns that the log lacks, cannot be read: {error}"
        return _without(logged, required, why, error)
    unknown = [rollout.prompt_key for rollout in logged.rollouts if rollout.prompt_key not in prompts]
    if unknown:
        raise RewardError(
            f"{len(unknown)} of {len(logged.rollouts)} rollouts are on prompts that are not in {name} (split "
            f"{options.get('train_split', DEFAULTS['train_split'])}), the first has the key {unknown[0]!r}. Name the "
            "data set, split, columns and templates that made the rollouts with the flags (rlseq reward replay --help)."
        )
    rows = [prompts[rollout.prompt_key].columns for rollout in logged.rollouts]
    if edited := _edited(suite, logged, rows):
        if args.dataset_name is None:
            raise RewardError(
                f"{edited} Bring the rows of {name} back, or give --dataset_name to score by what a data set holds now."
            )
        print(f"rlseq: warning: {edited}", file=sys.stderr, flush=True)
    more = {
        name: [row.get(name, ABSENT) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
    }
    return dataclasses.replace(logged, columns={**more, **logged.columns})


def _without(logged: Logged, required: bool, why: str, cause: Exception | None = None) -> Logged:
    """Return the log as it is, after a warning; raise RewardError if a reward requires the columns."""
    if required:
        raise RewardError(why) from cause
    print(f"rlseq: warning: {why}", file=sys.stderr, flush=True)
    return logged


def _lacking(suite: RewardSuite, logged: Logged) -> tuple[str, bool]:
    """A sentence on what a reward reads and the log lacks, and whether the reward has a parameter of that name."""
    try:
        suite.check_columns(logged.columns)
    except RewardError as error:
        return str(error), True
    hashed = dict.fromkeys(name for record in logged.records for name in record.get("column_hashes", {}))
    others = [name for name in hashed if name not in logged.columns]
    for reward in suite.rewards:
        if asked := [name for name in others if name in reward.asked]:
            what = ", ".join(map(repr, asked))
            return f"reward {reward.name!r} reads {what}, which the run had and the log does not hold.", True
    for reward in suite.rewards:
        if reward.parameters.takes_any and others:
            what = ", ".join(map(repr, others))
            return f"reward {reward.name!r} takes any column, and the log does not hold {what}.", False
    return "", False


def _edited(suite: RewardSuite, logged: Logged, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on columns that the rewards read and that changed since the log was written; empty if none did."""
    found: dict[str, list[str]] = {}
    takes_any = any(reward.parameters.takes_any for reward in suite.rewards)
    asked = {name for reward in suite.rewards for name in reward.asked}
    for record, rollout, row in zip(logged.records, logged.rollouts, rows, strict=True):
        for name, digest in record.get("column_hashes", {}).items():
            read = (takes_any or name in asked) and name not in logged.columns
            if read and (name not in row or content_hash(row[name]) != digest):
                found.setdefault(name, []).append(rollout.prompt_key)
    said = [
        f"the column {name!r} of {len(keys)} of {len(rows)} rollouts is not what the run scored (the first is on the "
        f"prompt with the key {keys[0]!r})"
        for name, keys in found.items()
    ]
    return f"{'; '.join(said)}." if said else ""


def _given(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}


def think_end_of(path: Path, args: Any) -> str | None:
    """What ends a thought in logged rollouts: as the flags say, or else as the run's config.yaml does."""
    return args.think_end if args.think_end is not None else _run_config(path).get("think_end")


def _config_of(path: Path) -> dict[str, Any]:
    """How a run read its data, as its config.yaml says."""
    found = _run_config(path)
    return {name: found[name] for name in ("dataset_name", *DEFAULTS) if found.get(name) is not None}


def _run_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml; `path` is the run's directory, its rollouts/ or a file in it. Empty where there is none."""
    import yaml

    folder = path.parent if path.is_file() else path
    config = (folder.parent if folder.resolve().name == "rollouts" else folder) / "config.yaml"
    if not config.is_file():
        return {}
    found = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    RUN_CONFIG.check(found, config)
    return found


def _load(name: str, options: dict[str, Any], tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    import rlseq

    options = {**DEFAULTS, **options, "weighted": True}  # as in training, whose keys of repeated rows these are
    config_name, split = options.pop("dataset_config"), options.pop("train_split")
    return rlseq.load_prompts(
        name, tokenizer or _WordTokenizer(), split=split, limit=limit, config_name=config_name, **options
    )


class _WordTokenizer:
    """A stand-in tokenizer where only texts are read: one number per word."""

    chat_template = "none"

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(range(len(one.split()))) for one in text]}

    def apply_chat_template(self, prompts: Sequence[Any], **_: Any) -> dict[str, list[list[int]]]:
        return self([" ".join(str(message.get("content", "")) for message in prompt) for prompt in prompts])
