"""`--max_memory_gb`: micro-batches are split until the reckoned memory suffices, and the run stays the same."""

from __future__ import annotations

import pytest
import yaml
from test_dry_run import lines, run, task  # noqa: F401
from tiny_task import ROWS, tiny_tokenizer

from rlseq.config.arguments import RolloutRunArguments
from rlseq.config.training import GRPOConfig, ModelArguments
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.training.plan import micro_batches

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


class Task:
    prompts: list


def split(task, tmp_path, monkeypatch, limit, peaks, **settings):  # noqa: F811
    """The sizes that a limit leaves of 8 completions a micro-batch, and what is said; peaks: bytes by completions."""
    monkeypatch.setattr(micro_batches, "_peak", lambda config, *_: peaks[config.per_device_train_batch_size])
    Task.prompts = build_prompts(ROWS, tiny_tokenizer())
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=2, use_cpu=True, **settings
    )
    run_args = RolloutRunArguments(max_memory_gb=limit)
    model_args = ModelArguments(model_name_or_path=str(task / "model"))
    said = micro_batches.split_micro_batches(config, run_args, model_args, Task)
    return [getattr(config, name) for name in SIZES], said, config.generation_batch_size


PEAKS = {8: 8e9, 4: 5e9, 2: 3e9, 1: 2e9}


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(None, [8, 1, 1]), (8, [8, 1, 1]), (7.9, [4, 2, 2]), (5, [4, 2, 2]), (3, [2, 4, 4]), (2.5, [1, 8, 8])],
)
def test_the_largest_micro_batch_that_fits_is_taken(limit, sizes, task, tmp_path, monkeypatch):  # noqa: F811
    found, said, sampled = split(task, tmp_path, monkeypatch, limit, PEAKS)
    assert found == sizes and sampled == 8  # completions that are sampled together
    assert bool(said) == (sizes[0] < 8)


@pytest.mark.parametrize(
    ("limit", "settings", "said"),
    [
        (1.9, {}, r"with one completion a micro-batch a process needs 2 GB"),
        (5, {"loss_type": "bnpo"}, r"changes a loss of type bnpo"),
    ],
)
def test_what_cannot_be_split_is_refused(limit, settings, said, task, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        split(task, tmp_path, monkeypatch, limit, PEAKS, **settings)


def test_a_run_in_less_memory_samples_and_learns_the_same(task, tmp_path, monkeypatch, capsys):  # noqa: F811
    given = ["--config", task / "grpo.yaml", "--max_steps", 3, "--max_completion_length", 60, "--reward_funcs"]
    given += ["bernoulli", "--per_device_train_batch_size", 8]  # rewards that differ within every group
    assert run(monkeypatch, "grpo", *given, "--output_dir", tmp_path / "a") == 0
    monkeypatch.setattr(micro_batches, "_peak", lambda config, *_: PEAKS[config.per_device_train_batch_size])
    assert run(monkeypatch, "grpo", *given, "--output_dir", tmp_path / "b", "--max_memory_gb", 3) == 0
    assert "micro-batches of " in capsys.readouterr().out
    kept = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert kept["gradient_accumulation_steps"] == kept["steps_per_generation"] == 4

    def sampled(name):
        rows = [row for path in sorted((tmp_path / name / "rollouts").glob("*.jsonl")) for row in lines(path)]
        return sorted((row["step"], row["prompt_key"], row["sample"], row["completion_ids"]) for row in rows)

    assert sampled("a") == sampled("b")
    for a, b in zip(lines(tmp_path / "a" / "metrics.jsonl")[:3], lines(tmp_path / "b" / "metrics.jsonl"), strict=False):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3) and a["grad_norm"] > 0
        assert b["reward"] == a["reward"]


def test_the_memory_that_is_compared_is_that_of_the_dry_run(task, tmp_path, monkeypatch, capsys):  # noqa: F811
    given = ["--config", task / "grpo.yaml", "--output_dir", tmp_path / "a", "--max_memory_gb"]
    assert run(monkeypatch, "grpo", *given, 0.001) == 2
    assert "--max_memory_gb is 0.001" in capsys.readouterr().err
    assert run(monkeypatch, "grpo", *given, 50, "--dry_run") == 0
    assert "micro-batches of" not in capsys.readouterr().out
