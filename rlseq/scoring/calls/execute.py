"""Making the calls of a reward: one after another, or (async) many at a time with retries.

What a reward raises becomes a `Failed`, which is a result like any other; `on_error` decides later.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlseq.common.escapes import visible
from rlseq.scoring.calls.copies import as_returned, fresh
from rlseq.scoring.calls.isolation import kept_settings
from rlseq.scoring.outcome import Failed, text_of

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Retry:
    """How an async reward is called: at most `concurrency` at a time, each tried up to `retries` times again after
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
    return Failed("error", visible(f"{type(error).__name__}: {text_of(error)}{where}"))


def call_once(function: Callable, arguments: Arguments) -> Any:
    """Call a reward with copies of its arguments; an exception becomes a `Failed`, and so do sys.exit and the like.

    Raises:
        KeyboardInterrupt: the run is interrupted.
    """
    try:
        return as_returned(function(**fresh(arguments)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return failed(error)


async def call_concurrently(function: Callable, calls: Sequence[Arguments], retry: Retry) -> list[Any]:
    """Call an async reward for all arguments, results in order; an exception becomes a `Failed`."""
    slots = asyncio.Semaphore(retry.concurrency)

    async def attempt(arguments: Arguments) -> Any:
        async with slots:
            for attempts in range(retry.retries + 1):
                result = await _call_in_task(function, arguments, retry.timeout)
                if type(result) is not Failed:
                    return result
                if attempts < retry.retries:
                    await asyncio.sleep(retry.first_wait * 2**attempts)
            return result

    return list(await asyncio.gather(*map(attempt, calls)))


async def _call_in_task(function: Callable, arguments: Arguments, timeout: float | None) -> Any:
    """Call an async reward in a task of its own, so that one that cancels itself or will not be cancelled ends alone.

    No exception leaves that task: KeyboardInterrupt and SystemExit would stop the event loop.
    """

    async def call() -> Any:
        try:
            return as_returned(await function(**fresh(arguments)))
        except BaseException as error:
            return failed(error)

    task = asyncio.ensure_future(call())
    try:
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            return Failed("timeout", f"no answer within {timeout:g} s")
        if task.cancelled():
            return failed(asyncio.CancelledError())
        return task.result()
    finally:
        task.cancel()


class InProcess:
    """Calls a reward here, one call after another: the fast path."""

    in_background = False
    uses_rng = True

    def __init__(self, function: Callable):
        self.function = function

    def run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        with kept_settings():
            return [call_once(self.function, arguments) for arguments in calls]

    def close(self) -> None:
        """Nothing to end."""


class Concurrent:
    """Calls an async reward on an event loop of its own thread, so that it works inside a running loop, too."""

    in_background = True
    uses_rng = True

    def __init__(self, function: Callable, retry: Retry):
        self.function = function
        self.retry = retry

    def run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        with kept_settings():
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
            threading.Thread(target=_run_always, args=(_loop,), name="rlseq-rewards", daemon=True).start()
        return _loop


def _run_always(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop that continues where a reward stops it, or ends one of its own tasks by an interrupt."""
    while not loop.is_closed():
        with contextlib.suppress(BaseException):
            loop.run_forever()
