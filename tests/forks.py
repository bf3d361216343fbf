"""Processes that share this one's imports: real ones, which can be killed or be ranks, without seconds of start-up."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

ROOT = Path(__file__).parent.parent


def fork(act: Callable[[], object], log: Path, **environment: str) -> int:
    """Do something in a child, whose output goes to `log`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", closefd=False) for standard in (1, 2))
        os.environ.update(environment)
        AcceleratorState._reset_state(True)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int, seconds: float = 120) -> int:
    """Return a child's exit code, minus the signal that ended it; after that many seconds it is killed."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def load_recipe(name: str):
    return importlib.import_module(f"rlseq.recipes.{name}")


def recipe(name: str, arguments: Sequence[object]) -> Callable[[], None]:
    """What runs a recipe from the repository's root, in a child."""

    def act() -> None:
        os.chdir(ROOT)
        sys.argv = [f"recipes/{name}.py", *map(str, arguments)]
        load_recipe(name).main()

    return act


def end_of_ranks(number: int, act: Callable[[], object], log: Path, seconds: float = 120) -> list[int]:
    """Do something as N processes of one run (gloo, on the CPU); returns their exit codes."""

    def rank_acts() -> None:
        PartialState(cpu=True)
        act()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_PORT": port}
    common |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    pids = [fork(rank_acts, log, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(number)]
    return [end_of(pid, seconds) for pid in pids]


def run_ranks(number: int, act: Callable[[], object], log: Path) -> None:
    """Do something that succeeds as N processes of one run."""
    assert end_of_ranks(number, act, log) == [0] * number, log.read_text()[-3000:]
