"""recipes/ppo.py as a user runs it, evaluation during training in both recipes, bad settings, and two processes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from forks import recipe, run_ranks
from safetensors.torch import load_file
from test_recipes import load_recipe, read_lines, run_in_process
from tiny_ppo import ppo_settings
from tiny_task import LETTERS, write_task
from transformers import AutoModelForCausalLM

from rlseq.errors import ConfigError, ModelError

EARLY = '''
def early(completion):
    """The mean letter: 0 for all a, 8 for all i."""
    letters = [ord(word.lower()) - ord("a") for word in completion.split() if word.isalpha()]
    return sum(letters) / max(len(letters), 1)
'''
STEPS = ("000001", "000002", "000003")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A tiny model, local data, rewards, and one config for both recipes."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    (folder / "rewards.py").write_text(LETTERS + EARLY)
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "reward_funcs": [f"{folder}/rewards.py:letters"],
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "save_steps": 1,
        "evaluate": False,
        "resamples": 200,
        "disable_tqdm": True,
        "num_cpu_threads": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def arguments(task, out, *more):
    return ["--config", task / "config.yaml", "--output_dir", out, *more]


def logged(out):
    return [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_leaves_the_run_directory_of_the_design_and_its_config_repeats_the_run(task, tmp_path, monkeypatch, critic):
    out = tmp_path / "run"
    more = ["--critic", critic, "--beta", 0.05, "--kl_target", 0.5, "--evaluate", "true"]
    run_in_process(monkeypatch, "ppo", *arguments(task, out, *more))
    assert [line["step"] for line in logged(out)] == [1, 2, 3]
    assert {"critic/value_loss", "critic/explained_variance", "kl", "kl_penalty", "kl_coefficient"} <= logged(out)[
        0
    ].keys()
    assert sorted(p.stem for p in (out / "rollouts").iterdir()) == list(STEPS)
    results = json.loads((out / "evaluation/results.json").read_text())
    assert list(results["models"]) == ["base", "rl"]
    assert (out / "evaluation/report.html").exists() and (out / "curves.png").exists()
    for folder in (out, out / "checkpoint-3"):
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (folder / "critic/value_head.safetensors").exists()
        assert (folder / "critic/model.safetensors").exists() == (critic == "separate")

    again = tmp_path / "again"
    run_in_process(monkeypatch, "ppo", "--config", out / "config.yaml", "--output_dir", again, "--evaluate", "false")
    for step in STEPS:
        assert (out / f"rollouts/{step}.jsonl").read_text() == (again / f"rollouts/{step}.jsonl").read_text()
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    head = "critic/value_head.safetensors"
    assert (out / head).read_bytes() == (again / head).read_bytes()

    # A further run starts from the critic of this one.
    later = tmp_path / "later"
    run_in_process(
        monkeypatch,
        "ppo",
        *arguments(task, later, "--critic", critic, "--critic_name_or_path", out, "--learning_rate", 0.0),
    )
    assert load_file(later / head).keys() == load_file(out / head).keys()
    assert all(torch.equal(x, load_file(out / head)[name]) for name, x in load_file(later / head).items())


EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "1"]


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_evaluation_during_training_changes_nothing_in_training(task, tmp_path, monkeypatch, recipe):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    run_in_process(monkeypatch, recipe, *arguments(task, plain))
    more = [*EVALUATED, "--eval_reward_funcs", f"{task}/rewards.py:early"]
    run_in_process(monkeypatch, recipe, *arguments(task, measured, *more))
    for step in STEPS:
        assert (plain / f"rollouts/{step}.jsonl").read_text() == (measured / f"rollouts/{step}.jsonl").read_text()
    for folder in (".", "checkpoint-2"):
        path = f"{folder}/model.safetensors"
        assert (plain / path).read_bytes() == (measured / path).read_bytes()
    kept = [{k: v for k, v in line.items() if k != "step_time"} for line in logged(plain)]
    assert kept == [{k: v for k, v in line.items() if k != "step_time"} for line in logged(measured)]
    evaluations = [line for line in read_lines(measured / "metrics.jsonl") if "eval_greedy/early" in line]
    assert [line["step"] for line in evaluations] == [1, 2, 3]
    assert {"eval_nll_per_token", "eval_greedy/letters", "eval_sample/reward"} <= evaluations[0].keys()
    assert not any("early" in name for line in logged(measured) for name in line)  # measured, never optimised


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_the_best_on_validation_is_kept_taken_and_named(task, tmp_path, monkeypatch, recipe, capsys):
    out = tmp_path / "run"
    more = [*EVALUATED, "--eval_reward_funcs", f"{task}/rewards.py:early", "--save_total_limit", 1, "--max_steps", 4]
    more += ["--learning_rate", 5e-2]
    run_in_process(monkeypatch, recipe, *arguments(task, out, *more, "--load_best_model_at_end", "true"))
    lines = read_lines(out / "metrics.jsonl")
    marks = [line["eval_greedy/early"] for line in lines if "eval_greedy/early" in line]
    assert len(marks) == 4 and len(set(marks)) > 1
    best = max(range(4), key=lambda i: marks[i]) + 1  # the first of equals: a later one has to be better
    assert (out / f"checkpoint-{best}").is_dir()
    message = capsys.readouterr().out.strip().splitlines()[-2]
    assert message == f"result: the best on validation, checkpoint-{best} (eval_greedy/early {max(marks):.4g})"
    assert (out / "model.safetensors").read_bytes() == (out / f"checkpoint-{best}/model.safetensors").read_bytes()
    if recipe == "ppo":
        head = "critic/value_head.safetensors"
        assert (out / head).read_bytes() == (out / f"checkpoint-{best}" / head).read_bytes()


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_the_last_step_is_said_to_be_the_last_and_the_best_is_spared(task, tmp_path, monkeypatch, recipe, capsys):
    out = tmp_path / "run"
    more = [*EVALUATED, "--metric_for_best_model", "sample/letters", "--save_total_limit", 1, "--max_steps", 4]
    run_in_process(monkeypatch, recipe, *arguments(task, out, *more))
    marks = [line["eval_sample/letters"] for line in read_lines(out / "metrics.jsonl") if "eval_sample/letters" in line]
    best = max(range(4), key=lambda i: marks[i]) + 1
    assert best != 4 and (out / f"checkpoint-{best}").is_dir()
    message = capsys.readouterr().out.strip().splitlines()[-2]
    kept = f"the best on validation is checkpoint-{best} (eval_sample/letters {max(marks):.4g})"
    assert message == f"result: the last step, 4; {kept}"
    unmeasured = tmp_path / "unmeasured"
    run_in_process(monkeypatch, recipe, *arguments(task, unmeasured, "--max_steps", 1))
    assert capsys.readouterr().out.strip().splitlines()[-2] == "result: the last step, 1"


@pytest.mark.parametrize("saving", [["--save_strategy", "no"], ["--save_steps", 4]], ids=str)
def test_a_run_whose_best_was_not_saved_ends_well_and_says_so(task, tmp_path, monkeypatch, capsys, saving):
    out = tmp_path / "run"
    more = [*EVALUATED, "--metric_for_best_model", "sample/letters", "--max_steps", 4, *saving]
    run_in_process(monkeypatch, "grpo", *arguments(task, out, *more))
    marks = [line["eval_sample/letters"] for line in read_lines(out / "metrics.jsonl") if "eval_sample/letters" in line]
    assert marks.index(max(marks)) < 3  # the first of equals is the best: of its step there is no checkpoint
    message = capsys.readouterr().out.strip().splitlines()[-2]
    best = f"the best on validation was not saved (eval_sample/letters {max(marks):.4g})"
    assert message == f"result: the last step, 4; {best}: evaluate where you save"


def test_a_wrong_critic_is_refused_before_a_model_loads(task, tmp_path, monkeypatch):
    recipe = load_recipe("ppo")
    monkeypatch.setattr(recipe, "load_model", lambda *_: pytest.fail("a model was loaded"))
    given = arguments(task, tmp_path / "run", "--critic_name_or_path", task / "modle")
    monkeypatch.setattr("sys.argv", ["recipes/ppo.py", *map(str, given)])
    with pytest.raises(ModelError, match="model"):
        recipe.main()
    assert not (tmp_path / "run").exists()


REFUSED = {
    "an objective of GRPO": ({"objective": "reference_exact"}, "objective is of recipes/grpo.py"),
    "a baseline of GRPO": ({"advantage_baseline": "batch"}, "advantage_baseline is of recipes/grpo.py"),
    "normalising within groups": ({"multi_objective_aggregation": "normalize_then_sum"}, "within groups"),
    "another estimator in the reward": ({"beta": 0.1, "kl_estimator": "k3"}, "in the reward the KL is k1"),
    "k1 in the loss": ({"beta": 0.1, "kl_estimator": "k1", "kl_in_reward": False}, "gradient zero"),
    "a target without a penalty": ({"kl_target": 1.0}, "give --beta"),
    "a target of a KL in the loss": ({"kl_target": 1.0, "beta": 0.1, "kl_in_reward": False}, "the KL penalty in the"),
    "a reference that moves": ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model moves the reference"),
    "a target of 0 nats": ({"kl_target": 0.0, "beta": 0.1}, "expected nats above 0"),
    "a limit of 0 nats": ({"target_kl": 0.0}, "expected nats above 0"),
    "gamma above 1": ({"gamma": 1.5}, "gamma is 1.5; expected 0 to 1"),
    "lambda below 0": ({"lam": -0.1}, "lam is -0.1; expected 0 to 1"),
    "a negative weight": ({"vf_coef": -1.0}, "vf_coef is -1.0; expected at least 0"),
    "a negative warm-up": ({"critic_warmup_steps": -1}, "critic_warmup_steps is -1"),
    "a negative penalty": (
        {"truncation_penalty": -1.0, "truncated_completions": "penalty"},
        "truncation_penalty is -1.0",
    ),
    "a penalty that nothing loses": ({"truncation_penalty": 2.0}, "no effect without truncated_completions penalty"),
    "truncation both left out and judged": (
        {"mask_truncated_completions": True, "truncated_completions": "bootstrap"},
        "give one of them",
    ),
    "a negative clip": ({"value_clip": -0.2}, "value_clip is -0.2; expected at least 0"),
    "a negative learning rate": ({"critic_learning_rate": -1e-3}, "critic_learning_rate is -0.001"),
    "a trunk that is not shared": ({"critic_trunk_gradient": True}, "no effect without critic shared"),
    "rounds that end within an update": (
        {"target_kl": 0.1, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        "no multiple of gradient_accumulation_steps",
    ),
    "a limit under loss scaling": ({"target_kl": 0.1, "fp16": True}, "fp16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_contradict_each_other_or_would_be_ignored_are_refused(tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        ppo_settings(tmp_path, **settings)


EPOCHS = ["--critic_warmup_steps", 2, "--num_iterations", 2, "--beta", 0.1, "--kl_target", 0.2]
SHARED = ["--critic", "shared", "--critic_warmup_steps", 1, "--target_kl", 100.0]


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [pytest.param(EPOCHS, 2, id="separate"), pytest.param(SHARED, 1, id="shared", marks=pytest.mark.soak)],
)
def test_two_processes_train_as_one_with_the_same_global_batch(task, tmp_path, monkeypatch, flags, warmup):
    common = ["--optim", "sgd", "--learning_rate", 0.3, "--num_generations", 1, "--max_steps", 4, *flags]
    common += ["--truncated_completions", "penalty", "--value_clip", 0.2, *EVALUATED]
    one, two = tmp_path / "one", tmp_path / "two"
    run_in_process(monkeypatch, "ppo", *arguments(task, one, *common))
    run_ranks(2, recipe("ppo", arguments(task, two, *common, "--per_device_train_batch_size", 4)), tmp_path / "log")
    assert "2 processes" in (tmp_path / "log").read_text()
    names = sorted(p.name for p in (one / "rollouts").iterdir())
    assert names == sorted(p.name for p in (two / "rollouts").iterdir())
    lengths = set()
    for name in names:
        logs = [{row["prompt_key"]: row for row in read_lines(run / "rollouts" / name)} for run in (one, two)]
        assert logs[0].keys() == logs[1].keys() and len(logs[0]) == 8
        for key, row in logs[0].items():
            assert logs[1][key]["completion"] == row["completion"]
            assert logs[1][key]["advantage"] == pytest.approx(row["advantage"], abs=1e-4)
            lengths.add(row["length"])
    assert len(lengths) > 2  # so the ranks' batches are of different widths
    start_weights = load_file(task / "model/model.safetensors")
    for step in range(1, 5):
        for path in ("model.safetensors", "critic/value_head.safetensors"):
            mine, theirs = (load_file(run / f"checkpoint-{step}" / path) for run in (one, two))
            assert mine.keys() == theirs.keys()
            for name in mine:
                torch.testing.assert_close(theirs[name], mine[name], atol=3e-5, rtol=0)
        moved = any(
            not torch.equal(x, start_weights[n])
            for n, x in load_file(two / f"checkpoint-{step}/model.safetensors").items()
        )
        assert moved == (step > warmup)
    for mine, theirs in zip(logged(one), logged(two), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # TRL means these over ranks or micro-batches, whatever their tokens; step_time is wall clock.
            if name not in ("step_time", "clip_ratio/low_min", "clip_ratio/high_max"):
                assert theirs[name] == (None if value is None else pytest.approx(value, abs=2e-4, rel=2e-4)), name
    evaluations = [
        [line["eval_greedy/letters"] for line in read_lines(run / "metrics.jsonl") if "eval_greedy/letters" in line]
        for run in (one, two)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-6) and len(evaluations[0]) == 4
