"""The command `rlseq`: a table of subcommands, each imported when it is chosen.

A subcommand is a module with two functions: `add_arguments(parser)` declares its flags, or subcommands of its
own, on an `argparse.ArgumentParser`; `run(args)` does the work and returns an exit code, or None for 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlseq import __version__
from rlseq.common.escapes import visible
from rlseq.common.interrupts import INTERRUPTED, exit_on_sigint
from rlseq.config.parsing.flags import OneLineErrors
from rlseq.errors import ConfigError, RlseqError, did_you_mean


class Command(NamedTuple):
    """A subcommand: the module that holds it, and its line in `rlseq --help`."""

    module: str
    help: str


COMMANDS = {
    "evaluate": Command("rlseq.cli.evaluate", "Contrast likelihood and generation of named checkpoints."),
    "reward": Command("rlseq.cli.reward", "List, check and try rewards; score rollouts again."),
    "doctor": Command("rlseq.cli.doctor", "Check a model and its tokenizer for reinforcement learning."),
    "difficulty": Command("rlseq.cli.difficulty", "Add a column to data: how often a model answers each row right."),
    "audit": Command("rlseq.cli.audit", "Was the reward of a run hacked? Exit code 1 on an alarm."),
    "show": Command("rlseq.cli.show", "Show a run's rollouts: prompt, completions, rewards, advantages."),
    "browse": Command("rlseq.cli.browse", "Write a run's rollouts as one HTML page: filter, search, compare."),
}


class Parser(OneLineErrors):
    """Takes no abbreviations; a misspelled flag is answered by the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise ConfigError(f"unknown argument {flag}.{did_you_mean(flag, _flags(self))} See {self.prog} --help.")
        return parsed


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _flags(subparser)


def help_text() -> str:
    """What `rlseq --help` prints."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: rlseq COMMAND [options]\n\n"
        "Fine-tune language models on sampled rollouts, and contrast their likelihood\n"
        "with what they generate.\n"
        "Training starts with `accelerate launch -m rlseq.recipes.grpo` (or sft, ppo); in\n"
        "a checkout `accelerate launch recipes/grpo.py` is the same.\n\n"
        f"{table}\n\nrlseq COMMAND --help describes a command; rlseq --version prints the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(help_text(), flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"rlseq {__version__}")
            return 0
        code = _run(argv[0], argv[1:])
        sys.stdout.flush()
        return code
    except RlseqError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `rlseq show RUN | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(name: str, argv: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise ConfigError(
            f"there is no command {name!r}; there are {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}"
        )
    with exit_on_sigint():
        module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(prog=f"rlseq {name}", description=COMMANDS[name].help)
    module.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:  # one process: no torch to be loaded for the others
        return module.run(arguments) or 0
    from rlseq.common.ranks import raise_on_all_ranks

    with raise_on_all_ranks(exchange=False):
        return module.run(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
