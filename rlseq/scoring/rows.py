"""Rows of a data set for the commands: prompts to try a reward on, and the columns that a log of rollouts lacks."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RewardError, RlseqError
from ..types import ABSENT, Prompt
from .rescore import Logged
from .suite import RewardSuite

DEFAULTS = {
    "split": "train",
    "dataset_config": None,
    "prompt_column": "prompt",
    "reference_column": "references",
    "prompt_template": None,
    "reference_template": None,
    "merge_references": False,
}


def add_data_arguments(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    """Declare the flags that name a data set; those not given are None."""
    add = parser.add_argument
    add(
        "--dataset_name",
        help="Rows: a task module, json/jsonl/csv/parquet files, or a hub id" + (f" ({purpose})." if purpose else "."),
    )
    add("--dataset_config", help="Configuration name of a hub data set.")
    add("--split", help="Its split (default: train).")
    add("--prompt_column", help="Column of the prompt (default: prompt).")
    add("--reference_column", help="Column of the right answer (default: references).")
    add("--prompt_template", help="Jinja template over a row's columns that makes the prompt.")
    add("--reference_template", help="Jinja template over a row's columns that makes the reference.")
    add("--merge_references", action="store_true", default=None, help="Make rows with equal prompts one row.")


def prompts_of(args: argparse.Namespace, tokenizer: Any) -> list[Prompt]:
    """The first `args.rows` rows of the data set that the flags name; made-up ones where they name none."""
    if args.dataset_name is None:
        print("No --dataset_name: tried on made-up rows.\n", file=sys.stderr, flush=True)
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
        answers = [" ".join([*words[i:], *words[:i], str(10 + i)]) for i in range(len(words))]
        texts = [f"Count from {word}, then add ten." for word in words]
        ids = (tokenizer or _WordTokenizer())(text=texts)["input_ids"]
        return [
            Prompt(f"row-{i}", texts[i], tuple(ids[i]), {"references": [answer]})
            for i, answer in enumerate(answers[: args.rows])
        ]
    return _load(args.dataset_name, _given(args), tokenizer, args.rows)


def with_columns(suite: RewardSuite, logged: Logged, path: Path, args: argparse.Namespace) -> Logged:
    """Rollouts with the columns that the rewards ask for: of the log or, where it lacks some, of the data set.

    The data set is the one that the flags name, or else, if a required column is lacking, that of the run whose
    config.yaml lies in `path`. A log keeps of each row the prompt's key, which finds the row again.

    Raises:
        RewardError: the columns are found in neither, or a prompt of the log is not in the data set.
    """
    of_run, name = _config_of(path), args.dataset_name
    if name is None:
        try:
            suite.check_columns(logged.columns)
            return logged
        except RewardError as lacking:
            name = of_run.get("dataset_name")
            if name is None:
                hint = "Or name the data set of these rollouts with --dataset_name, to read it there."
                raise RewardError(f"{lacking} {hint}") from lacking
    options = {key: value for key, value in of_run.items() if key != "dataset_name"} | _given(args)
    try:
        prompts = {prompt.key: prompt for prompt in _load(name, options, None)}
    except RlseqError as error:
        raise RewardError(f"the data set {name}, for columns that the log lacks, cannot be read: {error}") from error
    unknown = [rollout.prompt_key for rollout in logged.rollouts if rollout.prompt_key not in prompts]
    if unknown:
        raise RewardError(
            f"{len(unknown)} of {len(logged.rollouts)} rollouts are on prompts that are not in {name} (split "
            f"{options.get('split', DEFAULTS['split'])}), the first has the key {unknown[0]!r}. Name the data set, "
            "split, columns and templates that made the rollouts with the flags (rlseq reward replay --help)."
        )
    rows = [prompts[rollout.prompt_key].columns for rollout in logged.rollouts]
    more = {
        name: [row.get(name, ABSENT) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
    }
    return dataclasses.replace(logged, columns={**more, **logged.columns})


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}


def _config_of(path: Path) -> dict[str, Any]:
    """How a run read its data: from the config.yaml of its directory, if there is one."""
    import yaml

    config = path / "config.yaml"
    if not config.is_file():
        return {}
    found = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    found = {("split" if name == "train_split" else name): value for name, value in found.items()}
    return {name: found[name] for name in ("dataset_name", *DEFAULTS) if found.get(name) is not None}


def _load(name: str, options: dict[str, Any], tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    import rlseq

    options = {**DEFAULTS, **options}
    config_name, split = options.pop("dataset_config"), options.pop("split")
    return rlseq.load_prompts(
        name, tokenizer or _WordTokenizer(), split=split, limit=limit, config_name=config_name, **options
    )


class _WordTokenizer:
    """Stands in where rows are read for their texts alone: a number for each word."""

    chat_template = "none"

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(range(len(one.split()))) for one in text]}

    def apply_chat_template(self, prompts: Sequence[Any], **_: Any) -> dict[str, list[list[int]]]:
        return self([" ".join(str(message.get("content", "")) for message in prompt) for prompt in prompts])
