"""`--dry_run`: its sizes are those of the run that follows, it writes nothing, and it refuses what a run would."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from tiny_shapes import tiny_shape
from tiny_task import ROWS, tiny_tokenizer, write_rows, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlseq.common.disk import readable_size
from rlseq.config.training import GRPOConfig, ModelArguments
from rlseq.data.prompts import build_prompts
from rlseq.engine.model.load import load_model
from rlseq.training.plan.dry_run import count_checkpoints, plan_rollouts, update_tokens
from rlseq.training.plan.memory import critic_parameters, memory, size_of, weightless_model
from rlseq.training.run.launch import run_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model of 0.2 million parameters, so that a checkpoint is more than its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("task")
    wide = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 48}
    write_task(folder, **wide)
    write_rows(folder / "bare" / "train.jsonl", ROWS)
    write_rows(folder / "bare" / "validation.jsonl", [{"prompt": row["prompt"], "references": []} for row in ROWS])
    write_rows(folder / "images" / "train.jsonl", [ROWS[0], {**ROWS[1], "image": "x.png"}])
    write_rows(folder / "images" / "validation.jsonl", ROWS)
    tiny_shape("mamba2").save_pretrained(folder / "states")
    tiny_tokenizer().save_pretrained(folder / "states")
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "save_steps": 2,
        "use_cpu": True,
        "num_cpu_threads": 1,
        "disable_tqdm": True,
    }
    rollouts = {"reward_funcs": ["exact_match"], "max_completion_length": 6, "evaluate": False}
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    (folder / "ppo.yaml").write_text(yaml.safe_dump({**config, **rollouts}))
    (folder / "grpo.yaml").write_text(yaml.safe_dump({**config, **rollouts, "num_generations": 2}))
    return folder


def run(monkeypatch, name, *arguments):
    """Run a recipe as its process does; its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_recipe(importlib.import_module(f"rlseq.recipes.{name}").main)
    return ended.value.code


def table(text):
    """The first number of each line of the table, and the bytes of those that are sizes, by name."""
    found = {}
    for name, number, unit in re.findall(r"(?m)^  (\S.*?)  +([\d,.]+(?:e[+-]\d+)?)(?: (kB|MB|GB))?(?:  |$)", text):
        found[name] = float(number.replace(",", "")) * {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


CASES = {
    "grpo": ("grpo", []),
    "grpo over the end of an epoch": ("grpo", ["--gradient_accumulation_steps", 3, "--steps_per_generation", 3]),
    "grpo, two updates on each batch": ("grpo", ["--num_iterations", 2, "--ema_decay", 0.9]),
    "grpo, an adapter": ("grpo", ["--use_peft", "true", "--lora_r", 64, "--lora_target_modules", "q_proj", "up_proj"]),
    "grpo by epochs": ("grpo", ["--max_steps", -1, "--num_train_epochs", 1.5, "--save_total_limit", 1]),
    "ppo": ("ppo", ["--steps_per_generation", 2]),
    "ppo, shared": ("ppo", ["--critic", "shared", "--beta", 0.1]),
    "sft": ("sft", ["--gradient_accumulation_steps", 3, "--save_total_limit", 2]),
    "sft by epochs": ("sft", ["--max_steps", -1, "--num_train_epochs", 2, "--save_strategy", "epoch"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sizes_are_those_of_the_run(case, task, tmp_path, monkeypatch, capsys):
    name, flags = CASES[case]
    out = tmp_path / "run"
    arguments = ["--config", task / f"{name}.yaml", "--output_dir", out, *flags]
    assert run(monkeypatch, name, *arguments, "--dry_run", "true") == 0
    planned = table(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert run(monkeypatch, name, *arguments) == 0
    metrics = [line for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert metrics[-1]["step"] == planned["optimizer steps"] == len(metrics)
    assert metrics[-1]["epoch"] == pytest.approx(planned["epochs over the data"], abs=0.01)
    rollouts = [lines(file) for file in sorted((out / "rollouts").glob("*.jsonl"))]
    assert sum(map(len, rollouts)) == planned["rollouts in all"]
    if rollouts:
        assert {len(file) for file in rollouts} == {planned["generations per process"]}
        longest = max(len(prompt.prompt_ids) for prompt in build_prompts(ROWS, tiny_tokenizer())) + 6
        assert planned["tokens per step"] == planned["rollouts per step"] * longest
    # Beside weights and optimizer a checkpoint holds tokenizer, settings and state: 3% here, and 3 digits are printed.
    checkpoints = list(out.glob("checkpoint-*"))
    written = sum(file.stat().st_size for c in checkpoints for file in c.rglob("*") if file.is_file())
    assert planned["checkpoints on disk"] == pytest.approx(written, rel=0.1)


def test_a_teacher_is_counted_and_one_that_the_adapter_s_base_is_needs_no_weights(task, tmp_path, monkeypatch, capsys):
    base = ["--config", task / "grpo.yaml", "--output_dir", tmp_path / "run", "--dry_run", "true"]
    teacher = ["--teacher_name_or_path", task / "model"]
    assert run(monkeypatch, "grpo", *base) == 0
    without = table(capsys.readouterr().out)
    assert not any("teacher" in name for name in without)
    assert run(monkeypatch, "grpo", *base, *teacher) == 0
    text = capsys.readouterr().out
    found, parameters = table(text), sum(p.numel() for p in load_model(task / "model").parameters())
    assert found["teacher"] == pytest.approx(4 * parameters, rel=0.01)  # float32, as the policy
    assert "24 tokens × 96 numbers × 4 bytes" in text  # 4 rollouts of 6 tokens at most, of 96 hidden units
    assert found["teacher's hidden states"] == pytest.approx(24 * 96 * 4, rel=0.01)
    assert run(monkeypatch, "grpo", *base, *teacher, "--teacher_dtype", "bfloat16") == 0
    assert table(capsys.readouterr().out)["teacher"] == pytest.approx(2 * parameters, rel=0.01)
    adapter = ["--use_peft", "true", "--lora_target_modules", "q_proj"]
    assert run(monkeypatch, "grpo", *base, *teacher, *adapter) == 0
    shared = table(capsys.readouterr().out)
    assert "teacher" not in shared and "teacher's hidden states" in shared


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "sft"])
def test_prompts_that_are_trained_on_and_evaluated_are_counted(recipe, task, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "data" / "train.jsonl", ROWS[:5])
    spaced = [{**row, "prompt": f" {row['prompt']}\n"} for row in ROWS[3:8]]  # the first 2 are trained on
    write_rows(tmp_path / "data" / "validation.jsonl", spaced)
    arguments = ["--config", task / f"{recipe}.yaml", "--dataset_name", tmp_path / "data", "--dry_run", "true"]
    evaluates = [] if recipe == "sft" else ["--eval_strategy", "steps"]
    assert run(monkeypatch, recipe, *arguments, "--output_dir", tmp_path / "run", *evaluates) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("prompts ", "examples "))
    )
    assert line.endswith(f"  2 of 5 validation prompts also in {'training' if recipe == 'sft' else 'train'}")


def test_parameters_are_those_of_the_loaded_model(task):
    path = str(task / "model")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    size = size_of(weightless_model(ModelArguments(model_name_or_path=path)))
    every = sum(p.numel() for p in loaded.parameters())
    assert (size.parameters, size.trained, size.weight_bytes) == (every, every, 4 * every)
    half = size_of(weightless_model(ModelArguments(model_name_or_path=path, dtype="bfloat16")))
    assert half.weight_bytes == 2 * every
    # The critic's backbone has no output layer; its head is a weight a hidden unit, and a bias.
    model = weightless_model(ModelArguments(model_name_or_path=path))
    assert critic_parameters(model, "separate", None) == every - loaded.lm_head.weight.numel() + 96 + 1
    assert critic_parameters(model, "separate", path) == critic_parameters(model, "separate", None)
    assert critic_parameters(model, "shared", None) == 97
    # LoRA of rank 4 on q_proj (96 -> 2 · 48) of 2 layers: 4 · 96 down and 96 · 4 up, each.
    adapted = ModelArguments(model_name_or_path=path, use_peft=True, lora_r=4, lora_target_modules=["q_proj"])
    assert size_of(weightless_model(adapted)).trained == 2 * (4 * 96 + 96 * 4)


def test_an_adapter_that_trains_on_is_counted_alone(task, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(task / "model"), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path)
    size = size_of(weightless_model(ModelArguments(model_name_or_path=str(tmp_path))))
    assert size.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0
    assert size.parameters == sum(p.numel() for p in adapted.parameters())


def test_memory_is_the_sum_that_its_formulas_say(task):
    size = size_of(weightless_model(ModelArguments(model_name_or_path=str(task / "model"))))
    common = {"optim": "adamw_torch", "reference": True, "averages": 1, "quantized_bits": None, "compute_bytes": 4}
    common |= {"update_tokens": 40, "cached_tokens": 80, "checkpointing": False, "logits": False}
    held = memory(size, **common, cpu=False)
    bytes_of = {name: number for name, (number, _) in held.items()}
    weights = 4 * size.parameters
    assert bytes_of["weights"] == bytes_of["gradients"] == bytes_of["reference model"] == weights
    assert bytes_of["optimizer state"] == 2 * weights
    # The cache: 2 layers · key and value · 1 head · 48 numbers · 4 bytes.
    assert bytes_of["KV cache"] == 80 * 2 * 2 * 48 * 4
    # Two layers: norms 6 · 96, attention 5 · 2 heads · 48, MLP 4 · 192 numbers of 4 bytes.
    activations = 40 * 2 * (6 * 96 + 5 * 96 + 4 * 192) * 4
    assert bytes_of["activations, roughly"] == activations
    tile = 40 * size.vocabulary * 4
    assert bytes_of["logits"] == tile
    assert bytes_of["peak of a process"] == 6 * weights + activations + tile
    on_cpu = {name: number for name, (number, _) in memory(size, **common, cpu=True).items()}
    assert on_cpu["logits"] == 4 * tile
    assert on_cpu["activations, roughly"] == activations
    itself = on_cpu["the process itself"]
    assert itself == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    kept = int((activations + 4 * tile) / 5)  # a fifth of what an update holds stays with the allocator
    assert on_cpu["kept by the allocator"] == pytest.approx(kept, abs=1)
    assert on_cpu["peak of a process"] == pytest.approx(6 * weights + activations + 4 * tile + kept + itself, abs=1)


def test_a_packed_update_counts_each_prompt_once():
    config = GRPOConfig(output_dir="x", per_device_train_batch_size=8, num_generations=4, max_completion_length=16)
    plan = plan_rollouts(config, build_prompts(ROWS, tiny_tokenizer()), 1)
    prompt = plan.longest - 16
    assert update_tokens(config, plan) == 2 * prompt + 8 * 16  # two prompts of four samples
    config.pack_updates = False
    assert update_tokens(config, plan) == 8 * (prompt + 16)


def test_the_usual_peak_is_of_prompts_and_references_as_long_as_they_are_in_the_mean(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    rows = [{"prompt": "a b", "references": "c d e"}, {"prompt": "a b c d", "references": "e"}]
    prompts = build_prompts(rows, tokenizer)
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    config = GRPOConfig(output_dir="x", per_device_train_batch_size=8, num_generations=4, max_completion_length=16)
    mean = sum(lengths) / 2
    assert plan_rollouts(config, prompts, 1, tokenizer).usual == (mean, (4 + 2) / 2, "as references are")  # with EOS
    assert plan_rollouts(config, prompts, 1).usual == (mean, 8, "half of the longest")
    config.max_completion_length = 2  # completions are cut where references are not
    assert plan_rollouts(config, prompts, 1, tokenizer).usual == (mean, 2, "as references are")


def test_several_processes_share_the_batch(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    prompts = build_prompts(ROWS, tokenizer)
    config = GRPOConfig(
        output_dir="x", per_device_train_batch_size=4, num_generations=2, max_steps=4, generation_batch_size=16
    )
    object.__setattr__(config, "steps_per_generation", 2)
    plan = plan_rollouts(config, prompts, 2)
    # 8 rollouts per step of 2 processes; 16 a round, which feeds 2 steps: 4 steps take 2 rounds of 8 prompts.
    assert (plan.rollouts_a_step, plan.examples_a_step, plan.generations_a_process) == (8, 4, 8)
    assert (plan.rollouts, plan.steps_an_epoch, plan.epochs) == (32, 2, 2)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 4}, 3),  # 4, 8 and the last, 10
        ({"save_steps": 0.2}, 5),
        ({"save_steps": 4, "save_total_limit": 2}, 2),
        ({"save_steps": 4, "save_total_limit": 1, "metric_for_best_model": "reward"}, 2),
    ],
)
def test_checkpoints_kept(settings, kept):
    config = GRPOConfig(output_dir="x", max_steps=10, **settings)
    prompts = build_prompts(ROWS, tiny_tokenizer())
    config.max_completion_length = 4
    assert count_checkpoints(config, plan_rollouts(config, prompts, 1)) == kept


BAD = {
    "an adapter that does not fit": (["--use_peft", "true", "--lora_target_modules", "nowhere"], "nowhere"),
    "a directory that holds a run": (["--output_dir", "{task}/held"], "--resume_from_checkpoint"),
    "a directory under a file": (["--output_dir", "{task}/grpo.yaml/run"], "is a file"),
    "a checkpoint that is not there": (["--resume_from_checkpoint", "latest"], "no whole checkpoint"),
    "batch sizes that do not divide": (["--per_device_train_batch_size", "3"], "--per_device_train_batch_size"),
    "a reward that is not there": (["--reward_funcs", "exact_mach"], "exact_match"),
    "a reward of whole groups, and a completion by itself": (
        ["--reward_funcs", "group_diversity", "--advantage_baseline", "greedy"],
        "group_diversity scores whole groups",
    ),
    "an average of all time": (["--ema_decay", "1.0"], "ema_decay is 1.0; expected a number in [0, 1)"),
    "a claim about references that are not there": (
        ["--dataset_name", "{task}/bare", "--evaluate", "true", "--primary", "exact_match:greedy"],
        "--primary is 'exact_match:greedy', but the data has no references to match",
    ),
    "exact search of a model with states": (
        ["--model_name_or_path", "{task}/states", "--evaluate", "true", "--studies", "map"],
        "exact_map needs a cache of keys and values alone",
    ),
    "a router loss of a model without a router": (["--router_aux_loss_coef", "0.1"], "this model has no router"),
    "a model that is not there": (["--model_name_or_path", "{task}/modle"], "model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_run_would_refuse_is_refused(case, task, tmp_path, monkeypatch, capsys):
    (task / "held").mkdir(exist_ok=True)
    (task / "held/metrics.jsonl").write_text("{}\n")
    before = sorted(task.rglob("*"))
    flags, named = BAD[case]
    arguments = ["--config", task / "grpo.yaml", "--output_dir", tmp_path / "run", "--dry_run", "true"]
    assert run(monkeypatch, "grpo", *arguments, *(flag.format(task=task) for flag in flags)) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and named in message and "Traceback" not in message
    assert sorted(task.rglob("*")) == before and not (tmp_path / "run").exists()


ROUTED = {  # recipe, flags, and whether the router's loss would be left out
    "TRL's own loss": ("grpo", [], False),
    "an objective of rlseq's": ("grpo", ["--reference_loss_coef", 0.1], True),
    "the same without that loss": ("grpo", ["--reference_loss_coef", 0.1, "--router_aux_loss_coef", 0], False),
    "PPO": ("ppo", [], True),
}


@pytest.mark.parametrize("case", ROUTED)
def test_a_router_loss_that_would_be_left_out_is_refused_before_a_model_loads(
    case, task, tmp_path, monkeypatch, capsys
):
    name, flags, refused = ROUTED[case]
    model = tiny_shape("qwen2_moe")
    model.config.router_aux_loss_coef = 0.1
    model.save_pretrained(tmp_path / "routed")
    tiny_tokenizer().save_pretrained(tmp_path / "routed")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments = ["--config", task / f"{name}.yaml", "--model_name_or_path", tmp_path / "routed", *flags]
    for dry in ("true", "false") if refused else ("true",):
        code = run(monkeypatch, name, *arguments, "--output_dir", tmp_path / "run", "--dry_run", dry)
        said = "this mixture-of-experts model has a router loss" in capsys.readouterr().err
        assert (code, said) == ((2, True) if refused else (0, False))


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_images_are_refused_before_a_model_loads(name, task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments = ["--config", task / f"{name}.yaml", "--dataset_name", task / "images", "--output_dir", tmp_path / "run"]
    assert run(monkeypatch, name, *arguments) == 2
    assert "train.jsonl, line 2: column 'image' holds an image, but rlseq serves only text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused_and_stays_claimed_by_its_run(task, tmp_path, monkeypatch, capsys):
    from rlseq.training.run.directory import prepare

    held = prepare(tmp_path / "run", resume=None, overwrite=False, main_process=True)
    arguments = ["--config", task / "grpo.yaml", "--output_dir", tmp_path / "run", "--dry_run", "true"]
    assert run(monkeypatch, "grpo", *arguments) == 2
    assert "in use" in capsys.readouterr().err
    held.release()
    assert run(monkeypatch, "grpo", *arguments) == 0


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 kB"), (4_096, "4.1 kB"), (12_345_678, "12.3 MB"), (1_234_567_890, "1.23 GB"), (2e12, "2,000 GB")],
)
def test_sizes_have_the_unit_that_suits_them(size, said):
    assert readable_size(size) == said
