"""`rlseq show` on run directories written here by hand."""

import argparse
import json
import subprocess
import sys

import pytest

from rlseq.cli.show import add_arguments, by_prompt, load_step, run
from rlseq.errors import ConfigError, RunDirectoryError


def rollout(step, key, sample, **fields):
    return {
        "step": step,
        "prompt_key": key,
        "sample": sample,
        "prompt": f"spell {key}",
        "references": ["K AE T"],
        "completion": f"{key} {step}.{sample}",
        "values": {"phoneme_accuracy": 0.25, "brevity": None},
        "status": {"phoneme_accuracy": "ok", "brevity": "abstained"},
        "total": 0.25,
        "advantage": -0.5,
        "logprob": -1.25,
        "length": 4,
        "finish_reason": "stop",
        **fields,
    }


@pytest.fixture
def run_directory(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    rounds = {
        "000001.jsonl": [rollout(1, "cat", 0), rollout(1, "cat", 1), rollout(2, "dog", 0)],
        "000002.jsonl": [rollout(3, "cow", 1), rollout(3, "cow", 0), rollout(3, "emu", 0, total=0.75)],
    }
    for name, rows in rounds.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def show(capsys, monkeypatch, *argv, columns=160):
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(a) for a in argv]))
    return capsys.readouterr().out


def test_last_step_is_shown_unless_told_otherwise(run_directory, capsys, monkeypatch):
    out = show(capsys, monkeypatch, run_directory)
    assert "Step 3: 3 rollouts of 2 prompts, mean reward 0.417" in out  # (0.25 + 0.25 + 0.75) / 3
    assert "cow 3.0" in out and "cat" not in out
    assert "Step 1: 2 rollouts of 1 prompts" in show(capsys, monkeypatch, run_directory, "--step", 1)


def test_each_completion_shows_its_rewards_total_advantage_and_log_prob(run_directory, capsys, monkeypatch):
    out = show(capsys, monkeypatch, run_directory, "--step", 2)
    line = next(line for line in out.splitlines() if "dog 2.0" in line)
    assert line.split() == ["0", "dog", "2.0", "0.250", "abstained", "0.250", "-0.500", "-1.25", "4"]
    assert "reference  K AE T" in out


def test_rewards_without_room_beside_the_completion_stand_below_it(run_directory, capsys, monkeypatch):
    values = {"phoneme_accuracy": 0.25, "length_target": 1.0, "brevity": None}
    row = rollout(4, "dog", 0, completion="the quick brown fox", values=values)
    (run_directory / "rollouts" / "000003.jsonl").write_text(json.dumps(row) + "\n")
    lines = show(capsys, monkeypatch, run_directory, columns=80).splitlines()
    assert [line.split() for line in lines if line[:1] in "#0" and line] == [
        ["#", "completion", "reward", "advantage", "log-prob", "tokens"],
        ["0", "the", "quick", "brown", "fox", "0.250", "-0.500", "-1.25", "4"],
        ["#", "phoneme_accuracy", "length_target", "brevity"],
        ["0", "0.250", "1.000", "abstained"],
    ]


def test_prompt_filters_by_the_text_it_contains(run_directory, capsys, monkeypatch):
    out = show(capsys, monkeypatch, run_directory, "--prompt", "emu")
    assert "emu 3.0" in out and "cow" not in out
    with pytest.raises(RunDirectoryError, match="'zebra'"):
        show(capsys, monkeypatch, run_directory, "--prompt", "zebra")


def test_limit_says_how_many_prompts_are_left(run_directory, capsys, monkeypatch):
    out = show(capsys, monkeypatch, run_directory, "--limit", 1)
    assert "emu" not in out and "1 more prompts" in out
    assert "emu" in show(capsys, monkeypatch, run_directory, "--limit", 0)


def test_text_that_looks_like_markup_is_printed_as_it_is(run_directory, capsys, monkeypatch):
    path = run_directory / "rollouts" / "000003.jsonl"
    path.write_text(json.dumps(rollout(4, "a", 0, prompt="[bold]x[/bold]", completion="[red]y[/nope]")) + "\n")
    out = show(capsys, monkeypatch, run_directory)
    assert "[bold]x[/bold]" in out and "[red]y[/nope]" in out


def test_what_acts_on_a_terminal_is_printed_as_an_escape(run_directory, capsys, monkeypatch):
    given = "a\x1b]0;title\x07b\rc\x9bd\u202ee\udc80f\x00g\u061c\u200f\u2028\nh \N{FAMILY}"
    path = run_directory / "rollouts" / "000003.jsonl"
    named = {"values": {"re\u202eward": 0.5}, "status": {}}  # a reward's own name
    shown = rollout(4, "a", 0, prompt=given, references=[given], completion=given, **named)
    path.write_text(json.dumps(shown) + "\n")
    out = show(capsys, monkeypatch, run_directory)
    assert out.count(r"a\u001b]0;title\u0007b\u000dc\u009bd\u202ee\udc80f\u0000g\u061c\u200f\u2028") == 3
    assert out.count("h \N{FAMILY}") == 3 and r"re\u202eward" in out
    assert not set(out) & set("\x00\x07\x1b\x9b\r\u202e\udc80\u061c\u200f\u2028")


def test_a_limit_below_0_is_refused(run_directory, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="--limit is -1; expected a number of prompts, or 0 for all"):
        show(capsys, monkeypatch, run_directory, "--limit", -1)


def test_chat_prompts_and_abstained_totals_are_shown(run_directory, capsys, monkeypatch):
    chat = [{"role": "user", "content": "hello there"}]
    row = rollout(5, "a", 0, prompt=chat, total=None, advantage=None, finish_reason="length")
    (run_directory / "rollouts" / "000004.jsonl").write_text(json.dumps(row) + "\n")
    out = show(capsys, monkeypatch, run_directory, "--prompt", "hello")
    assert "user: hello there" in out and "(cut)" in out and "none" in out


def test_samples_come_in_order_and_prompts_as_first_met():
    groups = by_prompt([rollout(1, "b", 1), rollout(1, "a", 0), rollout(1, "b", 0)])
    assert list(groups) == ["b", "a"]
    assert [r["sample"] for r in groups["b"]] == [0, 1]


def test_last_step_is_found_when_files_do_not_follow_the_steps(run_directory):
    (run_directory / "rollouts" / "000003.jsonl").write_text(json.dumps(rollout(2, "dog", 1)) + "\n")
    assert {r["prompt_key"] for r in load_step(run_directory)} == {"cow", "emu"}
    assert len(load_step(run_directory, 2)) == 2


def test_missing_step_is_an_error_that_names_the_steps_there_are(run_directory):
    with pytest.raises(RunDirectoryError, match=r"step 7 .*: 1, 2, 3$"):
        load_step(run_directory, 7)


def test_missing_run_and_missing_rollouts_are_errors(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        load_step(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="no rollouts"):
        load_step(tmp_path)


def test_half_written_last_line_is_passed_over_but_a_broken_line_is_an_error(run_directory):
    path = run_directory / "rollouts" / "000002.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "prom')
    assert len(load_step(run_directory)) == 3
    path.write_text('{"step": 3, "prom\n' + whole)
    with pytest.raises(RunDirectoryError, match=r"000002\.jsonl, line 1"):
        load_step(run_directory)


def test_show_imports_neither_torch_nor_trl():
    code = "import sys, rlseq.cli.show; sys.exit(bool({'torch', 'trl', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
