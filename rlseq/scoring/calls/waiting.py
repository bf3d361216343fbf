"""A line on stderr while a run waits for a reward: a call that never returns looks like a slow step otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

FIRST = 30.0  # seconds until the first line; each further one comes after twice the time
POLL = 1.0

_waits: dict[object, list] = {}  # by call: name, calls, started, seconds until the next line
_watchers: dict[int, threading.Thread] = {}  # by process id: a fork has none of its parent's threads


@contextlib.contextmanager
def still_waiting(name: str, calls: int) -> Iterator[None]:
    """While the body runs, print at growing intervals (from `FIRST` seconds on) that reward `name` has not returned."""
    token = object()
    _waits[token] = [name, calls, time.monotonic(), FIRST]
    if os.getpid() not in _watchers:
        watcher = _watchers[os.getpid()] = threading.Thread(target=_watch, name="rlseq-waiting", daemon=True)
        watcher.start()
    try:
        yield
    finally:
        del _waits[token]


def _watch() -> None:
    while True:
        time.sleep(POLL)
        for wait in list(_waits.values()):
            name, calls, started, until = wait
            if time.monotonic() - started >= until:
                wait[3] = 2 * until
                print(
                    f"rlseq: still waiting for reward {name!r}: {calls} calls, {until:g} s so far. A `timeout` in its "
                    "spec ends calls that never return.",
                    file=sys.stderr,
                    flush=True,
                )
