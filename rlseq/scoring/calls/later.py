"""Something done on a thread of its own while the caller continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Later:
    """Starts to do something, and gives its result when asked.

    The thread is a daemon: it does not keep an interrupted process alive, as those of `concurrent.futures` do.
    """

    def __init__(self, act: Callable[[], Any]):
        self._act = act
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rlseq-later", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._act()
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def wait(self) -> None:
        """Wait until it is done, or has failed."""
        self._thread.join()

    def result(self) -> Any:
        """Wait for the result; what was raised is raised here."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result
