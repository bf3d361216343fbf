"""docs/invariants.md beside the suite: the tests it names are there; and those that no other module has."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_grpo import padded_batch
from test_recipes import run_in_process
from tiny import tiny_model
from tiny_task import ROWS, as_micro_batch, tiny_tokenizer, tiny_trainer, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlseq.cli.main import main as command_line
from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import Sample

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/invariants.md"
NAMED = re.compile(r"`(test_\w+)::(test_\w+)`")


def invariants() -> dict[int, str]:
    """Number -> the cell of its tests, from the tables of the page."""
    rows = re.findall(r"^\| (\d+) \| .+? \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {int(number): tests for number, tests in rows}


def names_in(module: str) -> set[str]:
    """The names of the tests in a file of tests; none where there is no such file."""
    body = [node for path in TESTS.rglob(f"{module}.py") for node in ast.parse(path.read_text()).body]
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_invariant_has_tests_and_they_are_all_there():
    found = invariants()
    assert sorted(found) == list(range(1, 39))
    for number, cell in found.items():
        named = NAMED.findall(cell)
        assert named, number
        for module, name in named:
            assert name in names_in(module), f"{number}: {module}::{name}"


def test_tests_that_other_pages_name_are_there():
    root, named = TESTS.parent, 0
    for page in [root / "README.md", *root.glob("docs/*.md"), *root.glob("recipes/*/README.md")]:
        text = page.read_text()
        for module, name in re.findall(r"\b(test_\w+)(?:\.py)?(?:::(test_\w+))?", text):
            if not name and not re.search(rf"tests/[\w/]*\b{module}\.py", text):
                continue  # a word of its own, or the second half of a name
            named += 1
            assert name in names_in(module) if name else names_in(module), f"{page.name}: {module} {name}"
    assert named > 100


def batches(trainer):
    """What reaches the loss while the trainer trains: every micro-batch."""
    seen, compute = [], trainer.micro_batch_loss

    def record(model, batch):
        seen.append(batch)
        return compute(model, batch)

    trainer.micro_batch_loss = record
    trainer.train()
    return seen


# 1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_updates", [True, False])
def test_loss_and_gradient_do_not_depend_on_the_order_of_rows(tmp_path, pack_updates):
    def step(order):
        trainer = tiny_trainer(tmp_path, pack_updates=pack_updates)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = dataclasses.replace(
            as_micro_batch(padded_batch()),
            advantages=torch.tensor([1.0, -0.5, 0.25]),
            old_logprobs=torch.tensor([-2.5, -2.0, -3.0])[:, None].expand(3, 3),
            trained_tokens=torch.tensor(7.0),
        )
        loss = trainer.micro_batch_loss(trainer.model, batch.select(order))
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    loss, gradient = step([0, 1, 2])
    for order in ([2, 0, 1], [1, 2, 0], [1, 0, 2]):
        other_loss, other_gradient = step(order)
        torch.testing.assert_close(other_loss, loss, atol=1e-6, rtol=0)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


# 4, 8 ----------------------------------------------------------------------------------------------------------------


def test_what_is_trained_is_what_was_sampled_with_its_log_probs(tmp_path):
    model = tiny_model("llama", initializer_range=0.1, attention_dropout=0.5)
    trainer = tiny_trainer(tmp_path, model=model, learning_rate=0.0, num_iterations=2)
    batch = batches(trainer)[0]
    mask, sampled = batch.mask, batch.completion_ids
    tokenizer = trainer.processing_class
    reencoded = [tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"] for ids in sampled]
    stops = sum(int(ids[-1] == 2) for ids in sampled)
    assert sum(map(len, reencoded)) < mask.sum() - stops  # other special tokens were sampled too
    trainer.model.train()
    now = trainer.forward.scores(trainer.model, batch).logprobs
    ratio = (now - batch.old_logprobs)[mask].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


# 7 -------------------------------------------------------------------------------------------------------------------


def test_the_first_stop_is_trained_and_nothing_after_it_though_pad_is_eos_and_there_are_two_stops(tmp_path):
    model = tiny_model("llama", initializer_range=0.1)
    model.generation_config.eos_token_id = [2, 9]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = tiny_trainer(tmp_path, model=model, tokenizer=tokenizer, max_steps=1, learning_rate=0.0)
    batch, ends = batches(trainer)[0], set()
    for ids, keep in zip(batch.completion_ids, batch.mask.tolist(), strict=True):
        first = next((i for i, token in enumerate(ids) if token in (2, 9)), len(ids) - 1)
        assert first == len(ids) - 1 and keep == [True] * len(ids) + [False] * (len(keep) - len(ids))
        ends.add(ids[first])
    assert ends >= {2, 9}


# 19 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_nothing_that_deterministic_kernels_refuse_on_cuda_is_needed(tmp_path, monkeypatch, top_p):
    def refusing(sums):  # as CUDA has it under torch.use_deterministic_algorithms
        def cumsum(tensor, *args, **kwargs):
            assert not tensor.is_floating_point(), "cumsum_cuda_kernel does not have a deterministic implementation"
            return sums(tensor, *args, **kwargs)

        return cumsum

    for owner, name in ((torch.Tensor, "cumsum"), (torch.Tensor, "cumsum_"), (torch, "cumsum")):
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    with pytest.raises(AssertionError, match="deterministic"):
        torch.ones(2).cumsum(0)
    if top_p is None:
        tiny_trainer(tmp_path, reference_loss_coef=0.1).train()
    else:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        settings = {"num_samples": 1, "max_new_tokens": 4, "strategy": Sample(top_p=top_p), "seed": 0}
        sample(model, build_prompts(ROWS, tokenizer), **settings, stop_ids=stop_ids_of(model, tokenizer))


# 22 ------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_by_plain_from_pretrained_and_samples_what_the_run_would_have_sampled(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, learning_rate=5e-2)
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")

    def completions(model, tokenizer):
        prompts = build_prompts(ROWS, tokenizer)
        settings = {"num_samples": 4, "max_new_tokens": 6, "strategy": Sample(), "seed": 5}
        return sample(model, prompts, **settings, stop_ids=stop_ids_of(model, tokenizer), tokenizer=tokenizer)

    expected = completions(trainer.model, trainer.processing_class)
    assert completions(loaded, tokenizer) == expected
    assert completions(tiny_model("llama", initializer_range=0.1), tokenizer) != expected


# 23 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fresh", "adapter"])
def test_with_adapters_the_kl_to_the_start_is_0_at_step_0(tmp_path, start):
    base = tiny_model("llama", initializer_range=0.1)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"beta": 0.1, "max_steps": 2, "learning_rate": 5e-2}
    if start == "fresh":
        trainer = tiny_trainer(tmp_path, model=base, peft_config=lora, **settings)
    else:
        adapted = get_peft_model(base, lora)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
        trainer = tiny_trainer(tmp_path, model=adapted, **settings)
    trainer.train()
    first, second = (line["kl"] for line in trainer.state.log_history if "kl" in line)
    assert first == 0 and second > 0


# 33 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("grpo", []),
        ("grpo", ["--use_peft", "true", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj"]),
        ("ppo", ["--critic", "shared"]),
    ],
    ids=["grpo", "adapter", "ppo"],
)
def test_what_a_run_measures_at_its_end_its_saved_result_gives_again(recipe, flags, tmp_path, monkeypatch):
    write_task(tmp_path)
    data = ["--dataset_name", tmp_path / "data", "--reward_funcs", "token_f1"]
    run = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run", "--evaluate", "false"]
    run += ["--per_device_train_batch_size", 8, "--num_generations", 2, "--max_completion_length", 6]
    run += ["--max_steps", 3, "--learning_rate", "5e-2", "--eval_strategy", "steps", "--eval_steps", 1]
    run_in_process(monkeypatch, recipe, *data, *run, "--num_cpu_threads", 1, *flags)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "eval_nll_per_token" in line)

    evaluate = ["evaluate", "--models", f"it={tmp_path}/run", "--output_dir", tmp_path / "out", "--studies", "none"]
    evaluate += ["--strategies", "greedy", "--max_new_tokens", 6, "--resamples", 50]
    assert command_line([*map(str, [*evaluate, *data])]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["models"]["it"]
    again = {"eval_nll_per_token": found["likelihood"]["nll_per_token"]["value"]}
    again |= {f"eval_greedy/{name}": found["strategies"]["greedy"][name]["value"] for name in ("logprob", "length")}
    for name, value in again.items():
        assert last[name] == pytest.approx(value, rel=1e-5), name
        assert name == "eval_greedy/length" or first[name] != pytest.approx(value, rel=1e-3)
