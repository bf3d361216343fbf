"""One run, however it is carried out: by more processes, in other batches, in another order, resumed, or repeated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
import yaml
from forks import end_of, fork, recipe, run_ranks
from safetensors.torch import load_file
from test_evaluation_agreement import SETTINGS, letters
from test_kill import difference, state_of, write_task
from test_recipes import read_lines, run_in_process
from tiny_task import ROWS, save_model, tiny_trainer

from rlseq.evaluation.run import contrast_and_report
from rlseq.scoring import load_rewards
from rlseq.training.trl.batch import rollouts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


def sampled(run):
    """What was sampled: (file, prompt, sample) -> completion, tokens, how it ended, what it earned."""
    return {
        (file.name, row["prompt_key"], row["sample"]): tuple(
            row[name] for name in ("completion", "length", "finish_reason", "total")
        )
        for file in sorted((run / "rollouts").iterdir())
        for row in read_lines(file)
    }


def flips(found, expected):
    """How many completions differ; the keys must be the same."""
    assert found.keys() == expected.keys()
    return sum(found[key] != expected[key] for key in expected)


# -- the number of processes

WORLD = ["--num_iterations", 2, "--optim", "sgd", "--learning_rate", 0.3]
WORLD += [
    "--ema_decay",
    0,
    "--lr_scheduler_type",
    "constant",
    "--max_steps",
    6,
    "--save_steps",
    2,
    "--logging_steps",
    1,
]
# Of each logged number TRL takes the mean over ranks of a rank's extreme, or it is a time.
NOT_OF_THE_BATCH = ("step_time", "clip_ratio/low_min", "clip_ratio/high_max", "train_")


def check_close(run, one):
    """The run on one process, to 1e-5 of each number's size; completions are equal."""
    assert flips(sampled(run), sampled(one)) == 0
    for file in sorted((one / "rollouts").iterdir()):
        rows = [
            {(r["prompt_key"], r["sample"]): r for r in read_lines(path / "rollouts" / file.name)}
            for path in (one, run)
        ]
        for key, row in rows[0].items():
            for name in ("advantage", "logprob"):
                assert rows[1][key][name] == pytest.approx(row[name], rel=1e-5, abs=1e-5), (file.name, key)
    logs = [[line for line in read_lines(path / "metrics.jsonl")] for path in (one, run)]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys() and ("grad_norm" in mine or mine.get("summary"))
        for name, value in mine.items():
            if not name.startswith(NOT_OF_THE_BATCH):
                assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (mine["step"], name)
    for checkpoint in sorted(one.glob("checkpoint-*")):
        for file in sorted(checkpoint.rglob("*.safetensors")):
            expected, found = load_file(file), load_file(run / file.relative_to(one))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "samples", "minibatches"),
    [("grpo", 8, 1), ("grpo", 2, 2), ("ppo", 4, 1), ("ppo", 1, 2)],  # on four processes a group of 8 straddles two
)
def test_one_two_and_four_processes_train_as_one_with_the_same_global_batch(task, tmp_path, name, samples, minibatches):
    log = tmp_path / "log"
    words = ["".join(pair) for pair in itertools.permutations("abcde", 2)] + ["fgh", "ghi", "hif", "ifg"]
    (tmp_path / "rows.jsonl").write_text(  # 24, of which 18 or so are trained on
        "".join(json.dumps({"prompt": f"{' '.join(w)} = ", "references": [" ".join(w.upper())]}) + "\n" for w in words)
    )
    common = ["--config", task / f"{name}.yaml", "--dataset_name", tmp_path / "rows.jsonl", *WORLD]
    common += ["--num_generations", samples, "--steps_per_generation", minibatches]
    common += ["--gradient_accumulation_steps", 1]

    def run(processes, out, *more):
        size = ["--per_device_train_batch_size", 16 // minibatches // processes]
        run_ranks(processes, recipe(name, [*common, *size, "--output_dir", out, *more]), log)

    one = tmp_path / "one"
    size = ["--per_device_train_batch_size", 16 // minibatches]
    assert end_of(fork(recipe(name, [*common, *size, "--output_dir", one]), log)) == 0
    assert (
        len(sampled(one)) == (3 if minibatches == 1 else 2) * 16
        and len({length for _, length, _, _ in sampled(one).values()}) > 2
    )
    start = load_file(task / "model/model.safetensors")
    moved = load_file(one / "checkpoint-6/model.safetensors")
    assert max((moved[n] - start[n]).abs().max() for n in start) > 1e-2
    for processes in (2, 4):
        run(processes, tmp_path / str(processes))
        assert f"{processes} processes on cpu" in log.read_text()
        check_close(tmp_path / str(processes), one)

    # At the end of a round another number of processes can resume: what it samples is what the one process sampled.
    shutil.copytree(one, tmp_path / "resumed")
    run(2, tmp_path / "resumed", "--resume_from_checkpoint", "checkpoint-4")
    assert flips(sampled(tmp_path / "resumed"), sampled(one)) == 0


def test_two_processes_are_taught_as_one(task, tmp_path):
    save_model(tmp_path / "teacher", seed=5)
    config = yaml.safe_load((task / "grpo.yaml").read_text())
    del config["reward_funcs"]
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(config))
    common = ["--config", tmp_path / "distill.yaml", *WORLD, "--teacher_name_or_path", tmp_path / "teacher"]
    common += ["--objective", "distillation", "--gradient_accumulation_steps", 1, "--steps_per_generation", 1]
    for processes in (1, 2):
        size = ["--per_device_train_batch_size", 8 // processes, "--output_dir", tmp_path / str(processes)]
        run_ranks(processes, recipe("grpo", [*common, *size]), tmp_path / "log")
    first, *_, last, _ = read_lines(tmp_path / "1" / "metrics.jsonl")
    assert first["teacher_divergence"] > last["teacher_divergence"] > 0
    check_close(tmp_path / "2", tmp_path / "1")


# -- batches and order


def in_batches(rows):
    return lambda sample, model, prompts, **options: sample(model, prompts, **options, batch_rows=rows)


def backwards(sample, model, prompts, *, samples, prefixes, **options):
    return sample(model, prompts[::-1], samples=samples[::-1], prefixes=prefixes[::-1], **options)[::-1]


HOW = {
    "a row at a time": (in_batches(1), {}),
    "three rows at a time": (in_batches(3), {}),
    "prompts backwards": (backwards, {}),
    "micro-batches of four": (
        in_batches(1000),
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ),
}


def test_training_samples_the_same_completions_whatever_the_batch_size_and_the_order(tmp_path, monkeypatch):
    sample = rollouts.sample
    common = {"max_steps": 6, "report_to": "none"}
    tiny_trainer(tmp_path / "plain", **common).train()
    expected = sampled(tmp_path / "plain")
    assert len(expected) == 6 * 16 and len({completion for completion, *_ in expected.values()}) > 60
    for name, (how, settings) in HOW.items():
        monkeypatch.setattr(rollouts, "sample", lambda *a, how=how, **options: how(sample, *a, **options))
        tiny_trainer(tmp_path / name, **common, **settings).train()
        assert flips(sampled(tmp_path / name), expected) == 0, name


@pytest.fixture
def evaluate(task, tmp_path):
    """Evaluates the task's model under a name; returns (strategy, prompt, sample) -> completion, tokens."""
    settings = dataclasses.replace(SETTINGS, strategies=("greedy", "sample", "beam"), samples_per_row=8)

    def run(name, rows=ROWS, processes=1, **changes):
        options = {"settings": dataclasses.replace(settings, **changes), "prompt_options": {}, "title": "Same"}

        def act():
            with load_rewards([letters]) as suite:
                contrast_and_report({"one": task / "model"}, rows, suite, output_dir=tmp_path / name, **options)

        if processes == 1:
            act()
        else:
            run_ranks(processes, act, tmp_path / f"{name}.log")
            reports = (tmp_path / f"{name}.log").read_text().count("report: ")
            assert reports == 1  # else each process evaluated all rows for itself
        found = read_lines(tmp_path / name / "samples.jsonl")
        return {(s["strategy"], s["prompt"], s["sample"]): (s["completion"], s["length"]) for s in found}

    return run


def test_an_evaluation_has_the_same_completions_whatever_the_batch_size_and_the_order(evaluate):
    expected = evaluate("plain")
    assert len(expected) == len(ROWS) * (1 + 8 + 1) and len({text for text, _ in expected.values()}) > 60
    assert flips(evaluate("a row at a time", eval_batch_size=1), expected) == 0
    assert flips(evaluate("three rows at a time", eval_batch_size=3), expected) == 0
    assert flips(evaluate("backwards", rows=ROWS[::-1]), expected) == 0


@pytest.mark.soak
def test_an_evaluation_has_the_same_completions_on_one_two_and_four_processes(evaluate):
    expected = evaluate("one")
    assert len(expected) == len(ROWS) * (1 + 8 + 1)
    for processes in (2, 4):
        assert flips(evaluate(f"on {processes}", processes=processes), expected) == 0


# -- the same settings

FLAGS = ["--learning_rate", 3e-3, "--num_generations", 2, "--beta", 0.1, "--seed", 7, "--temperature", 0.8]
FLAGS += ["--reward_weights", 2.0, "--max_steps", 6, "--save_steps", 3]


@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=pytest.mark.soak)])
def test_two_runs_of_one_command_are_equal_and_so_is_one_from_its_config_yaml(task, tmp_path, monkeypatch, name):
    command = ["--config", task / f"{name}.yaml", *FLAGS, "--output_dir"]
    one, two, again, other = (tmp_path / run for run in ("one", "two", "again", "other"))
    run_in_process(monkeypatch, name, *command, one)
    run_in_process(monkeypatch, name, *command, two)
    run_in_process(monkeypatch, name, "--config", one / "config.yaml", "--output_dir", again)
    expected = state_of(one)
    assert expected["checkpoints"] == ["checkpoint-3", "checkpoint-6"] and len(expected["rollouts"]) == 2
    assert difference(state_of(two), expected) is None
    assert difference(state_of(again), expected) is None
    run_in_process(monkeypatch, name, *command, other, "--seed", 8)
    assert difference(state_of(other), expected) is not None
