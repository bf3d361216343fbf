"""Worker processes that are killed when their time is up.

A thread cannot be stopped and a signal handler does not run inside a C call, so a reward that may hang runs
in a process of its own, started from `worker.py` (a fork would copy the trainer's memory and
threads, and `multiprocessing`'s spawn would run the recipe again). The caller hands out tasks,
watches the deadlines, and kills a late worker with all processes of its session; a spare takes its place.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rlseq.errors import RewardError
from rlseq.scoring.calls.execute import Arguments, Retry
from rlseq.scoring.outcome import Failed

LOAD_LIMIT = 120.0  # seconds to import a reward's module; not counted against its timeout
GRACE = 1.0  # seconds that an async task gets beyond its own timeouts, before its process is killed


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float | None
    task: _Task | None = None
    loaded: bool = False


@dataclass
class _Task:
    indices: Sequence[int]  # of the calls it makes
    completions: int  # in those calls


class WorkerPool:
    """Runs the calls of one reward in worker processes, results in order.

    Args:
        address: the reward, as `reward_files.load_address` takes it.
        name: its series name, for messages.
        workers: number of processes at work; with a timeout there is a spare one more.
        timeout: the most seconds that a call takes; a late call's process is killed and the call becomes a "timeout".
        retry: for an async reward: a process then makes `retry.concurrency` calls at a time.
        source: of the reward's file when the run began, which replacement workers run, too; None: what the file
            then holds.
    """

    in_background = True
    uses_rng = False

    def __init__(
        self,
        address: str,
        name: str,
        workers: int,
        timeout: float | None,
        retry: Retry | None = None,
        source: bytes | None = None,
    ):
        self.address = address
        self.source = source
        self.name = name
        self.count = workers
        self.timeout = timeout
        self.retry = retry
        self._workers: list[_Worker] = []
        self._turn = threading.Lock()  # one batch of calls at a time, from whichever thread
        self._finalizer = weakref.finalize(self, _end_own, self._workers, os.getpid())

    def run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        """Make all calls; one for several completions (`sizes`) has the timeout of each of them.

        Raises:
            RewardError: when a worker cannot load the reward, or arguments cannot be sent to it.
        """
        with self._turn:
            return self._run(calls, sizes)

    def _run(self, calls: Sequence[Arguments], sizes: Sequence[int]) -> list[Any]:
        size = self.retry.concurrency if self.retry else 1
        waiting = deque(
            _Task(chunk, sum(sizes[i] for i in chunk))
            for start in range(0, len(calls), size)
            if (chunk := range(start, min(start + size, len(calls))))
        )
        results: list[Any] = [None] * len(calls)
        undone = len(calls)
        try:
            for worker in [w for w in self._workers if w.loaded and w.process.poll() is not None]:
                self._kill(worker)
            while undone:
                while len(self._workers) < min(self.count, undone) + self._spares():
                    self._start()
                busy = sum(worker.task is not None for worker in self._workers)
                for worker in self._workers:
                    if worker.loaded and worker.task is None and waiting and busy < self.count:
                        self._send(worker, waiting.popleft(), calls)
                        busy += 1
                undone -= self._collect(waiting, results)
        except BaseException:
            self.close()  # a task half done would answer the next call's question
            raise
        return results

    def close(self) -> None:
        """Kill all workers; the next `run` starts new ones."""
        _end(self._workers)

    def _spares(self) -> int:
        """One process more where some may be killed: it takes over at once, however long loading takes."""
        return int(self.timeout is not None and any(worker.loaded for worker in self._workers))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        with theirs:
            process = _popen(
                [sys.executable, "-P", "-m", "rlseq.scoring.calls.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        self._workers.append(_Worker(process, connection, time.monotonic() + LOAD_LIMIT))
        connection.send((self.address, self.source, self.retry))

    def _send(self, worker: _Worker, task: _Task, calls: Sequence[Arguments]) -> None:
        try:
            message = pickle.dumps([calls[i] for i in task.indices])
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} runs in worker processes, but its arguments cannot be sent there: "
                f"{error}. Keep plain data in the columns, or leave out timeout and workers."
            ) from error
        limit = None if self.timeout is None else self.timeout * task.completions
        if self.retry and self.retry.longest is not None:
            limit = self.retry.longest + GRACE
        worker.task, worker.deadline = task, None if limit is None else time.monotonic() + limit
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; _collect says how
            worker.connection.send_bytes(message)

    def _collect(self, waiting: deque[_Task], results: list[Any]) -> int:
        """Wait for an answer, a death or a deadline; return how many calls are now done."""
        deadlines = [w.deadline for w in self._workers if w.deadline is not None]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = set(wait([w.connection for w in self._workers], patience))
        now, done = time.monotonic(), 0
        for worker in list(self._workers):
            if worker.connection in ready:
                done += self._receive(worker, waiting, results)
            elif worker.deadline is not None and now >= worker.deadline:
                done += self._expire(worker, waiting, results)
        return done

    def _receive(self, worker: _Worker, waiting: deque[_Task], results: list[Any]) -> int:
        task = worker.task
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):  # the latter where it died in the middle of its answer
            code = self._kill(worker)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            if not worker.loaded:
                raise RewardError(f"reward {self.name!r}: its worker process {how} while loading it.") from None
            if self._split(task, waiting):
                return 0
            return self._fail(task, results, "error", f"its worker process {how}")
        if not worker.loaded:
            if isinstance(answer, Failed):
                raise RewardError(f"reward {self.name!r} cannot be loaded in a worker process: {answer.message}")
            worker.loaded, worker.deadline = True, None
            return 0
        worker.task, worker.deadline = None, None
        for i, result in zip(task.indices, answer, strict=True):  # type: ignore[union-attr]  # loaded: it had a task
            results[i] = result
        return len(answer)

    def _expire(self, worker: _Worker, waiting: deque[_Task], results: list[Any]) -> int:
        self._kill(worker)
        if worker.task is None:
            raise RewardError(f"reward {self.name!r} took more than {LOAD_LIMIT:g} s to load in a worker process.")
        if self._split(worker.task, waiting):
            return 0
        limit = "" if self.timeout is None else f" (timeout: {self.timeout:g} s per completion)"
        return self._fail(worker.task, results, "timeout", f"was killed{limit}")

    def _split(self, task: _Task | None, waiting: deque[_Task]) -> bool:
        """Queue the calls of an async reward again, one at a time; return False for a single call.

        One of them blocked the event loop or ended the process, and this shows which.
        """
        if task is None or len(task.indices) == 1:
            return False
        waiting.extend(_Task([i], 1) for i in task.indices)
        return True

    def _fail(self, task: _Task | None, results: list[Any], status: str, message: str) -> int:
        if task is None:
            return 0
        for i in task.indices:
            results[i] = Failed(status, message)
        return len(task.indices)

    def _kill(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return _end([worker])


_starters: dict[int, ThreadPoolExecutor] = {}  # by process id: a fork has none of its parent's threads


def _popen(arguments: Sequence[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen` on a thread that lasts: the kernel ends a worker with the *thread* that started it (prctl(2)),
    and rewards may score on one that ends with the step."""
    starter = _starters.setdefault(os.getpid(), ThreadPoolExecutor(1, "rlseq-workers"))
    return starter.submit(lambda: subprocess.Popen(arguments, **options)).result()


def _end_own(workers: list[_Worker], owner: int) -> None:
    """At the end of a pool: kill its workers, unless this process is a fork of the one that started them."""
    if os.getpid() == owner:
        _end(workers)


def _end(workers: list[_Worker]) -> int:
    """Kill workers with all processes of their sessions, and empty the list; return the last one's exit status."""
    status = 0
    while workers:
        worker = workers.pop()
        early = worker.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        status = worker.process.wait() if early is None else early
        worker.connection.close()
    return status
