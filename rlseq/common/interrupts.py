"""Ctrl-C while a command imports what it needs, which takes seconds: it ends at once and says nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


@contextmanager
def ending_quietly() -> Iterator[None]:
    """Around imports: exit with 130 at Ctrl-C, without a `KeyboardInterrupt`, which torch's C++ code aborts on.

    Nothing has started that would need cleaning up. A handler that somebody else has set stays in place.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
