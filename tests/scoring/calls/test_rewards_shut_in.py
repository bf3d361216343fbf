"""python_tests: what code that means ill gets. The kernel's refusals are Linux's, on x86-64 and ARM64."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlseq.scoring.specs.find import find

FORGED = """
import json, os, sys
frame = sys._getframe(1)
while frame.f_code.co_name != "main":
    frame = frame.f_back
{when}
    v = frame.f_locals
    os.write(v["descriptor"], json.dumps(dict({report}, nonce=v["task"]["nonce"])).encode())
    os._exit(0)
"""
SHUT_IN = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="the kernel's filter is Linux's"
)


@pytest.fixture(autouse=True, params=["with bubblewrap", "without"])
def bubblewrap(request, monkeypatch):
    """Whether `bwrap` is found; where it is, it must work here."""
    if request.param == "without":
        monkeypatch.setenv("PATH", "/nowhere")
        return False
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap (bwrap) is not installed")
    shown = [word for path in ("/usr", "/bin", "/lib", "/lib64") for word in ("--ro-bind-try", path, path)]
    if subprocess.run(["bwrap", "--unshare-all", *shown, "/usr/bin/true"], capture_output=True).returncode:
        pytest.skip("bubblewrap gets no namespaces in this container")
    return True


def python_tests(code, tests=("assert f(2) == 4", "assert f(3) == 9")):
    return find("python_tests", Path("/nowhere")).function(code, list(tests), seconds=5)


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"ended": "finished"},
        {"ended": "finished", "results": []},
        {"ended": "finished", "results": 2},
        {"ended": "finished", "results": [None, None]},
        {"ended": "finished", "results": ['"passed"'] * 2},
        {"ended": "finished", "results": ['"passed"'] * 1000},
        {"ended": "finished", "results": ['{"value": {"list": 1}}'] * 2},
        {"ended": "x", "results": ['{"value": 4}', '{"value": 9}', '{"value": 9}']},
    ],
)
@pytest.mark.parametrize("when", ["if True:", "def f(x):"])
def test_a_report_that_cannot_be_true_counts_against_the_completion(report, when):
    value, details = python_tests(FORGED.format(when=when, report=report))
    assert (value, details["passed"]) == (0.0, 0)


@pytest.mark.parametrize("base", ["object", "int", "list", "dict"])
def test_an_object_that_is_equal_to_everything_passes_no_test_of_a_value(base):
    code = f"class E({base}):\n    __eq__ = lambda *_: True\n    __hash__ = {base}.__hash__\ndef f(x): return E()"
    assert python_tests(code)[0] == 0.0
    assert python_tests(code, ["assert 4 == f(2)", "assert [1] == f(2)", "assert f(2) == {1: 2}"])[0] == 0.0


VALUES = {
    "7": "7",
    "-7": "-7",
    "True": "1",
    "0.1 + 0.2": "0.30000000000000004",
    "float('inf')": "1e999",
    "'\\ud800é'": "'\\ud800é'",
    "b'\\x00'": "b'\\x00'",
    "None": "None",
    "[1, (2, {'a': {3}})]": "[1, (2, {'a': {3}})]",
    "{frozenset({1}), (2, 3)}": "{(2, 3)} ",
    "__import__('collections').Counter('aab')": "{'b': 1, 'a': 2}",
    "__import__('collections').namedtuple('P', 'x y')(1, 2)": "(1, 2)",
    "__import__('numpy').int64(7)": "7",
    "__import__('fractions').Fraction(1, 2)": "0.5",
    "__import__('decimal').Decimal(4)": "4",
    "{'a': 1}.keys()": "{'a'}",
    "list(range(20000))": repr(list(range(20000))),
}


@pytest.mark.parametrize("value", VALUES)
def test_values_are_compared_as_python_compares_them(value):
    expected = VALUES[value]
    equal = eval(value) == eval(expected)
    code = f"def f(x): return {value}"
    assert python_tests(code, [f"assert f(0) == {expected}", f"assert {expected} == f(0), 'why'"])[0] == float(equal)
    assert python_tests(code, ["assert f(0) == [1, [2, {'a': {3}}]]", "assert f(0) == '7'"])[0] == 0.0


def test_a_value_that_is_too_long_to_be_told_fails_its_test_alone():
    code = "def f(x): return [0] * x"
    value, details = python_tests(code, ["assert f(10**6) == 1", "assert f(2) == [0, 0]"])
    assert value == 0.5 and "too long" in details["ended"]


@pytest.mark.parametrize("builtin", ["exec", "compile"])
def test_code_that_replaces_what_runs_the_tests_passes_none(builtin):
    assert python_tests(f"import builtins\nbuiltins.{builtin} = lambda *a, **k: None")[0] == 0.0


@SHUT_IN
@pytest.mark.parametrize(
    "code",
    [
        'import ctypes\nassert ctypes.CDLL(None).system(b"true") == 0',
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
        "import socket\nsocket.socket()",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.setsid()",
    ],
)
def test_the_kernel_refuses_processes_sockets_and_signals_to_others(code):
    value, details = python_tests(code + "\ndef f(x): return x * x")
    assert value == 0.0
    assert "in the code" in details["ended"]


@SHUT_IN
def test_no_process_is_left_behind_by_a_c_library(tmp_path):
    mark = tmp_path / "mark"
    code = (
        f"import ctypes\nctypes.CDLL(None).system(b\"setsid sh -c 'sleep 1; touch {mark}' &\")\ndef f(x): return x * x"
    )
    assert python_tests(code)[0] == 1.0
    time.sleep(1.5)
    assert not mark.exists()


@SHUT_IN
def test_files_are_hidden_and_kept_by_bubblewrap_alone(bubblewrap, tmp_path):
    (tmp_path / "secret").write_text("mine")
    code = f"""
import os
names = os.listdir("{Path(__file__).parents[3]}") if os.path.exists("{Path(__file__).parents[3]}") else []
def f(x):
    seen = os.path.exists("{tmp_path}/secret") or "docs" in names
    return x * x if not seen else None
"""
    assert python_tests(code)[0] == float(bubblewrap)
    with open(tmp_path / "secret") as file:
        assert file.read() == "mine"


def test_bubblewrap_leaves_its_folder_and_tmp_alone_writable(bubblewrap):
    if not bubblewrap:
        pytest.skip("nothing is hidden without it")
    places = [str(Path(json.__file__).with_name("planted.py")), "/planted", "/usr/planted"]
    code = f"""
def refused(path):
    try:
        open(path, "w").close()
    except OSError:
        return True
    return False
def f(x):
    return x * x if all(map(refused, {places})) and not refused("here") and not refused("/tmp/here") else None
"""
    assert python_tests(code)[0] == 1.0
    assert not any(Path(place).exists() for place in places)


@SHUT_IN
def test_the_trainers_environment_cannot_be_read():
    code = f"""
def f(x):
    for number in ({os.getpid()}, {os.getppid()}):
        try:
            open(f"/proc/{{number}}/environ", "rb").read(1)
        except OSError:
            continue
        return None
    return x * x
"""
    if os.geteuid() and python_tests("", ["assert open('/proc/self/uid_map').read().split()[2] == '1'"])[0] != 1.0:
        pytest.skip("neither root nor user namespaces here")
    assert python_tests(code)[0] == 1.0


def test_threads_and_numpy_still_work():
    code = """
import threading, numpy
def f(x):
    found = []
    if __import__("os").geteuid() == 0:  # others may start no thread
        thread = threading.Thread(target=lambda: found.append(x))
        thread.start()
        thread.join()
        assert found == [x]
    return int(numpy.array([x]) @ numpy.array([x]))
"""
    assert python_tests(code)[0] == 1.0
