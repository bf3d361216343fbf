"""The bundled rewards that run something: generated code, a reward model, a judge behind HTTP."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from tiny_rollouts import rollout

from rlseq.scoring import load_rewards
from rlseq.scoring.specs.find import find


def bundled(name):
    return find(name, Path("/nowhere")).function


# python_tests

ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def test_python_tests_gives_the_share_that_passes():
    value, details = bundled("python_tests")(ADD, ["assert add(1, 2) == 3", "assert add(1, 1) == 3"])
    assert value == 0.5
    assert details["passed"] == 1
    assert "AssertionError" in details["ended"]
    assert bundled("python_tests")("def add(a, b):\n  return a + b", "assert add(1, 2) == 3")[0] == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "```python3\ndef f(): return 1\n```",
        "```Python\r\ndef f(): return 1\r\n```",
        "Install it:\n```bash\npip install x\n```\nThen\n```python\ndef f(): return 1\n```\nDone.",
        "1. So:\n   ```py\n   def f():\n       return 1\n   ```",
        "```python\ndef f(): return 1\n```\nIt prints\n```\n1\n```\nor, as JSON,\n```json\n1\n```",
        "Read `x`, ``y`` and ```z```:\n```\ndef f(): return 1\n```",
    ],
)
def test_the_last_block_of_python_else_the_last_block_is_the_code(completion):
    assert bundled("python_tests")(completion, "assert f() == 1")[0] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_code_ends_with_a_worker_that_is_killed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")  # bubblewrap would hide the file that names the process
    code = f"import os, time\nopen({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))\nwhile True: time.sleep(1)"
    spec = {"func": "python_tests", "kwargs": {"seconds": 600}, "timeout": 2, "on_error": "abstain"}
    with load_rewards([spec]) as suite:
        table = suite.score([rollout(code)], {"prompt": ["?"], "tests": [["assert True"]]})
    assert table.status["python_tests"] == ["timeout"]
    process = int((tmp_path / "id").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_code_that_removes_its_folder_for_a_file_is_scored(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")  # under bubblewrap the folder cannot be removed
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os; folder = os.getcwd(); os.chdir('/'); os.rmdir(folder); open(folder, 'w').close()"
    assert bundled("python_tests")(code, "assert os.path.isfile(folder)")[0] == 1.0


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("x = (", "SyntaxError in the code"),
        ("import sys; sys.exit(0)", "SystemExit in the code"),
        ("import os; os._exit(0)", "exited with status 0 before the tests were done"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt in the code"),
        ("x = bytearray(600 * 2**20)", "MemoryError in the code"),
        ("import os; os.fork()", "PermissionError in the code"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError in the code"),
        ("import os; os.system('true')", "PermissionError in the code"),
        ("open('big', 'wb').write(bytes(2 * 2**20))", "OSError in the code"),
        ("input()", "EOFError in the code"),
    ],
)
def test_code_beyond_a_limit_passes_no_test(code, ended):
    value, details = bundled("python_tests")(code, "assert True", memory=512, file_size=1)
    assert value == 0.0
    assert details["ended"].startswith(ended)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "while True: open('f', 'w')"])
def test_endless_code_is_ended(code):
    start = time.monotonic()
    value, details = bundled("python_tests")(code, "assert True", seconds=1)
    assert value == 0.0
    assert details["ended"] == "timeout" or "SIG" in details["ended"] or "status -" in details["ended"]
    assert time.monotonic() - start < 5


def test_cpu_time_is_limited_apart_from_wall_clock_time():
    # the limit is read inside the process: seconds, rounded up
    code = "import resource; cpu = resource.getrlimit(resource.RLIMIT_CPU)[0]"
    assert bundled("python_tests")(code, "assert cpu == 3", seconds=2.5)[0] == 1.0


def test_code_runs_in_a_folder_of_its_own_without_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    monkeypatch.chdir(tmp_path)
    code = (
        "import os\nopen('left.txt', 'w').write('x')\nhere = os.getcwd()\nseen = 'SECRET_OF_THE_TRAINER' in os.environ"
    )
    tests = ["assert not seen", f"assert here != {str(tmp_path)!r}", "assert os.listdir() == ['left.txt']"]
    assert bundled("python_tests")(code, tests)[0] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_code_that_prints_a_million_lines_does_not_block():
    assert bundled("python_tests")("for i in range(200_000): print(i)", "assert i == 199_999")[0] == 1.0


# reward_model
