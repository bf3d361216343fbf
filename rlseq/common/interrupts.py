"""Exit on Ctrl-C while a command imports libraries, which takes seconds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


@contextmanager
def exit_on_sigint() -> Iterator[None]:
    """Exit with 130 on Ctrl-C, silently: a `KeyboardInterrupt` during its import makes torch's C++ code abort.

    Only for imports, when nothing needs cleaning up yet. A handler that the caller has set stays in place.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
