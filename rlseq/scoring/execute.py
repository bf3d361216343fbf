"""Making the calls of a reward: one after another, or (async) many at a time with retries.

What a reward raises becomes a `Failed`, which is a result like any other; `on_error` decides later.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .outcome import Failed

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Retry:
    """How an async reward is called: at most `concurrency` at a time, each tried `retries` times more after
    an error (waiting 0.5, 1, 2, ... seconds), each attempt given `timeout` seconds (None: any).
    """

    concurrency: int = 16
    retries: int = 2
    timeout: float | None = None
    first_wait: float = 0.5

    @property
    def longest(self) -> float | None:
        """The longest that one call can take, in seconds, if it gives way to the event loop."""
        if self.timeout is None:
            return None
        return self.timeout * (self.retries + 1) + self.first_wait * (2**self.retries - 1)


def is_async(function: Any) -> bool:
    """Whether calling it makes a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def failed(error: BaseException) -> Failed:
    """An exception of a reward, as a result: what it says, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return Failed("error", f"{type(error).__name__}: {error}{where}")


def call_once(function: Callable, arguments: Arguments) -> Any:
    """Call a reward; an exception becomes a `Failed`. A reward that calls sys.exit has failed, too."""
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        return failed(error)


async def call_concurrently(function: Callable, calls: Sequence[Arguments], retry: Retry) -> list[Any]:
    """Call an async reward for all arguments, results in order; an exception becomes a `Failed`."""
    turn = asyncio.Semaphore(retry.concurrency)

    async def attempt(arguments: Arguments) -> Any:
        async with turn:
            for trial in range(retry.retries + 1):
                try:
                    return await asyncio.wait_for(function(**arguments), retry.timeout)
                except TimeoutError as error:
                    timed_out = retry.timeout is not None
                    result = Failed("timeout", f"no answer within {retry.timeout:g} s") if timed_out else failed(error)
                except (Exception, SystemExit) as error:
                    result = failed(error)
                except asyncio.CancelledError as error:  # of something the reward awaits, unless we are meant
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
                    result = failed(error)
                if trial < retry.retries:
                    await asyncio.sleep(retry.first_wait * 2**trial)
            return result

    return list(await asyncio.gather(*map(attempt, calls)))


class InProcess:
    """Calls a reward here, one call after another: the fast path."""

    apart = False

    def __init__(self, function: Callable):
        self.function = function

    def run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        return [call_once(self.function, arguments) for arguments in calls]

    def close(self) -> None:
        """Nothing to end."""


class Concurrent:
    """Calls an async reward on an event loop of its own thread, so that it works inside a running loop, too."""

    apart = True

    def __init__(self, function: Callable, retry: Retry):
        self.function = function
        self.retry = retry

    def run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        future = asyncio.run_coroutine_threadsafe(
            call_concurrently(self.function, calls, self.retry), _background_loop()
        )
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Nothing to end: the loop's thread ends with the process."""


_loop: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="rlseq-rewards", daemon=True).start()
        return _loop
