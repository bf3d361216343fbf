"""Whether generated Python passes tests, run in a fresh process with limits."""

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from functools import lru_cache
from pathlib import Path

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list

_RUNNER = Path(__file__).with_name("_python_tests_runner.py")
_FENCE = re.compile(r"```([\w+#.-]*)[ \t]*\r?\n(.*?)```", re.DOTALL)
_PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)


@reward(range=(0, 1))
def python_tests(
    completion: str,
    tests: list[str] | str,
    seconds: float = 10.0,
    memory: int = 1024,
    file_size: int = 1,
) -> tuple[float, dict]:
    """The share of `tests` (Python statements, as `assert f(2) == 4`) that pass after the completion's code
    has run.

    The code is the last block of the completion fenced as Python, else the last fenced block, else all of it. It
    runs in a fresh process, in a temporary folder that is deleted afterwards, without this process's environment
    variables and without input, with limits on: wall-clock and CPU time (`seconds`), memory (`memory`, MiB of
    address space), the size of a file it writes (`file_size`, MiB), and processes (it may start none).
    Where bubblewrap (`bwrap`) is installed and works, it sees no files but Python's own (read-only), its folder and an
    empty /tmp, and no process or network. On Linux (x86-64, ARM64) the kernel refuses it processes, sockets, signals
    to others and their memory, and, where user namespaces are allowed or the trainer is root, the trainer's
    environment. Its whole process group is killed at the end. Leaving early (sys.exit, os._exit) passes no test. Use
    `workers` to run several at once.

    **This is no sandbox for hostile code.** Without bubblewrap the user's files can be read and written, and tests
    run beside the code that they test: code that sets out to pass them without solving the task can. A report that
    cannot be true passes no test. For code from anyone but your own model, run the whole training in a container.

    Details: passed, tests, and how the process ended ("finished", "timeout", or what went wrong).
    """
    statements = as_list(tests)
    blocks = _FENCE.findall(completion)
    python = [block for language, block in blocks if _PYTHON.fullmatch(language)]
    fenced = python or [block for _, block in blocks]
    code = textwrap.dedent(fenced[-1]) if fenced else completion
    nonce = secrets.token_hex(16)
    limits = {"code": code, "seconds": seconds, "memory": memory, "file_size": file_size}
    with tempfile.TemporaryDirectory(prefix="rlseq-tests-", ignore_cleanup_errors=True) as folder:
        task = _packed(limits) + _packed({"tests": statements, "nonce": nonce})
        report, ended = _run(task, folder, seconds)
    passed, ended = _read_report(report, nonce, len(statements), ended)
    return passed / len(statements), {"passed": passed, "tests": len(statements), "ended": ended}


def _packed(part: dict) -> bytes:
    data = json.dumps(part).encode()
    return len(data).to_bytes(8, "big") + data


def _read_report(report: str, nonce: str, tests: int, ended: str) -> tuple[int, str]:
    """How many tests passed, and how it ended; what the process cannot have said truthfully counts as none."""
    if not report:
        return 0, ended
    found = re.fullmatch(rf"{nonce} (\d{{1,9}}) (.*)", report, re.DOTALL | re.ASCII)
    if found is None or int(found[1]) > tests or (int(found[1]) < tests) == (found[2] == "finished"):
        return 0, "a report that is not the runner's"
    return int(found[1]), found[2].strip()


def _hidden(folder: str) -> list[str]:
    """What stands before a command so that it sees no files but Python's, and its folder; [] where nothing can."""
    bwrap = shutil.which("bwrap")
    return _bubblewrap(bwrap, folder) if bwrap is not None and _works(bwrap) else []


def _bubblewrap(bwrap: str, folder: str) -> list[str]:
    own = [str(path) for path in (sys.prefix, sys.base_prefix, Path(sys.executable).resolve().parents[1])]
    files = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", *own, str(_RUNNER)]
    shown = [word for path in files for at in {path, os.path.realpath(path)} for word in ("--ro-bind-try", path, at)]
    # The root is read-only at last: the folder and /tmp alone can be written.
    apart = ["--unshare-all", "--die-with-parent", "--tmpfs", "/tmp", *shown, "--proc", "/proc", "--dev", "/dev"]
    return [bwrap, *apart, "--bind", folder, folder, "--remount-ro", "/", "--chdir", folder]


@lru_cache(maxsize=4)
def _works(bwrap: str) -> bool:
    """Whether bubblewrap starts Python here: containers and kernels may refuse it namespaces."""
    with tempfile.TemporaryDirectory(prefix="rlseq-tests-") as folder:
        command = [*_bubblewrap(bwrap, folder), sys.executable, "-I", "-c", ""]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    return False


def _run(task: bytes, folder: str, seconds: float) -> tuple[str, str]:
    """Run the task; return what it reported, and how its process ended."""
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [*_hidden(folder), sys.executable, "-I", str(_RUNNER), str(write_end)],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write_end],
            start_new_session=True,
        )
        try:
            process.communicate(task, timeout=seconds)
            ended = f"exited with status {process.returncode} before the tests were done"
        except subprocess.TimeoutExpired:
            ended = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ready = select.select([read_end], [], [], 0)[0]
        return os.read(read_end, 4096).decode(errors="replace") if ready else "", ended
    finally:
        os.close(read_end)
        os.close(write_end)
