"""An evaluation that was killed resumes: its files are, byte for byte, those of an uninterrupted one."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import recipe, run_ranks
from test_data import word_tokenizer
from tiny import tiny_model

import rlseq
from rlseq.cli.main import main
from rlseq.evaluation.measure import decode as measure_decode
from rlseq.evaluation.measure import partial
from rlseq.evaluation.measure.partial import (
    PartialResults,
    checkpoint_fingerprint,
    rollouts_as_json,
    rollouts_from_json,
)
from rlseq.evaluation.run import ContrastSettings, contrast
from rlseq.evaluation.studies.table import STUDIES
from rlseq.scoring import load_rewards
from rlseq.types import Rollout

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"], "level": 1},
    {"prompt": "c = ", "references": ["C"], "level": 2},
    {"prompt": "d e f a = ", "references": ["D E F A"], "level": 1},
]
STRATEGIES = ("greedy", "sample", "beam")
SETTINGS = ContrastSettings(
    strategies=STRATEGIES, samples_per_row=2, max_new_tokens=3, resamples=50, studies=("ranking",)
)
FILES = ("results.json", "samples.jsonl", "per_example.jsonl")
# Stops for good at its so-manieth call while a file says so: the evaluation is then known to be there.
REWARD = """
import time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")
HOLD = Path(__file__).with_name("hold")


def letters(completion, references):
    with CALLS.open("a") as file:
        file.write("x")
    if HOLD.exists() and CALLS.stat().st_size == int(HOLD.read_text()):
        time.sleep(600)
    return float(sum(word in completion for word in references[0].split()))
"""


def letters(completion, references):
    return float(sum(word in completion for word in references[0].split()))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two tiny checkpoints, data and a reward, in a folder."""
    folder = tmp_path_factory.mktemp("task")
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(task, output_dir):
    return [
        "evaluate", "--models", f"one={task}/one", f"two={task}/two",
        "--dataset_name", f"{task}/validation.jsonl", "--reward_funcs", f"{task}/reward.py:letters",
        "--output_dir", str(output_dir), "--strategies", *STRATEGIES, "--samples_per_row", "2",
        "--max_new_tokens", "3", "--resamples", "50", "--studies", "ranking",
    ]  # fmt: skip


def stopped(task, output_dir, at_call, number):
    """Run the command until the reward is called N times; then send a signal."""
    calls = task / "calls"
    calls.write_text("")
    (task / "hold").write_text(str(at_call))
    with subprocess.Popen(
        [sys.executable, "-m", "rlseq.cli.main", *command(task, output_dir)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # as here: sums round alike
        # a suite that runs in the background of a shell ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 300
        while calls.stat().st_size < at_call and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    (task / "hold").unlink()
    return process.returncode, out, err


def test_a_killed_evaluation_goes_on_and_ends_as_an_undisturbed_one(task, tmp_path, capsys):
    # the reward is tried once, then called 3 times under greedy, 6 under sample, 3 under beam, for each model
    code, out, err = stopped(task, tmp_path / "killed", 1 + 5, signal.SIGKILL)  # in the first model's samples
    assert code == -signal.SIGKILL and not (tmp_path / "killed" / "results.json").exists(), err
    assert len(list((tmp_path / "killed" / ".partial_results").glob("*.json"))) == 2  # likelihood, greedy

    code, out, err = stopped(task, tmp_path / "killed", 1 + 6 + 3 + 1, signal.SIGINT)  # in the second's greedy
    assert code == 130 and "Traceback" not in err
    assert f"evaluating one: 2 of 5 parts found in {tmp_path}/killed/.partial_results\n" in out
    assert "evaluating two" not in out
    assert err.splitlines()[-1] == (
        f"interrupted: the same command resumes from the parts that are finished ({tmp_path}/killed/.partial_results)"
    )

    (task / "calls").write_text("")
    assert main(command(task, tmp_path / "killed")) == 0
    assert (task / "calls").stat().st_size == 1 + 3 + 6 + 3  # the second model's alone
    out = capsys.readouterr().out
    assert "evaluating one: 5 of 5 parts found" in out and "evaluating two: 1 of 5 parts found" in out
    assert not (tmp_path / "killed" / ".partial_results").exists()

    assert main(command(task, tmp_path / "undisturbed")) == 0
    assert "parts found" not in capsys.readouterr().out
    for file in FILES:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_two_processes_share_the_rows_and_give_the_same_samples(task, tmp_path):
    (task / "calls").write_text("")
    run_ranks(2, recipe("evaluate", command(task, tmp_path / "two")[1:]), tmp_path / "log")
    assert (task / "calls").stat().st_size == 2 + 2 * (3 + 6 + 3)  # each process tried it, then every row once
    assert not (tmp_path / "two" / ".partial_results").exists()
    assert main(command(task, tmp_path / "one")) == 0
    two, one = ((tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("two", "one"))
    for mine, expected in zip(map(json.loads, two), map(json.loads, one), strict=True):
        assert mine.pop("logprob") == pytest.approx(expected.pop("logprob"), abs=1e-5)  # rounded in other batches
        assert mine == expected


def run(models, output_dir, *, rows=ROWS, settings=SETTINGS, rewards=(letters,), stop=None, monkeypatch=None):
    """A contrast; returns the (model, strategy) pairs that were decoded, and stops before one."""
    decoded = []
    decode = measure_decode.decode

    def recorded(model, prompts, *, strategy, **options):
        if strategy.spec == stop:
            raise KeyboardInterrupt
        decoded.append(strategy.spec)
        return decode(model, prompts, strategy=strategy, **options)

    with monkeypatch.context() as patch, load_rewards(list(rewards)) as suite:
        patch.setattr(measure_decode, "decode", recorded)
        try:
            contrast(models, rows, suite, settings=settings, output_dir=output_dir, quiet=True)
        except KeyboardInterrupt:
            assert stop is not None
    return decoded


@pytest.fixture
def interrupted(task, tmp_path, monkeypatch):
    """What is there after an interruption before the search, and a function that resumes from a copy of it."""
    models = {"one": str(task / "one")}
    assert run(models, tmp_path / "out", stop="beam", monkeypatch=monkeypatch) == ["greedy", "sample"]

    def go_on(**changes):
        shutil.copytree(tmp_path / "out", tmp_path / "copy", dirs_exist_ok=True)
        return run(**({"models": models, "output_dir": tmp_path / "copy", "monkeypatch": monkeypatch} | changes))

    go_on.folder = tmp_path / "out" / ".partial_results"
    return go_on


def test_every_study_comes_back_as_it_was(task, tmp_path, monkeypatch):
    """Killed when all is measured and nothing written, an evaluation only has to write."""
    models = {name: str(task / name) for name in ("one", "two")}
    small = {"coverage_samples": 4, "temperatures": (0.5, 1.0), "prefix_lengths": (1,), "strategies": ("greedy",)}
    settings = dataclasses.replace(SETTINGS, studies=tuple(STUDIES), **small)
    options = {"rows": ROWS * 4, "settings": settings, "monkeypatch": monkeypatch}

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlseq.evaluation.run.write_results", killed)
        run(models, tmp_path / "killed", stop="", **options)
    with monkeypatch.context() as patch:
        for study in STUDIES.values():
            patch.setattr(type(study), "measure", killed)
        assert run(models, tmp_path / "killed", **options) == []
    run(models, tmp_path / "undisturbed", **options)
    files = sorted(path.name for path in (tmp_path / "undisturbed").iterdir())
    assert set(FILES) < set(files) == {path.name for path in (tmp_path / "killed").iterdir()}
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def one_more(completion, references):
    return letters(completion, references) + 1


@pytest.mark.parametrize(
    ("changes", "decoded"),
    [
        ({}, ["beam"]),
        ({"settings": dataclasses.replace(SETTINGS, eval_batch_size=2, max_kv_gb=1.0)}, ["beam"]),
        ({"settings": dataclasses.replace(SETTINGS, seed=1)}, list(STRATEGIES)),
        ({"settings": dataclasses.replace(SETTINGS, strategies=("greedy", "beam", "sample"))}, None),
        ({"rows": [*ROWS[:2], {**ROWS[2], "references": ["D"]}]}, list(STRATEGIES)),
        ({"rows": [*ROWS[:2], {**ROWS[2], "level": 3}]}, list(STRATEGIES)),
        ({"rewards": [one_more]}, list(STRATEGIES)),
        ({"rewards": [{"func": letters, "weight": 2.0}]}, list(STRATEGIES)),
    ],
    ids=["none", "memory", "seed", "order", "reference", "column", "reward", "weight"],
)
def test_only_a_change_that_decides_numbers_makes_it_start_again(interrupted, changes, decoded):
    assert interrupted(**changes) == (decoded or ["greedy", "beam", "sample"])


def test_other_weights_names_and_versions_start_again(interrupted, task, tmp_path, monkeypatch):
    same = shutil.copytree(task / "one", tmp_path / "same")  # copytree keeps the times of change
    assert checkpoint_fingerprint(str(same)) == checkpoint_fingerprint(str(task / "one"))
    weights = same / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same again, but who knows
    assert checkpoint_fingerprint(str(same)) != checkpoint_fingerprint(str(task / "one"))

    assert interrupted(models={"one": str(task / "two")}) == list(STRATEGIES)
    assert interrupted(models={"other": str(task / "one")}) == list(STRATEGIES)
    monkeypatch.setattr(rlseq, "__version__", "0.0.0")
    assert interrupted() == list(STRATEGIES)


def test_an_adapter_is_known_by_its_base_too(task, tmp_path):
    base, adapter = shutil.copytree(task / "one", tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = checkpoint_fingerprint(str(adapter))
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert None is not before != checkpoint_fingerprint(str(adapter)) is not None
    shutil.rmtree(base)
    assert checkpoint_fingerprint(str(adapter)) is None and checkpoint_fingerprint("no/such-model") is None


@pytest.mark.parametrize("tear", [lambda text: text[:-20], lambda text: text.replace(b"1", b"2", 1), lambda _: b"\xff"])
def test_a_truncated_part_is_measured_again_with_a_warning(interrupted, tear):
    for path in interrupted.folder.glob("*.json"):
        path.write_bytes(tear(path.read_bytes()))
    with pytest.warns(UserWarning, match="is truncated; greedy is measured again"):
        assert interrupted() == list(STRATEGIES)


def test_a_part_of_another_format_version_is_measured_again_with_a_warning(interrupted):
    for path in interrupted.folder.glob("*.json"):
        header, _, text = path.read_text().partition("\n")
        path.write_text(json.dumps({**json.loads(header), "format_version": 9}) + "\n" + text)
    with pytest.warns(UserWarning, match=r"greedy: .* of format version 9; rlseq .* reads 3. It is measured again"):
        assert interrupted() == list(STRATEGIES)


def test_a_disk_that_takes_nothing_ends_no_evaluation(task, tmp_path, monkeypatch):
    (tmp_path / ".partial_results").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="greedy is not kept"):
        assert run({"one": str(task / "one")}, tmp_path, monkeypatch=monkeypatch) == list(STRATEGIES)
    assert (tmp_path / "results.json").exists()


def test_nothing_is_kept_without_an_output_folder(task, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run({"one": str(task / "one")}, None, stop="beam", monkeypatch=monkeypatch)
    assert not list(tmp_path.rglob("*"))


def test_processes_agree_on_what_is_found(tmp_path, monkeypatch):
    names = ["a", "b", "c"]

    def opened(rank, world, others=None, key="seed 0"):
        """The parts of a process that hears of these others; without them it hears of itself."""
        monkeypatch.setattr(partial, "PartialState", lambda: SimpleNamespace(process_index=rank, num_processes=world))
        monkeypatch.setattr(partial, "gather_object", lambda mine: mine if others is None else others)
        return PartialResults(tmp_path, key, names)

    first, second = opened(0, 2), opened(1, 2)
    for part in ("a", "b"):
        first.get_or_compute(part, lambda: [0])
    for part in ("c", "b"):
        second.get_or_compute(part, lambda: [1])
    own = [set(opened(rank, 2).found) for rank in (0, 1)]
    assert own == [{"a", "b"}, {"b", "c"}]
    assert [opened(rank, 2, own).found for rank in (0, 1)] == [{"b": [0]}, {"b": [1]}]
    assert not opened(0, 1).found and not opened(1, 3).found  # rows are dealt out differently
    assert not opened(0, 2, own, key="seed 1").found
    # one that does not know its checkpoint still tells the others, and keeps nothing
    unknown = opened(1, 2, key=None)
    assert not unknown.found and unknown.get_or_compute("c", lambda: [2]) == [2]
    assert opened(1, 2).found == {"b": [1], "c": [1]}


def test_rows_that_json_cannot_hold_are_evaluated_and_not_kept(task, tmp_path, monkeypatch):
    rows = [{**row, "odd": {(1, 2): 3}} for row in ROWS]
    models = {"one": str(task / "one")}
    assert run(models, tmp_path, rows=rows, stop="beam", monkeypatch=monkeypatch) == ["greedy", "sample"]
    assert not (tmp_path / ".partial_results").exists()


def test_completions_come_back_as_they_were():
    fields = {
        "prompt_key": "k",
        "sample": 1,
        "loss_mask": (True, True),
        "text_with_special_tokens": "\ud800é",
        "strategy": "sample",
    }
    logprobs = (-1 / 3, -math.inf)
    chat = Rollout(
        completion_ids=(5, 2), logprobs=logprobs, text="é", messages=({"role": "assistant", "content": "é"},),
        finish_reason="stop", **fields,
    )  # fmt: skip
    text = dataclasses.replace(chat, messages=None, logprobs=(torch.tensor(0.1).item(), -0.0))
    groups = [[chat], [], [text, chat]]
    assert rollouts_from_json(json.loads(json.dumps(rollouts_as_json(groups)))) == groups
