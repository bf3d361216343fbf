"""The recipes of tasks (gsm8k, translation, code) as they lie in recipes/, end to end on tiny models of the same shape.

What the YAML files name (models of the hub, long runs) is overridden: model, steps, batch sizes and lengths alone.
"""

from __future__ import annotations

import json
import re

import pytest
import sacrebleu
import torch
import yaml
from safetensors.torch import load_file
from test_recipes import ROOT, read_lines, run_in_process
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlseq.data.rows import load_rows
from rlseq.errors import DataError
from rlseq.evaluation.aggregate import quality_metrics
from rlseq.scoring import load_rewards
from rlseq.types import Rollout

RECIPES = ROOT / "recipes"
SHARED = ROOT.parent / "shared" / "data" / "gsm8k"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Question, solution as GSM8K writes them; every answer is 3 or 4.
SUMS = [
    (f"{name} has {a} pens and finds {b}. How many now?", f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}")
    for name in ("Ann", "Bea", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Lea", "Max", "Ned")
    for a, b in ((1, 2), (2, 1), (1, 3), (2, 2), (3, 1))
]
SMALL = ("--max_steps", 2, "--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 1)
SMALL += ("--num_generations", 4, "--max_completion_length", 8, "--eval_rows", 3, "--samples_per_row", 1)
SMALL += ("--resamples", 100, "--disable_tqdm", "true", "--use_cpu", "true", "--bf16", "false")


def chatml_tokenizer(texts):
    """Byte-level BPE, digits by themselves, ended by <|im_end|>, as Qwen2.5 and SmolLM2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def save_model(folder, family, texts, likely=()):
    """A tiny random model and its tokenizer; tokens of the texts `likely` are sampled far more often than others."""
    tokenizer = chatml_tokenizer(texts)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = tiny_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0  # stands out in every position, so its column acts as a bias
        for token in {end, *(i for text in likely for i in tokenizer(text)["input_ids"])} if likely else ():
            model.lm_head.weight[token, 0] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_files(out, rows=3):
    """The rollouts of the second step, its metrics, and the results of the evaluation."""
    assert (out / "evaluation/report.html").stat().st_size > 10_000
    metrics = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in metrics] == [1, 2]
    results = json.loads((out / "evaluation/results.json").read_text())
    assert list(results["models"]) == ["base", "rl"] and results["rows"] == rows
    return read_lines(out / "rollouts/000002.jsonl"), metrics[1], results


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A folder with files of GSM8K's fields, which its task module reads."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in SUMS]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text(lines[0].replace("Ann", "Zoe"))
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    return folder


def value_of(spec, completion, **columns):
    """What a reward gives one completion."""
    rollout = Rollout("row", 0, (), (), (), completion, completion, None, "stop", "given")
    with load_rewards([spec]) as suite:
        ((value,),) = suite.score([rollout], {"prompt": ["?"], **{k: [v] for k, v in columns.items()}}).values.values()
    return value


CONFIGS = [
    ("grpo", "gsm8k/qwen2.5-0.5b.yaml"),
    ("grpo", "gsm8k/smollm2.yaml"),
    ("sft", "translation/sft.yaml"),
    ("grpo", "translation/grpo.yaml"),
    ("grpo", "code/grpo.yaml"),
]


def test_every_config_of_a_task_passes_all_checks_before_training(gsm8k, tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model", "llama", [text for pair in SUMS for text in pair])
    assert {config for _, config in CONFIGS} == {
        str(path.relative_to(RECIPES))
        for name in ("gsm8k", "translation", "code")
        for path in RECIPES.glob(f"{name}/*.yaml")
    }
    for recipe, config in CONFIGS:
        batch = ("--gradient_accumulation_steps", 1) if "gsm8k" in config else ()  # fewer rows here than there
        arguments = ("--config", RECIPES / config, "--model_name_or_path", model, "--output_dir", tmp_path / "run")
        run_in_process(monkeypatch, recipe, *arguments, "--dry_run", "--use_cpu", "true", "--bf16", "false", *batch)
        assert "steps" in capsys.readouterr().out, config
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "family"),
    [("qwen2.5-0.5b", "qwen2"), pytest.param("smollm2", "llama", marks=pytest.mark.soak)],
)
def test_gsm8k_trains_an_adapter_on_chat_and_reports(config, family, gsm8k, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", family, [text for pair in SUMS for text in pair], likely="34 ")
    out = tmp_path / "run"
    arguments = ("--config", RECIPES / f"gsm8k/{config}.yaml", "--model_name_or_path", model, "--output_dir", out)
    run_in_process(monkeypatch, "grpo", *arguments, *SMALL)
    rollouts, metrics, results = run_files(out)
    assert len(rollouts) == 16
    for row in rollouts:
        solution = row["references"][0]
        assert "<<" not in solution
        digits = re.findall(r"\d+", row["completion"])  # this model writes neither signs nor commas: by hand
        if set(row["completion"]) <= set("34 "):
            assert row["values"]["number_match"] == float(bool(digits) and digits[-1] == solution.split("#### ")[1])
        assert row["total"] == pytest.approx(row["values"]["number_match"] + 0.1 * row["values"]["format"])
    assert metrics["rewards/number_match/mean"] == pytest.approx(
        sum(row["values"]["number_match"] for row in rollouts) / 16
    )
    adapter = load_file(out / "adapter_model.safetensors")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16
    assert not (out / "model.safetensors").exists()
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)  # they start at 0
    assert {"number_match", "format"} <= results["models"]["rl"]["strategies"]["greedy"].keys()


@pytest.mark.soak
def test_translation_trains_on_chrf_from_what_teacher_forcing_left(tmp_path, monkeypatch):
    rows = [row for split in ("train", "validation") for row in load_rows(str(RECIPES / "translation/pairs"), split)]
    model = save_model(tmp_path / "model", "llama", [row[name] for row in rows for name in ("fr", "en")])
    start, out = tmp_path / "sft", tmp_path / "run"
    arguments = ("--model_name_or_path", model, "--output_dir", start, "--max_steps", 2, "--use_cpu", "true")
    run_in_process(monkeypatch, "sft", "--config", RECIPES / "translation/sft.yaml", *arguments, "--bf16", "false")
    arguments = ("--config", RECIPES / "translation/grpo.yaml", "--model_name_or_path", start, "--output_dir", out)
    run_in_process(monkeypatch, "grpo", *arguments, *SMALL)
    rollouts, metrics, results = run_files(out, rows=2)  # two of the three share their French
    english = {row["fr"]: [other["en"] for other in rows if other["fr"] == row["fr"]] for row in rows}
    for row in rollouts:
        french = re.fullmatch("French: (.*)\nEnglish:\n", row["prompt"])[1]
        assert row["references"] == english[french]
        expected = sacrebleu.sentence_chrf(row["completion"], english[french]).score / 100
        assert row["values"]["chrf"] == row["total"] == pytest.approx(expected)
    assert len({row["total"] for row in rollouts}) > 4
    assert metrics["reward"] == pytest.approx(sum(row["total"] for row in rollouts) / len(rollouts))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    measured = results["models"]["rl"]["strategies"]
    assert measured.keys() == {"greedy", "sample", "beam"}
    assert {"corpus_chrf", "corpus_bleu", "corpus_ter"} <= measured["greedy"].keys()


@pytest.mark.soak
def test_code_runs_the_tests_of_what_is_sampled_and_measures_hidden_ones(tmp_path, monkeypatch):
    rows = load_rows(str(RECIPES / "code/problems"), "train")
    texts = [text for row in rows for text in (row["prompt"][0]["content"], row["references"][0])]
    model = save_model(tmp_path / "model", "qwen2", texts, likely="1a")
    out = tmp_path / "run"
    arguments = ("--config", RECIPES / "code/grpo.yaml", "--model_name_or_path", model, "--output_dir", out)
    run_in_process(monkeypatch, "grpo", *arguments, *SMALL)
    rollouts, metrics, results = run_files(out)
    for row in rollouts:  # a few random tokens define no function
        assert row["status"] == {"python_tests": "ok"} and row["values"] == {"python_tests": 0.0}
    assert metrics["rewards/python_tests/mean"] == 0 and metrics["frac_reward_zero_std"] == 1
    assert (out / "adapter_model.safetensors").exists()
    assert {"python_tests", "hidden_tests"} <= results["models"]["rl"]["strategies"]["greedy"].keys()


def test_the_gsm8k_configs_of_two_families_have_the_same_rewards():
    qwen, smol = (yaml.safe_load((RECIPES / f"gsm8k/{name}.yaml").read_text()) for name in ("qwen2.5-0.5b", "smollm2"))
    assert all(qwen[name] == smol[name] for name in ("dataset_name", "reward_funcs", "num_generations", "primary"))


@pytest.mark.parametrize(
    ("ending", "value"),
    [
        ("\n#### 72", 1.0),
        ("\n#### $1,234.50\n", 1.0),
        ("\n#### -3", 1.0),
        ("\n#### 72 apples", 0.0),
        ("\n#### 72\nI hope this helps.", 0.0),
        (" #### 72", 0.0),
        ("\nThe answer is 72", 0.0),
    ],
)
def test_the_gsm8k_format_is_a_last_line_with_the_number_alone(ending, value):
    config = yaml.safe_load((RECIPES / "gsm8k/qwen2.5-0.5b.yaml").read_text())
    assert value_of(config["reward_funcs"][1], f"48 + 24 = 72{ending}") == value


def test_gsm8k_rows_are_chat_with_the_solution_as_reference_and_splits_by_question(gsm8k):
    task = str(RECIPES / "gsm8k/data.py")
    train, validation, test = (load_rows(task, split) for split in ("train", "validation", "test"))
    assert test[0]["prompt"] == [{"role": "user", "content": test[0]["prompt"][0]["content"]}]
    assert test[0]["prompt"][0]["content"].startswith("Zoe has 1 pens and finds 2. How many now?\n\nReason")
    assert test[0]["references"] == ["1 + 2 = 3\n#### 3"] and test[0]["answer"] == "3"
    questions = [[row["question"] for row in split] for split in (train, validation)]
    assert sorted(questions[0] + questions[1]) == sorted(question for question, _ in SUMS)
    assert len(validation) == 3 and not set(questions[0]) & set(questions[1])
    with pytest.raises(DataError, match="no split 'dev'"):
        load_rows(task, "dev")


def test_gsm8k_that_is_missing_or_of_other_fields_is_refused(gsm8k, tmp_path, monkeypatch):
    (gsm8k / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "?", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: .*'#### number'"):
        load_rows(str(RECIPES / "gsm8k/data.py"), "test")
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere/train\.jsonl; .* GSM8K_DIR"):
        load_rows(str(RECIPES / "gsm8k/data.py"), "train")


def test_gsm8k_as_published_is_read_whole(monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("GSM8K is not at ../shared/data/gsm8k")
    monkeypatch.setenv("GSM8K_DIR", str(SHARED))
    rows = {split: load_rows(str(RECIPES / "gsm8k/data.py"), split) for split in ("train", "validation", "test")}
    assert len(rows["train"]) + len(rows["validation"]) == 7473 and len(rows["test"]) == 1319
    assert 300 < len(rows["validation"]) < 450
    everything = [row for split in rows.values() for row in split]
    assert not any("<<" in row["references"][0] or ">>" in row["references"][0] for row in everything)
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", row["answer"]) for row in everything)


def test_the_bundled_problems_are_solved_by_their_references_and_by_nothing_else():
    for row in (row for split in ("train", "validation") for row in load_rows(str(RECIPES / "code/problems"), split)):
        tests = row["tests"] + row["hidden_tests"]
        assert value_of("python_tests", row["references"][0], tests=tests) == 1
        name = re.search(r"def (\w+)\(", row["references"][0])[1]
        assert f"`{name}(" in row["prompt"][0]["content"]
        assert value_of("python_tests", f"def {name}(*given):\n    return object()", tests=tests) == 0
        assert not set(row["tests"]) & set(row["hidden_tests"])


def test_no_bundled_sentence_is_in_two_splits():
    train, validation = (load_rows(str(RECIPES / "translation/pairs"), split) for split in ("train", "validation"))
    assert len(train) == 42 and len(validation) == 9
    for name in ("fr", "en"):
        assert not {row[name] for row in train} & {row[name] for row in validation}


def test_only_corpus_metrics_that_are_shares_are_shown_in_percent():
    with load_rewards(["chrf", "bleu", "ter"]) as suite:
        shown = {name: m.percent for name, m in quality_metrics(suite, with_references=True).items()}
    assert (
        shown["corpus_ter"] and not shown["corpus_chrf"] and not shown["corpus_bleu"]
    )  # those go to 100 by themselves
