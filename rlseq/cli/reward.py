"""`rlseq reward list | check | score | replay | compare`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.cli.score_table import number, print_scores
from rlseq.common.escapes import visible
from rlseq.common.tables import render_table, terminal_width
from rlseq.config.arguments import WeightedArguments
from rlseq.config.commands import (
    CheckArguments,
    CompareArguments,
    LoggedRowsArguments,
    OutputArguments,
    ScoreArguments,
    TrainRowsArguments,
)
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.config.parsing.yaml_file import bundled_paths
from rlseq.errors import ModelError
from rlseq.scoring.check.check import run_checks, spread
from rlseq.scoring.check.probe import Check
from rlseq.scoring.check.rows import prompts_of, think_end_of, with_columns
from rlseq.scoring.load import load_rewards
from rlseq.scoring.outcome import json_ready
from rlseq.scoring.replay import Logged, compare, read_rollouts, score_by_step
from rlseq.scoring.specs.find import bundled_folder, describe_point, entry_points, named_files
from rlseq.scoring.specs.options import parse_spec
from rlseq.scoring.specs.reward_files import describe_file
from rlseq.scoring.table import ScoreTable
from rlseq.types import Prompt

SPEC_HELP = (
    "A name (rlseq reward list), path/to/file.py:function, package.module:function, a model id or path, or "
    "a JSON "
    'mapping {"func": SPEC, "kwargs": {..}, ..}.'
)


CHECK = (CheckArguments, TrainRowsArguments)
SCORE = (ScoreArguments, LoggedRowsArguments)
COMPARE = (CompareArguments, LoggedRowsArguments)
REPLAY = (WeightedArguments, LoggedRowsArguments, OutputArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the five subcommands."""
    commands = parser.add_subparsers(
        dest="reward_command", required=True, metavar="list | check | score | replay | compare"
    )

    listing = _command(commands, "list", "List the rewards that have a name.")
    listing.set_defaults(reward_run=_list)

    check = _command(commands, "check", "Check a reward before a run; exit 1 if something is wrong.")
    check.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    add_flags(check, CHECK)
    check.set_defaults(reward_run=_check)

    score = _command(commands, "score", "Score logged or written completions.")
    score.add_argument("spec", metavar="SPEC", nargs="+", help=SPEC_HELP)
    add_flags(score, SCORE)
    score.set_defaults(reward_run=_score)

    replay = _command(commands, "replay", "Score a run's rollouts with other rewards or weights.")
    replay.add_argument("run_directory", metavar="RUN", type=Path, help="A run directory, or a jsonl of its rollouts.")
    add_flags(replay, REPLAY)
    replay.set_defaults(reward_run=_replay)

    comparison = _command(commands, "compare", "Compare two rewards on the same rollouts.")
    comparison.add_argument("reward_a", metavar="A", help=SPEC_HELP)
    comparison.add_argument("reward_b", metavar="B", help="The other reward, named in the same way.")
    add_flags(comparison, COMPARE)
    comparison.set_defaults(reward_run=_compare)
    usages = {
        check: "SPEC",
        score: "SPEC ... --rollouts PATH",
        replay: "RUN --reward_funcs SPEC ...",
        comparison: "A B --rollouts PATH",
    }
    for command, usage in usages.items():
        command.usage = f"%(prog)s {usage} [--name value ...]"


def _command(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=about, description=about)


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; `check` returns 1 where the reward is wrong, everything else 0."""
    return args.reward_run(args)


def _list(args: argparse.Namespace) -> int:
    root, rows = Path.cwd(), []
    for name, paths in sorted(named_files(root).items()):
        for path in paths:
            about = describe_file(path)
            own = path.parent != bundled_folder().resolve()
            where = f" [{path.relative_to(root.resolve())}]" if own else ""
            rows.append((name, _range(about["range"]), about["extra"] or "-", about["description"] + where))
    for name, points in sorted(entry_points().items()):
        for about in map(describe_point, points):
            rows.append((name, _range(about["range"]), about["extra"] or "-", about["description"]))
    print(render_table(rows, ("name", "range", "extra", "what it gives")))
    return 0


def _range(limits: Any) -> str:
    if not isinstance(limits, tuple):
        return "-"
    return " to ".join(f"{limit:g}" if isinstance(limit, (int, float)) else str(limit) for limit in limits)


def _check(args: argparse.Namespace) -> int:
    model, data = from_flags(CHECK, args)
    given = parse_spec(bundled_paths({"spec": args.spec})["spec"])
    spec = given if isinstance(given, dict) else {"func": given}
    tokenizer = None
    if model.model_name_or_path:
        from rlseq.engine.model.load import load_tokenizer
        from rlseq.engine.thoughts import check_ends

        tokenizer = load_tokenizer(model.model_name_or_path, "--model_name_or_path", padding_side="left")
        check_ends(model.stop_strings, model.think_end, tokenizer)
    prompts = prompts_of(data, tokenizer)
    if model.model_name_or_path:
        _check_context(model, prompts)
    checks = run_checks(spec, prompts, Path.cwd(), think_end=model.think_end)
    if model.model_name_or_path and all(check.passed is not False for check in checks[:3]):
        checks.append(_spread(spec, prompts, tokenizer, model))
    marks = {True: "ok", False: "FAIL", None: "-"}
    print(render_table([(marks[c.passed], c.question, c.finding) for c in checks], ("", "question", "finding")))
    wrong = [check for check in checks if check.passed is False]
    advice: dict[str, list[str]] = {}
    for check in wrong:
        advice.setdefault(check.advice, []).append(check.question)
    for text, questions in advice.items():
        if text:
            print(textwrap.fill(f"* {'; '.join(questions)}: {text}", terminal_width(), subsequent_indent="  "))
    print(f"{len(wrong)} of {len(checks)} checks failed." if wrong else "Nothing is wrong with it.")
    return int(bool(wrong))


def _check_context(args: CheckArguments, prompts: list[Prompt]) -> None:
    """Raise ModelError for a model without positions for prompt and samples, before anything is scored or loaded."""
    from rlseq.doctor.check import FAILED
    from rlseq.doctor.prompts import check_context
    from rlseq.doctor.static import load_configs

    model_config, _ = load_configs(args.model_name_or_path)
    room = check_context(model_config, prompts, args.max_new_tokens, setting="max_new_tokens")
    if room.status == FAILED:
        raise ModelError(f"--model_name_or_path {args.model_name_or_path!r} does not fit the rows. {room.sentence}")


def _spread(spec: Mapping[str, Any], prompts: list[Prompt], tokenizer: Any, args: CheckArguments) -> Check:
    """Sample from the model, and see whether the completions of a prompt differ in reward."""
    from transformers.utils import logging

    import rlseq
    from rlseq.engine.model.load import load_model

    logging.disable_progress_bar()
    model = load_model(args.model_name_or_path, what="--model_name_or_path")
    declared = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    groups = rlseq.sample(
        model,
        prompts,
        num_samples=args.samples_per_row,
        max_new_tokens=args.max_new_tokens,
        strategy=rlseq.engine.strategies.Sample(),
        seed=0,
        stop_ids=sorted(stops),
        stop_strings=args.stop_strings or (),
        tokenizer=tokenizer,
    )
    with load_rewards([{**spec, "on_error": "abstain"}], max_error_rate=1.0, think_end=args.think_end) as suite:
        return spread(suite, prompts, groups)


def _score(args: argparse.Namespace) -> int:
    what, data = from_flags(SCORE, args)
    think_end = think_end_of(what.rollouts, data)
    with load_rewards(bundled_paths({"spec": args.spec})["spec"], think_end=think_end) as suite:
        logged = with_columns(suite, read_rollouts(what.rollouts), what.rollouts, data)
        table = score_by_step(suite, logged)
        print_scores(suite, table)
    _write(what.output, logged, table)
    return 0


def _replay(args: argparse.Namespace) -> int:
    rewards, data, to = from_flags(REPLAY, args)
    think_end = think_end_of(args.run_directory, data)
    with load_rewards(rewards.reward_funcs, weights=rewards.reward_weights, think_end=think_end) as suite:
        logged = with_columns(suite, read_rollouts(args.run_directory), args.run_directory, data)
        table = score_by_step(suite, logged)
        print_scores(suite, table)
    found = compare(logged, table.totals)
    share = f"{found.reversed:.1%} of advantages change sign"
    rows = [
        ("rollouts / groups", f"{found.rollouts:,} / {found.groups:,}"),
        ("rank correlation with what was optimised", f"{number(found.rank_correlation)} over all rollouts"),
        ("", f"{number(found.group_correlation)} within groups ({found.varying:,} in which both vary)"),
        ("advantages", f"{share}; {found.gained:.1%} are no longer 0, {found.lost:.1%} become 0"),
    ]
    print()
    print(render_table(rows, ("replay", "")))
    _write(to.output, logged, table)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rlseq.cli.reward_compare import run_compare  # numpy is for this command alone

    what, data = from_flags(COMPARE, args)
    return run_compare(what, data, [args.reward_a, args.reward_b])


def _write(path: Path | None, logged: Logged, table: ScoreTable) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for record, scored in zip(logged.records, table.scored, strict=True):
            said = {field: getattr(scored, field) for field in ("values", "status", "details", "total")}
            line = json.dumps(json_ready({**record, **said}), ensure_ascii=False, allow_nan=False)
            lines.write(visible(line) + "\n")
