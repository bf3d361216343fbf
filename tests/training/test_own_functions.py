"""Advantages and policy losses by path: tried before a model loads, and trained with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_ppo import tiny_ppo
from tiny_task import tiny_trainer

from rlseq.config.training import GRPOConfig, PPOConfig
from rlseq.errors import ConfigError, TrainingError
from rlseq.training.run.inputs import changes, run_inputs
from rlseq.training.update.own_functions import OwnAdvantage, OwnPolicyLoss, check_own_functions

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
BUILT_IN = """
from rlseq.losses import clipped_surrogate, group_advantages

def advantage(rewards_PG):
    return group_advantages(rewards_PG, baseline="leave_one_out", scale="none")

def loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT):
    return clipped_surrogate(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.2)
"""


def written(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "my.py").write_text(text)
    return folder / "my.py"


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(trainer) -> torch.Tensor:
    start = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), start)
    return weights(trainer)


def spread(completion: str, prompt: str) -> float:
    """A reward that differs within every group."""
    return float(len(completion)) + 0.01 * sum(ord(c) * i for i, c in enumerate(completion, start=1))


def test_functions_equal_to_built_in_ones_train_bit_for_bit_as_these(tmp_path):
    file = written(tmp_path, BUILT_IN)
    settings = {"rewards": [spread], "num_iterations": 2, "max_steps": 4}
    of_flags = {"advantage_baseline": "leave_one_out", "scale_rewards": "none"}
    built_in = trained(tiny_trainer(tmp_path / "a", **settings, **of_flags))
    own = tiny_trainer(tmp_path / "b", **settings, advantage=f"{file}:advantage", policy_loss=f"{file}:loss")
    assert torch.equal(trained(own), built_in)
    other = trained(tiny_trainer(tmp_path / "c", **settings))
    assert not torch.equal(other, built_in)


def test_a_policy_loss_equal_to_ppo_s_trains_bit_for_bit_as_this(tmp_path):
    file = written(tmp_path, BUILT_IN)
    settings = {"num_iterations": 2, "max_steps": 4}
    built_in = trained(tiny_ppo(tmp_path / "a", **settings))
    assert torch.equal(trained(tiny_ppo(tmp_path / "b", **settings, policy_loss=f"{file}:loss")), built_in)


def test_the_example_of_the_page_by_hand(tmp_path):
    (example,) = re.findall(
        r"```python\n(import torch\n+def centred.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(list(filter(None, example.split("\n")))) == 5
    file = written(tmp_path, example)
    nan = float("nan")
    advantages = OwnAdvantage(f"{file}:centred").of(torch.tensor([[1.0, 2.0, 6.0], [nan, 1.0, 4.0], [nan, nan, nan]]))
    assert advantages.tolist() == [[-2.0, -1.0, 3.0], [0.0, -1.5, 1.5], [0.0, 0.0, 0.0]]
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = OwnPolicyLoss(f"{file}:reinforce").of(logprobs, logprobs.detach(), torch.tensor([2.0, -0.5]), mask)
    assert loss.tolist() == [[-2.0, -2.0], [0.5, 0.0]]  # −ratio·A with ratio 1, 0 where masked
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-2.0, -2.0], [0.5, 0.0]]  # of exp(l − old)·A: the same
    trained(tiny_trainer(tmp_path / "run", advantage=f"{file}:centred", policy_loss=f"{file}:reinforce"))


def test_advantages_of_the_user_s_are_what_rollouts_are_logged_with(tmp_path):
    file = written(tmp_path, "def f(rewards_PG):\n    return 10 * rewards_PG")
    trainer = tiny_trainer(
        tmp_path / "run", advantage=f"{file}:f", max_steps=1, num_generations=1, per_device_train_batch_size=8
    )
    trainer.train()
    (log,) = (tmp_path / "run" / "rollouts").glob("*.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({record["total"] for record in records}) > 1
    assert [r["advantage"] for r in records] == [pytest.approx(10 * r["total"]) for r in records]


REFUSED_ADVANTAGES = {
    "no such function": ("def g(r): return r", r"advantage: .*my.py:f' is not found: .*has no function 'f'"),
    "too many arguments": (
        "def f(r, scale): return r",
        r"cannot be called: missing .*'scale'; expected f\(rewards_PG\)",
    ),
    "another shape": ("def f(r): return r.nanmean(1)", r"returned float32 of shape \(4,\) for \(4, 4\)"),
    "no tensor": ("def f(r): return r.tolist()", "returned a list; expected a tensor"),
    "whole numbers": ("def f(r): return (r > 0).long()", r"returned int64 of shape"),
    "an abstention in the mean": ("def f(r): return r - r.mean(1, keepdim=True)", r"not finite .*\(nanmean"),
    "equal groups": ("def f(r): return (r - r.nanmean(1, True)) / (r - r.nanmean(1, True))", "not finite .* equal"),
    "in place": ("def f(r): return r.sub_(1).nan_to_num()", r"changes rewards_PG.*\.clone"),
    "random": ("import torch\ndef f(r): return torch.rand_like(r)", "other numbers .* randomness"),
    "an error": ("def f(r): return r @ r[:2]", r"raised RuntimeError on a small batch: .*f\(rewards_PG\), with shapes"),
    "no Python": ("def f(r) return r", "is not found"),
}
ARGUMENTS = "logprobs, old, advantages, mask"
REFUSED_LOSSES = {
    "one number": (
        f"def f({ARGUMENTS}): return -(logprobs * advantages).mean()",
        r"float32 of shape \(\) for \(3, 5\)",
    ),
    "no gradient": (f"def f({ARGUMENTS}): return -(logprobs.detach() * advantages)", "no gradient"),
    "a constant": (f"def f({ARGUMENTS}): return 0 * logprobs", "no gradient"),
    "a NaN gradient": (
        f"import torch\ndef f({ARGUMENTS}): return torch.where(mask, logprobs / mask, 0.0)",
        r"gradient that is not finite.*torch\.where",
    ),
    "infinite": (f"def f({ARGUMENTS}): return logprobs / (mask.float() - 1)", "not finite for a token"),
    "in place": (
        f"def f({ARGUMENTS}):\n    advantages.clamp_(0)\n    return -logprobs * advantages",
        "changes advantages",
    ),
    "three arguments": ("def f(logprobs, old, advantages): return logprobs", "too many positional .*mask_BT"),
}


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [pytest.param("advantage", *case, id=f"advantage: {name}") for name, case in REFUSED_ADVANTAGES.items()]
    + [pytest.param("policy_loss", *case, id=f"loss: {name}") for name, case in REFUSED_LOSSES.items()],
)
def test_what_cannot_be_an_advantage_or_a_loss_is_refused_in_one_line_that_names_the_file(
    tmp_path, setting, text, message
):
    file = written(tmp_path, text)
    config = GRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **{setting: f"{file}:f"})
    with pytest.raises(ConfigError, match=message) as error:
        check_own_functions(config)
    assert f"{setting}" in str(error.value) and str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_an_advantage_that_breaks_in_the_middle_of_a_run_ends_it(tmp_path):
    file = written(tmp_path, "def f(r): return r.nan_to_num() if len(r) == 4 and r.shape[1] == 4 else r[:1]")
    own = OwnAdvantage(f"{file}:f")
    with pytest.raises(TrainingError, match=r"returned float32 of shape \(1, 4\) for \(3, 4\)"):
        own.of(torch.zeros(3, 4))


CONFLICTS = {
    "scale": ({"advantage": "a.py:f", "scale_rewards": "none"}, "advantage takes the place of"),
    "baseline": ({"advantage": "a.py:f", "advantage_baseline": "batch"}, "advantage takes the place of"),
    "aggregation": (
        {"advantage": "a.py:f", "multi_objective_aggregation": "normalize_then_sum"},
        "advantage takes the place of",
    ),
    "objective": (
        {"advantage": "a.py:f", "objective": "minimum_risk"},
        "advantage is a.py:f, which has no effect without objective policy_gradient",
    ),
    "loss of another objective": ({"policy_loss": "a.py:f", "objective": "reference_exact"}, "policy_loss is a.py:f"),
    "loss type": ({"policy_loss": "a.py:f", "loss_type": "cispo"}, "loss_type cispo is a loss of its own"),
    "clip": ({"policy_loss": "a.py:f", "epsilon_high": 0.28}, "epsilon_high is 0.28, which has no effect"),
    "ratio": ({"policy_loss": "a.py:f", "importance_sampling_level": "sequence"}, "importance_sampling_level is"),
}


@pytest.mark.parametrize(("settings", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_settings_that_would_have_no_effect_beside_them_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_ppo_has_advantages_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"advantage is of recipes/grpo\.py"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, advantage="a.py:f")


def test_a_run_records_the_code_of_its_functions(tmp_path):
    file = written(tmp_path / "a", BUILT_IN)
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, advantage=f"{file}:advantage")
    before = run_inputs({}, {}, config.named_functions)
    written(tmp_path / "a", BUILT_IN.replace('"none"', '"batch"'))
    assert changes(before, run_inputs({}, {}, config.named_functions)) == [f"function '{file}:advantage': code"]


def test_the_recipe_refuses_in_one_line_and_its_dry_run_names_the_functions(tmp_path):
    file = written(tmp_path, BUILT_IN)

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "recipes/grpo.py", "--config", "recipes/g2p/grpo.yaml", "--dry_run", "true"]
        command += ["--output_dir", str(tmp_path / "run"), "--train_rows", "64", "--eval_rows", "8", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    found = run("--advantage", f"{file}:nothing")
    assert found.returncode == 2
    (line,) = found.stderr.strip().splitlines()[-1:]
    assert f"{file} has no function 'nothing'" in line and "Traceback" not in found.stderr
    found = run("--advantage", f"{file}:advantage", "--policy_loss", f"{file}:loss", "--scale_rewards", "group")
    assert found.returncode == 0, found.stderr
    assert f"advantage {file}:advantage: tried on a small batch" in found.stdout
    assert f"policy_loss {file}:loss: tried on a small batch" in found.stdout
