"""The benchmark that trains plain TRL and rlseq to one level: equal starts, equal prompts, and what it counts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import ROOT

SCRIPT = ROOT / "benchmarks/time_to_quality.py"
TINY = ["--tiny", "--seeds", "0", "--threads", "1", "--level", "0.5", "--every", "1", "--rows", "2"]


@pytest.fixture
def one_run(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("time_to_quality_run")


@pytest.fixture
def bench(one_run):
    spec = importlib.util.spec_from_file_location("time_to_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(**changes):
    common = {"model": "m", "level": 2.0, "every": 0, "rows": 2, "threads": 1, "tiny": True, "max_steps": 2}
    return argparse.Namespace(**common | changes)


def read(folder):
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return json.loads((folder / "finished.json").read_text()), lines


@pytest.mark.soak
def test_both_sides_train_to_the_level_on_the_same_prompts_and_nothing_runs_twice(bench, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--output_dir", str(tmp_path), "--max_steps", "4"]
    subprocess.run([sys.executable, SCRIPT, *words], check=True, capture_output=True)
    (trl, of_trl), (rlseq, of_rlseq) = read(tmp_path / "trl-seed0"), read(tmp_path / "rlseq-seed0")
    assert trl["weights"] == rlseq["weights"]
    assert [line.get("prompts") for line in of_trl] == [line.get("prompts") for line in of_rlseq]
    assert len({line["prompts"] for line in of_trl[1:]}) == 2  # of two steps
    for record, lines in ((trl, of_trl), (rlseq, of_rlseq)):
        assert [line["validation"] for line in lines] == [0, 0.25, 0.5]  # a tiny model's steps / 4
        assert (record["reached"], record["steps"], record["rollouts"]) == (True, 2, 2 * 4)
        assert 8 <= record["tokens"] <= 8 * 4
        assert 0 < sum(record["phases"].values()) <= record["seconds"] == lines[-1]["seconds"]
        assert record["phases"]["log-probs of the old policy"] == 0  # TRL's layout spares them
        assert record["peak_mb"] is None or record["peak_mb"] > 50

    def never(*_, **__):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(bench.subprocess, "run", never)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    bench.main()
    assert "| 1 of 1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, "--rows", "3"])
    with pytest.raises(SystemExit, match="rows 2, not 3: give another --output_dir"):
        bench.main()
    (tmp_path / "trl-seed0" / "finished.json").unlink()  # as an interrupted run leaves it
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(AssertionError, match="run again"):
        bench.main()


def test_a_seed_gives_both_sides_the_same_adapter_and_reward(one_run, tmp_path):
    weights = {}
    for side in ("trl", "rlseq"):
        for seed in (0, 1):
            reward = one_run.json_fields()
            trainer = one_run.build(side, seed, 2, settings(), tmp_path, *one_run.tiny_model(), reward)
            weights[side, seed] = one_run.digest(trainer.model)
            assert (trainer.args.generation_batch_size, trainer.args.gradient_accumulation_steps) == (4, 2)
    assert weights["trl", 0] == weights["rlseq", 0] != weights["trl", 1] == weights["rlseq", 1]
    plain = one_run.build("trl", 0, 2, settings(), tmp_path, *one_run.tiny_model(), reward)
    # By hand: of the fields a and b one is right.
    answers = [[{"role": "assistant", "content": text}] for text in ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', "?")]
    assert plain.reward_funcs[0](completions=answers, record=['{"a": 1, "b": 2}'] * 3) == [1.0, 0.5, 0.0]
    assert trainer.suite.names == ["json_fields"] and trainer.args.lr_scheduler_type == plain.args.lr_scheduler_type


@pytest.mark.parametrize("side", ["trl", "rlseq"])
def test_validation_changes_nothing_that_a_run_samples(one_run, tmp_path, monkeypatch, side):
    sampled = []
    count = one_run.Watch.count

    def kept(self, prompts, completions):
        sampled.append(completions)
        count(self, prompts, completions)

    monkeypatch.setattr(one_run.Watch, "count", kept)
    for every in (0, 1):
        one_run.train(side, 0, 2, settings(every=every), tmp_path / str(every))
    assert len(sampled) == 4 and sampled[0] != sampled[1]
    assert sampled[:2] == sampled[2:]


def test_the_clock_stands_still_while_validating(one_run, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(one_run.time, "perf_counter", lambda: now[0])

    def validate(steps):
        now[0] += 1000
        return steps / 4

    peaks = iter([100.0, 300.0, 200.0])
    watch = one_run.Watch(tmp_path / "curve", validate, 0.5, 2, lambda forget: None if forget else next(peaks))
    assert not watch.record()  # before the first step
    reached = []
    for _ in range(3):
        watch.start()
        now[0] += 10
        watch.count([[1], [1]], [[5, 6], [7]])
        watch.stop()
        watch.steps += 1
        reached.append(watch.record())
    # By hand: validated at 0 and 2, three steps of 10 s with 2 rollouts and 3 tokens each.
    assert (watch.seconds, watch.validation_seconds, watch.rollouts, watch.tokens) == (30, 2000, 6, 9)
    assert watch.peak == 300 and reached[:2] == [False, True]


def test_the_table_has_medians_and_says_what_was_not_reached(bench, tmp_path):
    seconds = {"trl": [(300, True), (100, True), (900, False)], "rlseq": [(50, True), (40, False), (70, False)]}
    for side, found in seconds.items():
        for seed, (taken, reached) in enumerate(found):
            record = {"side": side, "seed": seed, "reached": reached, "seconds": taken, "steps": 5, "rollouts": 320}
            record |= {"tokens": 9000, "peak_mb": 4000.0 + seed, "machine": "a machine"}
            record["phases"] = {"rollouts": taken / 2, "rewards": 1.0, **dict.fromkeys(bench.UPDATE, 2.0)}
            record["settings"] = {"level": 0.8, "rows": 100, "every": 5, "layout": 16}
            folder = tmp_path / f"{side}-seed{seed}"
            folder.mkdir()
            (folder / "finished.json").write_text(json.dumps(record))
    rows = [line.strip("| ").split(" | ") for line in bench.table(tmp_path).splitlines() if line.startswith("| ")]
    columns = rows[0]
    trl, rlseq = (dict(zip(columns, row, strict=True)) for row in rows[1:3])
    # By hand: of 100, 300 and more, the median is 300; of 50 and two that did not reach the level, none.
    assert (trl["seconds"], trl["reached"], trl["seeds"]) == ("300 (100–∞)", "2 of 3", "0 1 2")
    assert (rlseq["seconds"], rlseq["tokens"], rlseq["reached"]) == ("not reached (50–∞)", "not reached", "1 of 3")
    assert (trl["update, s"], trl["rollouts, s"], trl["the rest, s"]) == ("8", "150", "141.0")
    assert rlseq["peak memory, GB"] == "4.00"
    assert bench.table(tmp_path / "none") == "No run has finished."


def test_each_side_gets_the_layout_whose_later_steps_are_shortest(bench, tmp_path, monkeypatch):
    # By hand: seconds after steps 0 to 3. The first step, which warms up, is left out: 8 a step, 5 a step, 6 a step.
    seconds = {8: [0, 1, 9, 17], 16: [0, 90, 94, 100], 32: [0, 2, 8, 14]}
    asked = []

    def ended(words, **_):
        given = {name: words[words.index(name) + 1] for name in words if name.startswith("--")}
        folder, layout = Path(given["--output_dir"]), int(given["--layouts"])
        asked.append((given["--sides"], layout, given["--max_steps"], given["--every"]))
        lines = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(seconds[layout])]
        (folder / "curve.jsonl").write_text("\n".join(lines) + "\n")
        done = {"reached": False, "steps": 3, "settings": bench.settings_of(trial, layout)}
        (folder / "finished.json").write_text(json.dumps(done))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", ended)
    args = settings(output_dir=tmp_path, layouts=[8, 16, 32], seeds=[4], level=0.8, every=5)
    trial = settings(**vars(args) | {"every": 0})
    assert bench.fastest_layout("trl", args) == 16
    assert asked == [("trl", layout, "3", "0") for layout in (8, 16, 32)]
    assert bench.fastest_layout("trl", args) == 16 and len(asked) == 3  # measured once
    assert bench.fastest_layout("rlseq", settings(layouts=[64])) == 64 and len(asked) == 3  # nothing to compare
    killed = argparse.Namespace(returncode=-signal.SIGKILL)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(SystemExit, match=r"rlseq seed 4 was killed in micro-batches of 8.*give smaller --layouts"):
        bench.fastest_layout("rlseq", args)
