"""`rlseq browse RUN [RUN2]`: the rollouts of a training run, or of two side by side, as one HTML file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rlseq.common.escapes import visible
from rlseq.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq browse`."""
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="Run directory.")
    parser.add_argument("other", metavar="RUN2", type=Path, nargs="?", help="A second run, shown beside the first.")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="Write the page to this file (default: RUN/rollouts.html)."
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status 0.

    Raises:
        ConfigError: `--output` is a folder.
        RunDirectoryError: a run or its rollouts do not exist.
    """
    from rlseq.evaluation.browser.page import FILE_NAME, write_page

    output = args.output or args.run_directory / FILE_NAME
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the name of an HTML file")
    began = time.monotonic()
    count = write_page([args.run_directory, *([args.other] if args.other else ())], output)
    size = output.stat().st_size / 1e6
    took = time.monotonic() - began
    print(visible(f"{count:,} rollouts in {output} ({size:.1f} MB, {took:.1f} s); open it in a browser"))
    return 0
