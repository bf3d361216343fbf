"""The process of `python_tests`: reads a task from its standard input, limits itself, runs it, reports.

A file of its own, so that nothing but the standard library is imported beside the code under test.
"""

import builtins
import ctypes
import json
import math
import os
import resource
import signal
import sys

# RLIMIT_NPROC does not bind the root user: processes are also refused where Python announces them
_STARTING = (
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.exec",
    "os.system",
    "subprocess.Popen",
)


PR_SET_PDEATHSIG = 1


def _limit(task: dict) -> None:
    seconds, mebibyte = math.ceil(task["seconds"]), 2**20
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, task["memory"] * mebibyte),
        (resource.RLIMIT_FSIZE, task["file_size"] * mebibyte),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(what, (value, value))

    def refuse(event: str, _arguments: tuple) -> None:
        if event in _STARTING:
            raise PermissionError(f"python_tests: {event} is not allowed")

    sys.addaudithook(refuse)


def main(descriptor: int) -> None:
    if sys.platform == "linux":  # a reward with a timeout may be killed while it waits for this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = json.load(sys.stdin)
    write, leave = os.write, os._exit  # kept from the code's reach, should it replace them by mistake
    _limit(task)
    namespace = {"__name__": "__main__", "__builtins__": builtins}
    passed, ended = 0, "finished"
    try:
        exec(compile(task["code"], "<completion>", "exec"), namespace)
    except BaseException as error:
        ended = f"{type(error).__name__} in the code: {error}"
    else:
        for test in task["tests"]:
            try:
                exec(compile(test, "<test>", "exec"), namespace)
                passed += 1
            except BaseException as error:
                ended = f"{type(error).__name__} in a test: {error}"
    line = f"{task['nonce']} {passed} {ended}"[:4000]
    write(descriptor, line.encode("utf-8", errors="replace"))
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
