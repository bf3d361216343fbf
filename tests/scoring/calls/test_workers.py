"""Worker processes of rewards: timeouts, kills, deaths, order, and what remains."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_rollouts import only, rollout, score

from rlseq import load_rewards
from rlseq.errors import RewardError

SLOW = """
    import asyncio, os, re, sys, threading, time, ctypes
    from rlseq import reward

    def slow(completion):
        if completion == "loop":
            while True: pass
        if completion == "regex":
            re.match(r"(a+)+$", "a" * 64 + "b")
        if completion == "c":
            ctypes.PyDLL(None).sleep(60)  # a C call that keeps the interpreter lock
        if completion == "die":
            os._exit(7)
        if completion == "crash":
            ctypes.string_at(0)
        if completion == "raise":
            raise ValueError("no")
        if completion == "modules":
            return float(bool({"torch", "trl", "transformers"} & sys.modules.keys()))
        if completion == "pid":
            return os.getpid()
        if completion == "nap":
            time.sleep(0.3)
        if completion == "unsendable":
            return threading.Lock()
        return float(len(completion))

    def batch(completions, **kwargs):
        return [float(len(completions)) + slow(completion) for completion in completions]

    @reward(scope="group")
    def group(completions):
        return [float(len(completions)) + slow(completion) for completion in completions]

    async def patient(completion):
        if completion == "await":
            await asyncio.sleep(60)
        await asyncio.sleep(0)
        return slow(completion)

    def with_parent(completion):
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "slow.py"
    path.write_text(textwrap.dedent(SLOW), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def slowness():
    """1 on a machine that starts Python in 50 ms, and more on one that is slower or busy."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)
    return max(1.0, (time.monotonic() - start) / 0.05)


@pytest.mark.parametrize("hang", ["loop", "regex", "c"])
def test_a_call_that_hangs_is_killed_and_the_rest_of_the_batch_is_unharmed(slow, hang):
    texts = ["a", hang, "bbb", "cc"]
    table = score({"func": f"{slow}:slow", "timeout": 0.3, "on_error": "abstain"}, texts)
    assert only(table, "values") == [1.0, None, 3.0, 2.0]
    assert only(table, "status") == ["ok", "timeout", "ok", "ok"]


def test_a_hang_on_1_of_256_with_a_timeout_of_1_second_costs_under_3_seconds(slow, slowness):
    with load_rewards([{"func": f"{slow}:slow", "timeout": 1, "on_error": "abstain"}]) as suite:
        columns = {"prompt": ["q"] * 256}
        start = time.monotonic()
        table = suite.score([rollout("loop" if i == 100 else "ab") for i in range(256)], columns)
        assert time.monotonic() - start < 3 * slowness
    assert table.failure_counts["slow"] == {"abstained": 0, "error": 0, "timeout": 1, "invalid": 0}
    assert sum(value == 2.0 for value in table.values["slow"]) == 255


def test_a_worker_is_back_soon_after_a_kill_also_where_loading_is_slow(tmp_path, slowness):
    path = tmp_path / "heavy.py"
    path.write_text(
        "import time\ntime.sleep(0.8)\ndef f(completion):\n    while completion == 'loop': pass\n    return 1\n"
    )
    with load_rewards([{"func": f"{path}:f", "timeout": 0.2, "on_error": "abstain"}], max_error_rate=1) as suite:
        suite.score([rollout("a")], {"prompt": ["q"]})
        time.sleep(1.0 * slowness)  # the spare loads meanwhile
        start = time.monotonic()
        table = suite.score([rollout("loop"), rollout("a")], {"prompt": ["q"] * 2})
        took = time.monotonic() - start - 0.2
    assert table.values["f"] == [None, 1.0]
    assert took < 0.3 * slowness


def test_a_timeout_under_on_error_raise_ends_the_run(slow):
    with pytest.raises(RewardError, match=r"reward 'slow' did not return in time: .* 0\.3 s per completion"):
        score({"func": f"{slow}:slow", "timeout": 0.3}, ["loop"])


@pytest.mark.parametrize(
    ("text", "message"), [("die", "exited with status 7"), ("crash", "SIGSEGV"), ("raise", "ValueError: no")]
)
def test_a_worker_that_dies_or_raises_is_an_error_of_that_completion(slow, text, message):
    table = score({"func": f"{slow}:slow", "timeout": 5, "on_error": "abstain"}, ["a", text, "bb"])
    assert only(table, "status") == ["ok", "error", "ok"]
    assert message in only(table, "messages")[1]


def test_a_worker_that_dies_in_the_middle_of_its_answer_is_an_error_of_that_completion(tmp_path):
    path = tmp_path / "half.py"
    path.write_text(
        "import os, struct, sys\n"
        "def f(completion):\n"
        "    if completion == 'half':\n"
        "        os.write(int(sys.argv[1]), struct.pack('!i', 1000) + b'half')\n"
        "        os._exit(7)\n"
        "    return 1\n"
    )
    table = score({"func": f"{path}:f", "workers": 1, "on_error": "abstain"}, ["a", "half", "b"])
    assert only(table, "status") == ["ok", "error", "ok"]


def test_an_async_call_that_ends_the_process_spoils_no_other(tmp_path):
    path = tmp_path / "dies.py"
    path.write_text(
        "import os\nasync def f(completion):\n    if completion == 'die': os._exit(7)\n    return len(completion)\n"
    )
    table = score({"func": f"{path}:f", "workers": 1, "on_error": "abstain"}, ["a", "die", "bb", "ccc"])
    assert only(table, "values") == [1.0, None, 2.0, 3.0]
    assert "exited with status 7" in only(table, "messages")[1]


def test_what_cannot_leave_its_process_is_invalid(slow):
    table = score({"func": f"{slow}:slow", "timeout": 5, "on_error": "abstain"}, ["unsendable", "a"])
    assert only(table, "status") == ["invalid", "ok"]


def test_workers_import_neither_torch_nor_trl(slow):
    assert only(score({"func": f"{slow}:slow", "timeout": 5}, ["modules"]), "values") == [0.0]


def test_several_workers_share_the_work_and_keep_the_order(slow, slowness):
    texts = ["nap", "a", "nap", "bbb"] * 2
    start = time.monotonic()
    table = score({"func": f"{slow}:slow", "workers": 4}, texts)
    assert only(table, "values") == [3.0, 1.0, 3.0, 3.0] * 2
    assert time.monotonic() - start < (4 * 0.3 + 1.0) * slowness
    with load_rewards([{"func": f"{slow}:slow", "workers": 2}]) as suite:
        pids, deadline = [], time.monotonic() + 30
        while len(set(pids)) < 2 and time.monotonic() < deadline:  # the second worker may still be loading
            batch = [rollout(t) for t in ["pid", "nap"] * 4]
            pids += suite.score(batch, {"prompt": ["q"] * 8}).values["slow"][::2]
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_a_batch_form_with_a_timeout_takes_one_completion_at_a_time(slow):
    spec = {"func": f"{slow}:batch", "timeout": 0.3, "on_error": "abstain"}
    assert only(score(spec, ["a", "loop", "bb"]), "values") == [2.0, None, 3.0]
    assert only(score({**spec, "scope": "batch"}, ["a", "bb"]), "values") == [3.0, 4.0]
    assert only(score({**spec, "scope": "batch"}, ["a", "loop"]), "status") == ["timeout", "timeout"]


def test_a_group_form_with_a_timeout_keeps_its_groups(slow):
    with load_rewards([{"func": f"{slow}:group", "timeout": 0.3, "on_error": "abstain"}], max_error_rate=1) as suite:
        rollouts = [
            rollout(t, key=k, sample=s) for t, k, s in [("a", "p", 0), ("loop", "q", 0), ("b", "p", 1), ("c", "q", 1)]
        ]
        assert suite.score(rollouts, {"prompt": ["q"] * 4}).values["group"] == [3.0, None, 3.0, None]


def test_an_async_reward_with_a_timeout_survives_waiting_and_blocking(slow, monkeypatch):
    monkeypatch.setattr("rlseq.scoring.calls.workers.GRACE", 0.3)
    spec = {"func": f"{slow}:patient", "timeout": 0.3, "retries": 0, "on_error": "abstain"}
    table = score(spec, ["a", "await", "loop", "bb"])
    assert only(table, "status") == ["ok", "timeout", "timeout", "ok"]
    assert only(table, "values") == [1.0, None, None, 2.0]


def test_a_reward_that_cannot_load_in_a_worker_says_so(tmp_path):
    path = tmp_path / "picky.py"
    home = f"import os\nif os.getpid() != {os.getpid()}: raise OSError('only at home')\n"
    path.write_text(f"{home}def f(completion): return 1\n")
    with pytest.raises(RewardError, match=r"cannot be loaded in a worker process: RewardError: .*only at home"):
        score({"func": f"{path}:f", "timeout": 5}, ["a"])


def test_workers_die_with_their_parent(slow, tmp_path):
    script = f"""
import sys
from rlseq import load_rewards, Rollout
suite = load_rewards([{{"func": {f"{slow}:slow"!r}, "workers": 1}}])
r = lambda text: Rollout("p", 0, (1,), (True,), (0.0,), text, text, None, "stop", "sample")
print(int(suite.score([r("pid")], {{"prompt": ["q"]}}).totals[0]), flush=True)
suite.score([r("loop")], {{"prompt": ["q"]}})
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(worker)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_closing_a_suite_leaves_no_process_behind(slow):
    suite = load_rewards([{"func": f"{slow}:slow", "workers": 1}])
    pid = int(suite.score([rollout("pid")], {"prompt": ["q"]}).totals[0])
    assert alive(pid)
    suite.close()
    assert not alive(pid)
    assert suite.score([rollout("a")], {"prompt": ["q"]}).totals == [1.0]  # and it starts again
    suite.close()


# Async
