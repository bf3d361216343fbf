"""`rlseq audit RUN`: did the optimised reward of a run rise while rewards that it was not trained on fell?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rlseq.common.escapes import visible
from rlseq.common.tables import render_table
from rlseq.config.commands import AuditArguments, LoggedRowsArguments
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.config.parsing.yaml_file import bundled_paths

ARGUMENTS = (AuditArguments, LoggedRowsArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq audit`."""
    parser.usage = "%(prog)s RUN [--held_out_rewards SPEC ...] [--name value ...]"
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="A run directory.")
    add_flags(parser, ARGUMENTS)


def run(args: argparse.Namespace) -> int:
    """Print the audit; returns 1 on an alarm, else 0.

    Raises:
        RlseqError: there are no rollouts or too few steps, or a held-out reward cannot score them.
    """
    what, data = from_flags(ARGUMENTS, args)
    from rlseq.cli.reward_compare import counting_failures
    from rlseq.evaluation.audit.audit import audit, weights_of
    from rlseq.evaluation.results.files import finite_or_null
    from rlseq.scoring.check.rows import think_end_of, with_columns
    from rlseq.scoring.load import load_rewards
    from rlseq.scoring.replay import read_rollouts, score_by_step

    logged = read_rollouts(args.run_directory)
    held_out, failures = {}, []
    if what.held_out_rewards:
        specs = bundled_paths({"spec": list(what.held_out_rewards)})["spec"]
        think_end = think_end_of(args.run_directory, data)
        specs = [counting_failures(spec) for spec in specs]
        with load_rewards(specs, max_error_rate=1.0, think_end=think_end) as suite:
            table = score_by_step(suite, with_columns(suite, logged, args.run_directory, data))
        held_out = {name: table.values[name] for name in table.names}
        for name in table.names:
            for message in list(table.messages[name].values())[:1]:
                failures.append(f"{name} failed on {len(table.messages[name]):,} rollouts. The first: {message}")
    found = audit(logged.records, weights_of(args.run_directory, logged.records), held_out)
    numbers = finite_or_null(found.as_json())
    if what.json:
        print(visible(json.dumps(numbers, ensure_ascii=False, allow_nan=False, indent=1)))
    else:
        _print(numbers, failures)
    return int(bool(found.alarms))


def _print(numbers: dict, failures: list[str]) -> None:
    from rlseq.evaluation.audit.report import conclusion, tables

    print(f"{numbers['rollouts']:,} rollouts of {numbers['prompts']:,} prompts")
    for failure in failures:
        print(visible(f"warning: {failure}"))
    print(visible(f"\n{conclusion(numbers)}"))
    for table in tables(numbers):
        print(visible(f"\n{table.caption}"))
        print(render_table(table.rows, table.header, right=range(1, len(table.header))))
    for name, examples in numbers["examples"].items():
        fell = numbers["changes"][name][0]["p_fall"] <= numbers["level"]
        if not examples or not fell:
            continue
        print(visible(f"\nCompletions of the last third with the most reward and the least {name}:"))
        for example in examples:
            where = f"step {example['step']}, sample {example['sample']}"
            print(visible(f"\nreward {example['reward']:.3f}, {name} {example['held_out']:.3f}  ({where})"))
            for label in ("prompt", "completion"):
                indented = (example[label] or "(empty)").replace("\n", "\n" + " " * 12)
                print(visible(f"{label:<12}{indented}"))
