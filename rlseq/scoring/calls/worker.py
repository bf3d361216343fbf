"""The process in which a reward with `timeout` or `workers` runs: it imports neither torch nor trl of its
own.

Started as `python -m rlseq.scoring.calls.worker FD` by `workers.WorkerPool`, which kills it when its time is up.
It dies with its parent: idle by the closed connection, busy by the kernel's signal (Linux).
"""

from __future__ import annotations

import asyncio
import ctypes
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from rlseq.scoring.calls.execute import Retry, call_concurrently, call_once, failed
from rlseq.scoring.outcome import Failed, plain
from rlseq.scoring.specs.reward_files import load_address

PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Load the reward that the parent names, then answer its tasks until it hangs up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    address, source, retry = connection.recv()
    try:
        function = load_address(address, source)
    except Exception as error:
        connection.send(failed(error))
        return
    connection.send(None)
    loop = asyncio.new_event_loop() if retry else None
    while True:
        try:
            calls = connection.recv()
        except EOFError:
            return
        connection.send_bytes(_pack(_answers(function, calls, retry, loop)))


def _answers(function: Callable, calls: list[dict[str, Any]], retry: Retry | None, loop: Any) -> list[Any]:
    if retry:
        return loop.run_until_complete(call_concurrently(function, calls, retry))
    return [call_once(function, arguments) for arguments in calls]


def _pack(answers: list[Any]) -> bytes:
    """Pickle the answers, tensors as lists; one that cannot travel becomes a `Failed`."""
    packed = []
    for answer in answers:
        answer = _light(answer)
        try:
            pickle.dumps(answer)
        except Exception as error:
            what = f"returned a {type(answer).__name__} that cannot leave its process: {error}"
            answer = Failed("invalid", what)
        packed.append(answer)
    return pickle.dumps(packed)


def _light(answer: Any) -> Any:
    if isinstance(answer, Mapping):
        return {key: _light(value) for key, value in answer.items()}
    if type(answer) in (list, tuple):
        return type(answer)(map(_light, answer))
    return plain(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
