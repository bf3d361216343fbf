"""Whether generated Python passes tests, run in a fresh process with limits."""

import ast
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import Any

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

    Of a test `assert EXPRESSION == LITERAL` the process is given the expression alone and tells its value, in plain
    types; the comparison is made here, so neither an object that is equal to everything nor a forged report passes it.

    **This is not a sandbox for hostile code.** Without bubblewrap the user's files can be read and written, and any
    other test runs in the process of the code that it tests: code made to pass it without solving the task can. A
    report that cannot be true passes no test. For code from anyone but your own model, run the whole training in a
    container.

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
        asked = [_split(statement) for statement in statements]
        task = _packed(limits) + _packed({"tests": [test for test, _ in asked], "nonce": nonce})
        report, ended = _run(task, folder, seconds)
    passed, ended = _read_report(report, nonce, asked, ended)
    return passed / len(statements), {"passed": passed, "tests": len(statements), "ended": ended}


def _packed(part: dict) -> bytes:
    data = json.dumps(part).encode()
    return len(data).to_bytes(8, "big") + data


def _split(test: str) -> tuple[tuple[str, str], Any]:
    """((kind, code), expected value): of `assert EXPRESSION == LITERAL` the expression and, kept here, the literal."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        (statement,) = ast.parse(test).body
        comparison = getattr(statement, "test", None) if isinstance(statement, ast.Assert) else None
        if isinstance(comparison, ast.Compare) and [type(op) for op in comparison.ops] == [ast.Eq]:
            sides = [comparison.left, comparison.comparators[0]]
            for side, other in (sides[::-1], sides):
                constants = [node.value for node in ast.walk(side) if isinstance(node, ast.Constant)]
                if not any(isinstance(value, complex) or value is ... for value in constants):  # no report holds these
                    with contextlib.suppress(ValueError, TypeError):
                        return ("value", ast.unparse(other)), ast.literal_eval(side)
    return ("statement", test), None


def _read_report(report: str, nonce: str, asked: list, ended: str) -> tuple[int, str]:
    """How many tests passed, and how it ended; what the process cannot have said truthfully counts as none."""
    if not report:
        return 0, ended
    passed = 0
    try:
        told = json.loads(report)
        if told["nonce"] != nonce:
            raise ValueError
        ended, results = str(told["ended"])[:1000], told["results"]
        if not results and " in the code" in ended:
            return 0, ended
        for ((kind, _), expected), result in zip(asked, results, strict=True):
            if result is None:
                continue
            found = json.loads(result)
            if (kind == "value") != isinstance(found, dict) or (kind != "value" and found != "passed"):
                raise ValueError
            if kind != "value" or _value(found["value"]) == expected:
                passed += 1
            else:
                ended = f"AssertionError in a test: it gave {found['value']!r}"[:1000]
        if (passed < len(asked)) == (ended == "finished"):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, "a report that is not the runner's"
    return passed, ended


def _value(told: Any) -> Any:
    """What the runner's `_plain` wrote."""
    if not isinstance(told, dict):
        return told
    ((kind, content),) = told.items()
    if kind in ("float", "bytes"):
        return float.fromhex(content) if kind == "float" else bytes.fromhex(content)
    if kind == "dict":
        return {_value(key): _value(item) for key, item in content}
    return {"tuple": tuple, "list": list, "set": frozenset}[kind](map(_value, content))


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
    with tempfile.TemporaryFile() as report:  # not a pipe, which is full at 64 KiB
        process = subprocess.Popen(
            [*_hidden(folder), sys.executable, "-I", str(_RUNNER), str(report.fileno())],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[report.fileno()],
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
        report.seek(0)
        return report.read().decode(errors="replace"), ended
