"""A call on a thread of its own while the caller continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def submit(act: Callable[[], Any]) -> Future:
    """Start a call and return its future.

    The thread is a daemon: those of a `ThreadPoolExecutor` keep an interrupted process alive until they end.
    """
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, name="rlseq-submitted", daemon=True).start()
    return future
