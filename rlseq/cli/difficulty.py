"""`rlseq difficulty`: a copy of a data set's rows with a column of how hard each is for a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.interrupts import exit_on_sigint
from rlseq.config.arguments import DataArguments
from rlseq.config.commands import DifficultyArguments
from rlseq.config.groups.chat_template import template_options
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.errors import ConfigError, DataError

DESCRIPTION = """Write a copy of a data set's training rows with a column of how often a model answers each right.

With --reward_funcs, K completions per row are sampled; `pass_rate` is the share of those whose reward is at least
--pass_threshold, beside its 95% Wilson interval and the number of samples. Without rewards, `pass_rate` is the exact
chance that a sample is one of the row's references, by teacher forcing: nothing is sampled. Give references that list
all right answers for this.

OUTPUT_DIR then holds the training rows with the column and the evaluation rows as they are, and is a data set:
`--dataset_name OUTPUT_DIR --curriculum 0.1-0.9` in a recipe trains on the rows in that range."""

EPILOG = """Interrupted (Ctrl-C, a kill), the same command resumes after the rows that are measured.

  rlseq difficulty recipes/g2p/data.py --model recipes/g2p/base --max_new_tokens 32 --train_rows 1000
  rlseq difficulty data/ --model MODEL --reward_funcs my_rewards.py:correct --samples_per_row 16 --dtype bfloat16"""

ARGUMENTS = (DifficultyArguments, DataArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq difficulty`."""
    parser.usage = "%(prog)s DATA --model MODEL [--reward_funcs REWARD ...] [--name value ...]"
    add_flags(parser, ARGUMENTS)
    parser.add_argument(
        "dataset_name", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help="The data set: --dataset_name."
    )
    parser.description, parser.epilog = DESCRIPTION, EPILOG


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 on success."""
    with exit_on_sigint():
        arguments, data = from_flags(ARGUMENTS, args)
    validate(arguments, data)
    with exit_on_sigint():
        import torch
        from accelerate import PartialState

        from rlseq.data.lengths import within_length
        from rlseq.evaluation.difficulty import as_lines, measure_rows, write_rows
        from rlseq.evaluation.measure.kept_rows import remove_kept
        from rlseq.evaluation.measure.loading import load_tokenizer
        from rlseq.evaluation.results.folder import claimed
        from rlseq.evaluation.settings import ContrastSettings
        from rlseq.scoring import load_rewards
        from rlseq.training.models import check_model_path

    settings = ContrastSettings.of(arguments, strategies=(sampling(arguments.strategy),))
    check_model_path(arguments.model)
    PartialState(cpu=not torch.accelerator.is_available())
    folder = Path(arguments.output_dir)
    given = template_options(arguments.chat_template_kwargs)
    prompt_options = data.prompt_options() | ({"chat_template_kwargs": given} if given else {})
    rows, others = load_splits(data)
    if data.max_prompt_length is not None:
        tokenizers = [load_tokenizer(arguments.model, arguments.model)]
        limits = data.length_options()
        rows, left_out = within_length(rows, tokenizers, data.train_split, **limits, prompt_options=prompt_options)
        if left_out and PartialState().is_main_process:
            print(visible(f"rlseq: {left_out}"), flush=True)
    name, columns_of = columns_by(arguments)
    check_columns(rows, columns_of([None]), name)
    as_lines(rows)
    files = {folder / f"{data.train_split}.jsonl": rows}
    if others:
        files[folder / f"{data.eval_split}.jsonl"] = others
    check_absent(files)
    options = {"settings": settings, "prompt_options": prompt_options, "folder": folder}
    with claimed(folder):
        if arguments.reward_funcs:
            judged = {"weights": arguments.reward_weights, "think_end": arguments.think_end}
            with load_rewards(arguments.reward_funcs, max_error_rate=arguments.max_error_rate, **judged) as suite:
                measured = measure_rows(arguments.model, rows, suite, **options)
        else:
            measured = measure_rows(arguments.model, rows, None, **options)
        if PartialState().is_main_process:
            found = [columns_of(values) for values in measured]
            files[folder / f"{data.train_split}.jsonl"] = [
                {**row, **mine} for row, mine in zip(rows, found, strict=True)
            ]
            for path, content in files.items():
                write_rows(path, as_lines(content))
            remove_kept(folder)
            said = f"{summary([mine[name] for mine in found], name)}\nwritten: {', '.join(map(str, files))}"
            print(visible(said), flush=True)
    return 0


def validate(arguments: DifficultyArguments, data: DataArguments) -> None:
    """Refuse settings from which nothing can be measured.

    Raises:
        ConfigError: says what is missing.
    """
    if not data.dataset_name:
        raise ConfigError("no data is named; give it first: rlseq difficulty DATA --model MODEL")
    if not arguments.output_dir.strip():
        raise ConfigError("--output_dir is empty; name a directory for the data set (is a shell variable unset?)")
    if arguments.exact is False and not arguments.reward_funcs:
        raise ConfigError("--exact false needs --reward_funcs (`rlseq reward list` shows the bundled ones)")
    if data.train_split == data.eval_split:
        raise ConfigError(f"--train_split and --eval_split are both {data.train_split!r}; expected two splits")


def sampling(spec: str) -> str:
    """The spec of a strategy that samples each token.

    Raises:
        ConfigError: it is of another kind.
    """
    from rlseq.engine.strategies import Sample, parse_strategy

    strategy = parse_strategy(spec)
    if not isinstance(strategy, Sample):
        raise ConfigError(f"--strategy is {spec!r}; expected sample, or sample with settings: sample:temperature=0.7")
    return strategy.spec


def load_splits(data: DataArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to measure, and those of the evaluation split, which there may be none of.

    Raises:
        DataError: there are no rows to measure.
    """
    from accelerate import PartialState

    from rlseq.data.rows import load_rows

    rows = load_rows(data.dataset_name, data.train_split, **data.row_options())[: data.train_rows]
    try:
        others = load_rows(data.dataset_name, data.eval_split, **data.row_options())[: data.eval_rows]
    except DataError as error:
        if PartialState().is_main_process:
            print(visible(f"rlseq: no rows to evaluate on are copied: {error}"), flush=True)
        others = []
    return rows, others


def columns_by(arguments: DifficultyArguments) -> tuple[str, Callable[[Sequence[float | None]], Mapping[str, Any]]]:
    """The name of the column, and what turns a row's measurement into its columns."""
    from rlseq.evaluation.difficulty import exact_columns, mean_reward_columns, pass_rate_columns

    name = arguments.column or ("mean_reward" if arguments.mean_reward else "pass_rate")
    if not arguments.reward_funcs:
        return name, partial(exact_columns, column=name)
    if arguments.mean_reward:
        return name, partial(mean_reward_columns, column=name)
    return name, partial(pass_rate_columns, column=name, threshold=arguments.pass_threshold)


def check_columns(rows: Sequence[Mapping[str, Any]], new: Mapping[str, Any], name: str) -> None:
    """Refuse rows that have one of the new columns already.

    Raises:
        ConfigError: names it, and what to do.
    """
    from rlseq.data.prompts import columns_of_rows

    there = [column for column in new if column in columns_of_rows(rows)]
    if there:
        raise ConfigError(f"the data has a column {there[0]!r} already; give --column another name than {name!r}")


def check_absent(files: Mapping[Path, Any]) -> None:
    """Refuse to replace files.

    Raises:
        ConfigError: names the first that is there.
    """
    there = [path for path in files if path.exists()]
    if there:
        raise ConfigError(f"{str(there[0])!r} exists already; give another --output_dir, or move it away")


def summary(values: Sequence[float | None], name: str) -> str:
    """What the column holds, in one line."""
    present = [value for value in values if value is not None]
    none = f"; {len(values) - len(present):,} rows have no value" if len(present) < len(values) else ""
    if not present:
        return f"{name} of {len(values):,} rows: none has a value"
    said = f"{name} of {len(values):,} rows: mean {sum(present) / len(present):.3f}"
    if name == "mean_reward":
        return f"{said}, from {min(present):.3g} to {max(present):.3g}{none}"
    between = sum(0.1 <= value <= 0.9 for value in present)
    low, high = sum(value < 0.1 for value in present), sum(value > 0.9 for value in present)
    return f"{said}; {low:,} below 0.1, {between:,} from 0.1 to 0.9, {high:,} above 0.9{none}"
