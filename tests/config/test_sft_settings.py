"""Teacher forcing: settings and data that would train nothing, or less than was asked for, are said before training."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from test_dry_run import lines, run
from tiny import EOS
from tiny_task import ROWS, save_model, tiny_tokenizer, write_data, write_rows
from transformers import AutoModelForCausalLM

from rlseq.config.training import SFTConfig
from rlseq.errors import ConfigError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Models with rotary positions and with 64 that are learnt, data of 8 rows of at most 8 tokens, and settings."""
    folder = tmp_path_factory.mktemp("sft")
    for family in ("llama", "gpt2"):
        save_model(folder / family, family)
    write_data(folder / "data")
    config = {
        "model_name_or_path": str(folder / "llama"),
        "dataset_name": str(folder / "data"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "num_cpu_threads": 1,
        "disable_tqdm": True,
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


SAMPLE = ["--rejection_samples", 2, "--reward_funcs", "exact_match"]
REFUSED = {
    "a patience without evaluations": (["--early_stopping_patience", 1], "eval_strategy is no and save_strategy steps"),
    "a patience whose best is not saved": (
        ["--early_stopping_patience", 1, "--eval_strategy", "epoch", "--save_strategy", "no"],
        "eval_strategy is epoch and save_strategy no",
    ),
    "a measure that is not there": (
        ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--metric_for_best_model", "eval_lss"],
        "metric_for_best_model is 'lss', which is not measured. Did you mean 'loss'?",
    ),
    "a limit that leaves nothing": (["--max_length", 1], "leaves 8 of them out"),
    "a batch that is larger than the data": (
        ["--per_device_train_batch_size", 9, "--dataloader_drop_last", "true"],
        "8 training examples are fewer than a batch of 9",
    ),
    "samples that are longer than the model": (
        ["--model_name_or_path", "{task}/gpt2", *SAMPLE, "--max_new_tokens", 61],
        "lower max_new_tokens to 60",
    ),
}


NEW = {
    "a misspelt value": ({"model_type": "llama", "hidden_sise": 16}, "new_model.hidden_sise is no value"),
    "values that do not go together": (
        {"model_type": "llama", "hidden_size": 15, "num_attention_heads": 4},
        "new_model makes no 'llama'",
    ),
    "no mapping": ("llama", "new_model is 'llama'; expected a mapping"),
    "no room for the data": (
        {"model_type": "gpt2", "n_positions": 4, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "some have no room to answer",
    ),
}


@pytest.mark.parametrize("case", NEW)
def test_a_new_model_that_cannot_be_is_refused(case, task, tmp_path, monkeypatch, capsys):
    values, named = NEW[case]
    settings = yaml.safe_load((task / "sft.yaml").read_text())
    settings |= {"new_tokenizer": settings.pop("model_name_or_path"), "new_model": values}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", tmp_path / "new.yaml", "--output_dir", tmp_path / "run"]
    assert run(monkeypatch, "sft", *arguments) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_reward_that_needs_references_is_tried_on_a_row_without_before_sampling(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text("def own(completion, references):\n    return float(len(references[0]))\n")
    write_data(tmp_path / "data", [*ROWS, {"prompt": "a b = ", "references": []}])
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path / "data"]
    arguments += ["--rejection_samples", 2, "--reward_funcs", f"{tmp_path}/own.py:own"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(monkeypatch, "sft", *arguments) == 2
    assert "IndexError" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_nothing_is_refused_before_a_model_loads(case, dry, task, tmp_path, monkeypatch, capsys):
    flags, named = REFUSED[case]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    given = [str(flag).format(task=task) for flag in flags]
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--dry_run", str(dry).lower()]
    assert run(monkeypatch, "sft", *arguments, *given) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and named in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_samples_that_just_fit_are_taken(task, tmp_path, monkeypatch):
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", *SAMPLE]
    arguments += ["--model_name_or_path", task / "gpt2", "--max_new_tokens", 60]
    run(monkeypatch, "sft", *arguments)
    assert len(lines(tmp_path / "run/rollouts/000000.jsonl")) == 16


def test_a_dry_run_counts_the_cache_of_the_samples(task, tmp_path, monkeypatch, capsys):
    """8 prompts of at most 4 tokens, 2 samples of at most 12; keys and values of 2 layers, 1 head of 8: 32 numbers."""
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", *SAMPLE, "--dry_run", "true"]
    assert run(monkeypatch, "sft", *arguments, "--max_new_tokens", 12) == 0
    assert "256 tokens × 32 numbers × 4 bytes" in capsys.readouterr().out
    assert run(monkeypatch, "sft", *arguments[:4], "--dry_run", "true") == 0
    assert "KV cache" not in capsys.readouterr().out


def test_references_that_are_too_long_name_no_setting_that_is_not_there(task, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": "a = ", "references": [" ".join("A" * 63)]}] * 4)
    write_rows(tmp_path / "data" / "validation.jsonl", ROWS)
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path / "data"]
    assert run(monkeypatch, "sft", *arguments, "--model_name_or_path", task / "gpt2") == 2
    message = capsys.readouterr().err
    assert "To do: shorten the prompts or the references" in message and "max_completion_length" not in message


def test_a_cut_is_said(task, tmp_path, monkeypatch, capsys):
    """Of n letters an example has 2n + 2 tokens (= and <eos>): 4 for one, 6 for two, 8 for three; 2, 3 and 3 rows."""
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--max_steps", 1]
    assert run(monkeypatch, "sft", *arguments, "--max_length", 8) == 0
    assert "max_length" not in capsys.readouterr().out
    assert run(monkeypatch, "sft", *arguments, "--max_length", 5, "--overwrite_output_dir") == 0
    assert "cuts the end off 6 of 8 training examples (the longest has 8 tokens)." in capsys.readouterr().out


def test_a_cut_says_what_is_left_out(task, tmp_path, monkeypatch, capsys):
    """A prompt of three letters has 4 tokens: nothing of its completion is within 4, and TRL drops the row."""
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--max_length", 4, "--eval_strategy"]
    assert run(monkeypatch, "sft", *arguments, "epoch") == 0
    out = capsys.readouterr().out
    for name in ("training", "validation"):
        assert f"cuts the end off 6 of 8 {name} examples (the longest has 8 tokens), and leaves 3 of them out" in out
    steps = [line["step"] for line in lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2]  # of 5 rows, not of 8


def test_a_patience_keeps_the_best_checkpoint(task, tmp_path, monkeypatch, capsys):
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--early_stopping_patience", 2]
    arguments += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--num_train_epochs", 40]
    assert run(monkeypatch, "sft", *arguments, "--learning_rate", 0.3) == 0
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "run/metrics.jsonl") if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 4  # two epochs of two steps without a better one
    assert f"result: the best on validation, checkpoint-{best} " in capsys.readouterr().out
    kept, result = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder).state_dict()
        for folder in (f"checkpoint-{best}", "")
    )
    assert all(kept[name].equal(result[name]) for name in kept)
    state = json.loads((tmp_path / f"run/checkpoint-{max(losses)}/trainer_state.json").read_text())
    assert state["best_global_step"] == best


def test_a_patience_below_1_is_refused():
    with pytest.raises(ConfigError, match="early_stopping_patience is 0; expected at least 1"):
        SFTConfig(early_stopping_patience=0, eval_strategy="epoch", save_strategy="epoch")


@pytest.mark.parametrize("size", [1, 3])
def test_the_validation_loss_is_the_mean_over_all_tokens_whatever_the_batch(size, task, tmp_path, monkeypatch):
    arguments = ["--config", task / "sft.yaml", "--output_dir", tmp_path / "run", "--max_steps", 1]
    arguments += ["--learning_rate", 0, "--eval_strategy", "steps", "--eval_steps", 1]
    assert run(monkeypatch, "sft", *arguments, "--per_device_eval_batch_size", size) == 0
    (found,) = (line["eval_loss"] for line in lines(tmp_path / "run/metrics.jsonl") if "eval_loss" in line)
    model, nats, tokens = AutoModelForCausalLM.from_pretrained(task / "llama"), 0.0, 0
    for row in ROWS:
        prompt, answer = (tiny_tokenizer()(text=text)["input_ids"] for text in (row["prompt"], row["references"][0]))
        answer.append(EOS)
        with torch.no_grad():
            table = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nats -= sum(table[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
        tokens += len(answer)
    assert found == pytest.approx(nats / tokens, rel=1e-6)


def test_a_patience_counts_on_where_a_run_is_resumed(task, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = ["--config", task / "sft.yaml", "--output_dir", out, "--early_stopping_patience", 3]
    arguments += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--num_train_epochs", 60]
    arguments += ["--learning_rate", 0.3, "--lr_scheduler_type", "constant"]
    assert run(monkeypatch, "sft", *arguments) == 0
    metrics = [line for line in lines(out / "metrics.jsonl") if "eval_loss" in line]
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    last = metrics[-1]["step"]
    best = min(metrics, key=lambda line: line["eval_loss"])["step"]
    assert last == best + 6 < 120  # three epochs of two steps, of which two are left after the first without a better
    for start in (best + 2, last):
        checkpoint = out / f"checkpoint-{start}"
        assert run(monkeypatch, "sft", *arguments, "--resume_from_checkpoint", checkpoint) == 0
        again = [line for line in lines(out / "metrics.jsonl") if "eval_loss" in line]
        assert [(m["step"], m["eval_loss"]) for m in again] == [(m["step"], m["eval_loss"]) for m in metrics]
        assert all(weights[name].equal(w) for name, w in AutoModelForCausalLM.from_pretrained(out).state_dict().items())
