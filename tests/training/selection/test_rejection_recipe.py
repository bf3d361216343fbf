"""`recipes/sft.py` on a model's own best completions, from a log or sampled by the recipe."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forks import recipe, run_ranks
from test_data import CHAT_TEMPLATE, word_tokenizer
from test_rejection import record, write_lines
from tiny import EOS
from tiny_task import ROWS, VOCABULARY, save_model, tiny_tokenizer, write_data, write_task
from transformers import AutoModelForCausalLM

from rlseq.cli import show
from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError, RewardError, RlseqError

ROOT = Path(__file__).parents[3]


def share_of_a(completion: str) -> float | None:
    """The reward of the tests; abstains from what is empty."""
    words = completion.split()
    return words.count("A") / len(words) if words else None


REWARD = """
def share_of_a(completion):
    words = completion.split()
    return words.count("A") / len(words) if words else None
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejection")
    write_task(folder)
    (folder / "rewards.py").write_text(REWARD)
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_sft(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", *map(str, arguments)])
    importlib.import_module("rlseq.recipes.sft").main()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def greedy(model, ids, limit=8):
    ids, start = list(ids), len(ids)
    while len(ids) < start + limit and (len(ids) == start or ids[-1] != EOS):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_training_on_a_log_teaches_its_best_completions_and_validates_on_references(task, tmp_path, monkeypatch):
    log = []
    for row in ROWS:  # the best of each prompt is its letters backwards
        backwards = " ".join(reversed(row["references"][0].split()))
        log += [
            record(row["prompt"], "I H G", 0.2),
            record(row["prompt"], backwards, 0.8),
            record(row["prompt"], "F F F F", 5.0, finish_reason="length"),
        ]
    write_lines(tmp_path / "earlier/rollouts/000007.jsonl", log)
    common = ["--config", task / "sft.yaml", "--from_rollouts", tmp_path / "earlier"]
    run_sft(monkeypatch, *common, "--output_dir", tmp_path / "run", "--max_steps", 150)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for row in ROWS:
        wanted = [VOCABULARY.index(word) for word in reversed(row["references"][0].split())]
        assert greedy(model, [VOCABULARY.index(word) for word in row["prompt"].split()]) == [*wanted, EOS]
    assert not (tmp_path / "run/rollouts").exists()

    # Without learning, the validation loss is the references' NLL per token under the start.
    still = [*common, "--output_dir", tmp_path / "still", "--learning_rate", 0, "--eval_strategy", "steps"]
    run_sft(monkeypatch, *still, "--eval_steps", 1)
    (loss,) = (line["eval_loss"] for line in read_lines(tmp_path / "still/metrics.jsonl") if "eval_loss" in line)
    start = AutoModelForCausalLM.from_pretrained(task / "model")
    nats = tokens = 0
    for row in ROWS:
        prompt = [VOCABULARY.index(word) for word in row["prompt"].split()]
        answer = [*(VOCABULARY.index(word) for word in row["references"][0].split()), EOS]
        with torch.no_grad():
            table = start(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nats -= sum(table[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
        tokens += len(answer)
    assert loss == pytest.approx(nats / tokens, rel=1e-4)


SAMPLE = ["--rejection_samples", 6, "--max_new_tokens", 12]


def test_samples_of_the_recipe_are_logged_chosen_and_learnt(task, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    sampling = ["--rejection_samples", 32, "--max_new_tokens", 12, "--rejection_keep", 2]
    sampling += ["--reward_funcs", f"{task}/rewards.py:share_of_a", "--min_reward", 0.1]
    run_sft(monkeypatch, "--config", task / "sft.yaml", *sampling, "--output_dir", out, "--seed", 5, "--max_steps", 60)
    tokenizer = tiny_tokenizer()
    start = AutoModelForCausalLM.from_pretrained(task / "model")
    prompts = build_prompts(ROWS, tokenizer)
    groups = sample(
        start,
        prompts,
        num_samples=32,
        max_new_tokens=12,
        strategy=Sample(),
        seed=5,
        stop_ids=[EOS],
        tokenizer=tokenizer,
    )
    logged = read_lines(out / "rollouts/000000.jsonl")
    assert [(r["prompt"], r["sample"], r["completion"]) for r in logged] == [
        (prompt.prompt, i, rollout.text)
        for prompt, group in zip(prompts, groups, strict=True)
        for i, rollout in enumerate(group)
    ]
    assert [r["total"] for r in logged] == [share_of_a(r["completion"]) for r in logged]
    assert {r["step"] for r in logged} == {0} and {r["advantage"] for r in logged} == {None}

    chosen = []
    for group in groups:  # the two best of the prompt, by brute force
        texts = dict.fromkeys(r.text for r in group if r.finish_reason == "stop")
        good = sorted((t for t in texts if (share_of_a(t) or 0) >= 0.1), key=share_of_a, reverse=True)
        chosen += [share_of_a(text) for text in good[:2]]
    assert 2 < len(chosen) < 16  # else nothing was chosen
    mean = sum(chosen) / len(chosen)
    assert f"trains on the best {len(chosen)} of 256 samples (mean total {mean:.4g})" in capsys.readouterr().out

    learnt = AutoModelForCausalLM.from_pretrained(out)
    shares = []
    for prompt in prompts:
        words = [VOCABULARY[i] for i in greedy(learnt, prompt.prompt_ids, 12) if i != EOS]
        shares.append(words.count("A") / max(1, len(words)))
    everything = [share_of_a(r.text) or 0.0 for group in groups for r in group]
    assert sum(shares) / len(shares) > 2 * sum(everything) / len(everything)

    assert show.load_step(out) == logged
    assert show.run(show_arguments(out)) == 0
    assert "256 rollouts of 8 prompts" in capsys.readouterr().out


def show_arguments(run_directory):
    import argparse

    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return parser.parse_args([str(run_directory)])


def test_config_yaml_repeats_the_samples_and_a_run_that_goes_on_trains_on_those_it_sampled(task, tmp_path, monkeypatch):
    out = tmp_path / "run"
    common = ["--config", task / "sft.yaml", *SAMPLE, "--reward_funcs", f"{task}/rewards.py:share_of_a"]
    common += ["--output_dir", out, "--save_strategy", "steps", "--save_steps", 1]
    run_sft(monkeypatch, *common)
    before = (out / "rollouts/000000.jsonl").read_text()
    run_sft(monkeypatch, "--config", out / "config.yaml", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again/rollouts/000000.jsonl").read_text() == before
    import rlseq.training.selection.rejection as module

    monkeypatch.setattr(module, "sample", lambda *_, **__: pytest.fail("completions were sampled again"))
    run_sft(monkeypatch, *common, "--max_steps", 2, "--resume_from_checkpoint", "latest")
    assert (out / "rollouts/000000.jsonl").read_text() == before
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "loss" in line] == [1, 2]


def test_chat_prompts_work_from_both_sources(task, tmp_path, monkeypatch):
    model = tmp_path / "model"
    save_model(model, tokenizer=word_tokenizer(CHAT_TEMPLATE))
    rows = [{"prompt": [{"role": "user", "content": word}], "references": [word.upper()]} for word in ("a b", "c", "d")]
    write_data(tmp_path / "data", rows)
    common = ["--config", task / "sft.yaml", "--model_name_or_path", model, "--dataset_name", tmp_path / "data"]
    common += ["--max_steps", 80]
    write_lines(tmp_path / "log.jsonl", [record(row["prompt"], "F E", 1.0, prompt_key=i) for i, row in enumerate(rows)])
    run_sft(monkeypatch, *common, "--from_rollouts", tmp_path / "log.jsonl", "--output_dir", tmp_path / "logged")
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    learnt = AutoModelForCausalLM.from_pretrained(tmp_path / "logged")
    (prompt, *_) = build_prompts(rows, tokenizer)
    assert tokenizer.decode(greedy(learnt, prompt.prompt_ids)[:3]) == "F E <eos>"

    sampling = [
        "--rejection_samples",
        4,
        "--max_new_tokens",
        12,
        "--reward_funcs",
        f"{task}/rewards.py:share_of_a",
    ]
    run_sft(monkeypatch, *common, *sampling, "--output_dir", tmp_path / "sampled", "--max_steps", 1)
    logged = read_lines(tmp_path / "sampled/rollouts/000000.jsonl")
    assert [r["prompt"] for r in logged] == [row["prompt"] for row in rows for _ in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from_rollouts", "{log}", "--rejection_samples", "2"], "give one of them"),
        (["--rejection_samples", "2"], "needs --reward_funcs"),
        (["--reward_funcs", "exact_match"], "and nothing else here"),
        (["--from_rollouts", "{log}", "--reward_funcs", "exact_match"], "rlseq reward score"),
        (["--rejection_samples", "2", "--reward_funcs", "exact_mach"], "exact_match"),
        (["--from_rollouts", "{log}", "--min_reward", "3"], "The best total seen is 1.5"),
        (["--from_rollouts", "{log}e"], "has no rollouts"),
        (
            ["--rejection_samples", "2", "--reward_funcs", "exact_match", "--reward_weights", "1", "2"],
            "2 numbers for 1",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(task, tmp_path, monkeypatch, arguments, message):
    log = write_lines(tmp_path / "log.jsonl", [record("p", "a", 1.5)])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    given = [argument.format(log=log) for argument in arguments]
    with pytest.raises(RlseqError, match=message):
        run_sft(monkeypatch, "--config", task / "sft.yaml", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_teacher_forcing_leaves_out_are_counted(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [*ROWS, *[{**row, "references": []} for row in ROWS[:3]]])
    write_lines(tmp_path / "data" / "validation.jsonl", ROWS)
    given = ["--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "run"]
    run_sft(monkeypatch, "--config", task / "sft.yaml", *given)
    out, count = capsys.readouterr().out, len(ROWS)
    assert f"rlseq: warning: 3 of {count + 3} train rows are left out: they have no reference" in out
    assert f"{count} training examples and {count} validation examples" in out and out.count("left out") == 1


def test_a_reward_is_tried_on_the_row_that_lacks_what_it_asks_for(task, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [*ROWS, {**ROWS[0], "references": []}])
    write_lines(tmp_path / "data" / "validation.jsonl", ROWS)
    given = [*SAMPLE, "--reward_funcs", "exact_match", "--dataset_name", tmp_path / "data"]
    with pytest.raises(RewardError, match=f"^tried on row {len(ROWS) + 1} of .*nothing in 'references'"):
        run_sft(monkeypatch, "--config", task / "sft.yaml", *given, "--output_dir", tmp_path / "run")


def test_sampling_needs_a_model_that_exists(task, tmp_path, monkeypatch):
    config = yaml.safe_load((task / "sft.yaml").read_text()) | {"new_model": {"model_type": "llama"}}
    config |= {"new_tokenizer": config.pop("model_name_or_path")}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="--model_name_or_path"):
        run_sft(monkeypatch, "--config", tmp_path / "new.yaml", *SAMPLE, "--reward_funcs", "exact_match")


def test_two_processes_sample_what_one_samples(task, tmp_path, monkeypatch):
    common = ["--config", task / "sft.yaml", *SAMPLE, "--reward_funcs", f"{task}/rewards.py:share_of_a"]
    run_sft(monkeypatch, *common, "--output_dir", tmp_path / "one")
    halved = ["--output_dir", tmp_path / "two", "--per_device_train_batch_size", 4]
    run_ranks(2, recipe("sft", [*common, *halved]), tmp_path / "log")
    assert "2 processes" in (tmp_path / "log").read_text()
    one, two = (read_lines(tmp_path / name / "rollouts/000000.jsonl") for name in ("one", "two"))
    assert len(one) == 48
    for a, b in zip(one, two, strict=True):
        assert math.isclose(a.pop("logprob"), b.pop("logprob"), abs_tol=1e-4)
        for x, y in zip(a.pop("logprobs"), b.pop("logprobs"), strict=True):
            assert math.isclose(x, y, abs_tol=1e-4)
        assert a == b
    losses = [
        [line["loss"] for line in read_lines(tmp_path / n / "metrics.jsonl") if "loss" in line] for n in ("one", "two")
    ]
    assert len(losses[0]) == len(losses[1]) == 1


ANSWERS = """
def answered(answer):
    return float(len(answer))


def by_hand(completion):
    return float(len(completion.partition("A")[2].lstrip()))
"""


def test_samples_are_chosen_by_the_answer_behind_their_thought(task, tmp_path, monkeypatch):
    (tmp_path / "answers.py").write_text(ANSWERS)
    totals = []
    for name, more in (("answered", ["--think_end", "A"]), ("by_hand", [])):
        given = ["--config", task / "sft.yaml", "--rejection_samples", "4", "--max_new_tokens", "6", *more]
        run_sft(monkeypatch, *given, "--reward_funcs", f"{tmp_path}/answers.py:{name}", "--output_dir", tmp_path / name)
        totals.append([record["total"] for record in read_lines(tmp_path / name / "rollouts/000000.jsonl")])
    assert totals[0] == totals[1]
    assert len(set(totals[0])) > 1
