"""`recipes/dpo.py --from_rollouts`: pairs from a log by hand, and a run that shows both log-probs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_task import save_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from rlseq.errors import DataError
from rlseq.training.run.launch import run_recipe
from rlseq.training.selection.preferences import preference_pairs, require_pairs

ROOT = Path(__file__).parents[3]


def logged(completion, total, *, prompt="a = ", step=1, finish_reason="stop"):
    return {
        "step": step,
        "prompt_key": prompt,
        "prompt": prompt,
        "completion": completion,
        "total": total,
        "finish_reason": finish_reason,
    }


def texts(pairs):
    return [(chosen["completion"], rejected["completion"]) for chosen, rejected in pairs]


GROUP = [logged("A", 1.0), logged("B", 0.2), logged("C", 0.7), logged("D", 0.5), logged("A", 1.0)]


def test_the_best_is_paired_with_the_worst_and_the_second_best_with_the_second_worst():
    assert texts(preference_pairs(GROUP)) == [("A", "B")]
    assert texts(preference_pairs(GROUP, pairs_per_prompt=5)) == [("A", "B"), ("C", "D")]


def test_a_margin_leaves_pairs_out_and_ties_are_never_one():
    assert texts(preference_pairs(GROUP, pairs_per_prompt=5, min_margin=0.5)) == [("A", "B")]
    assert preference_pairs(GROUP, min_margin=0.9) == []
    assert preference_pairs([logged("A", 1.0), logged("B", 1.0)]) == []


def test_a_pair_is_of_one_prompt_and_one_step():
    apart = [logged("A", 1.0), logged("B", 0.0, step=2), logged("C", 0.0, prompt="b = ")]
    assert preference_pairs(apart) == []
    steps = [*GROUP, logged("E", 3.0, step=2), logged("F", 0.0, step=2)]
    assert texts(preference_pairs(steps)) == [("E", "F")]  # of both steps' pairs that with the larger margin


def test_what_was_cut_or_has_no_total_is_in_no_pair():
    group = [logged("A", 1.0), logged("B", 0.5), logged("C", 0.0, finish_reason="length"), logged("D", None)]
    assert texts(preference_pairs(group, pairs_per_prompt=5)) == [("A", "B")]


def test_a_log_without_pairs_is_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"2 rollouts make no pair.*lower --min_margin"):
        require_pairs([], [logged("A", 1.0), logged("B", 1.0)], 0.0)


# -- the recipe --------------------------------------------------------------------------------------------------------


def write_log(path, prompts="abcdefgh"):
    rows = [logged(text, total, prompt=f"{p} = ") for p in prompts for text, total in ((p.upper(), 1.0), ("I I", 0.0))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def arguments(tmp_path):
    save_model(tmp_path / "model")
    write_log(tmp_path / "run/rollouts/000001.jsonl")
    settings = {
        "model_name_or_path": tmp_path / "model",
        "from_rollouts": tmp_path / "run",
        "output_dir": tmp_path / "dpo",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "save_steps": 3,
        "use_cpu": "true",
        "num_cpu_threads": 1,
        "disable_tqdm": "true",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["recipes/dpo.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_recipe(importlib.import_module("rlseq.recipes.dpo").main)
    return ended.value.code


def metrics(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def sequence_logprob(folder, prompt, completion):
    """Of a completion with its end, by a plain forward."""
    tokenizer = tiny_tokenizer()
    before, after = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([before + after])).logits
    logprobs = logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(after)[:, None]).sum().item()


def test_a_run_logs_the_log_probs_of_chosen_and_rejected_and_parts_them(tmp_path, monkeypatch, arguments):
    more = ["--beta", 0.3, "--eval_from_rollouts", tmp_path / "run", "--eval_strategy", "steps", "--eval_steps", 6]
    assert run(monkeypatch, *arguments, *more) == 0
    lines = [line for line in metrics(tmp_path / "dpo") if "logps/chosen" in line]
    assert len(lines) == 6
    start = {p: sequence_logprob(tmp_path / "model", f"{p} = ", p.upper()) for p in "abcdefgh"}
    worst = {p: sequence_logprob(tmp_path / "model", f"{p} = ", "I I") for p in "abcdefgh"}
    assert lines[0]["logps/chosen"] == pytest.approx(sum(start.values()) / 8, rel=1e-3)
    assert lines[0]["logps/rejected"] == pytest.approx(sum(worst.values()) / 8, rel=1e-3)
    gaps = [line["logps/chosen"] - line["logps/rejected"] for line in lines]
    assert gaps[-1] > gaps[0] + 0.5
    assert any("eval_logps/rejected" in line for line in metrics(tmp_path / "dpo"))
    assert (tmp_path / "dpo/curves.png").is_file() and (tmp_path / "dpo/README.md").is_file()


def test_a_run_resumed_is_the_undisturbed_one(tmp_path, monkeypatch, arguments):
    assert run(monkeypatch, *arguments) == 0
    whole = (tmp_path / "dpo/model.safetensors").read_bytes()
    assert run(monkeypatch, *arguments, "--resume_from_checkpoint", "checkpoint-3") == 0
    assert (tmp_path / "dpo/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    "more, message",
    [
        (["--min_margin", 2], "16 rollouts make no pair"),
        (["--eval_strategy", "epoch"], "give --eval_from_rollouts"),
        (["--pairs_per_prompt", 0], "pairs_per_prompt is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_model_loads(
    tmp_path, monkeypatch, capsys, arguments, more, message
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(monkeypatch, *arguments, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dpo").exists()


def test_a_dry_run_says_how_many_pairs_there_are_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments, "--dry_run", "true", "--loss_type", "ipo") == 0
    said = capsys.readouterr().out
    assert "8 pairs of 8 prompts from 16 rollouts (margin 1 to 1, mean 1)" in said
    assert "reference model" in said
    assert not (tmp_path / "dpo").exists()
