"""Ctrl-C in the first seconds, while torch and the rest are imported: exit code 130, and not a word."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlseq.common.interrupts import exit_on_sigint

ROOT = Path(__file__).parents[2]
# In the place of torch: the user presses Ctrl-C while it is imported, and C++ code aborts on the exception.
TORCH = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
except KeyboardInterrupt:
    os.abort()
"""
EVALUATE = ["evaluate", "--models", "a=b/c", "--dataset_name", "d.jsonl", "--reward_funcs", "exact_match"]
COMMANDS = {
    "rlseq evaluate": ["-c", "import sys; from rlseq.cli.main import main; sys.exit(main())", *EVALUATE],
    **{name: [f"recipes/{name}.py"] for name in ("sft", "dpo", "grpo", "ppo", "evaluate")},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_during_the_imports_ends_quietly(name, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    ended = subprocess.run(
        [sys.executable, *COMMANDS[name]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        # a suite that runs in the background of a shell ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_the_handler_is_as_before_afterwards_and_that_of_others_stays():
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(ZeroDivisionError), exit_on_sigint():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            _ = 1 / 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with exit_on_sigint():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
