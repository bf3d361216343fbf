"""Adapters on rounded weights (QLoRA, LLM.int8): what is sampled, trained, saved and evaluated, on a CPU."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import trl
from test_recipes import run_in_process
from tiny import tiny_model
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer, write_data
from transformers import AutoModelForCausalLM

from rlseq.config.groups.adapters import quantization_note, quantization_of
from rlseq.config.training import ModelArguments
from rlseq.data.prompts import build_prompts
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.evaluation.settings import ContrastSettings
from rlseq.training.models import load_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rlseq[quantization]'")
KINDS = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    tiny_model(**sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def arguments(base, kind):
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 32, "lora_target_modules": ["q_proj", "up_proj"]}
    return ModelArguments(model_name_or_path=str(base), dtype="float32", **lora, **{kind: True})


def rounded(model, base):
    """A plain model with the weights that the quantised one's stand for, as bitsandbytes itself gives them."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    return plain.eval()


def test_four_bits_give_the_log_probs_of_the_weights_that_they_stand_for(base):
    model = load_model(arguments(base, "load_in_4bit")).eval()
    plain = rounded(model, base)
    prompts = build_prompts(ROWS[:3], tiny_tokenizer())
    settings = {"num_samples": 4, "max_new_tokens": 8, "strategy": Sample(), "seed": 0, "stop_ids": [2]}
    exact = AutoModelForCausalLM.from_pretrained(base).eval()
    far = 0.0
    for prompt, group in zip(prompts, sample(model, prompts, **settings), strict=True):
        for rollout in group:
            ids = torch.tensor([[*prompt.prompt_ids, *rollout.completion_ids]])
            tokens = torch.tensor([rollout.completion_ids]).T
            with torch.no_grad():
                ours, theirs = (
                    m(input_ids=ids).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1).gather(-1, tokens)[:, 0]
                    for m in (plain, exact)
                )
            torch.testing.assert_close(torch.tensor(rollout.logprobs), ours, atol=1e-4, rtol=1e-4)
            far = max(far, (ours - theirs).abs().max().item())
    assert far > 1e-2  # rounding shows


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_trains_and_the_rounded_weights_stay(kind, base, tmp_path):
    asked = arguments(base, kind)
    model = load_model(asked)
    assert {type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")} == {KINDS[kind]}
    trainer = tiny_trainer(tmp_path, model=model, peft_config=trl.get_peft_config(asked), max_steps=3, beta=0.05)
    before = {name: copy.deepcopy(p.data) for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.data, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert all(line["grad_norm"] > 0 for line in trainer.state.log_history if "grad_norm" in line)

    trainer.save_model(str(tmp_path / "saved"))
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    saved = load_checkpoint("saved", str(tmp_path / "saved"))  # on the base's own weights
    trained = {name.removeprefix("base_model.model."): p for name, p in trainer.model.named_parameters()}
    parameters = dict(saved.named_parameters())
    adapter = {name for name in parameters if "lora_" in name}
    assert adapter == {name.removeprefix("base_model.model.") for name in moved}
    assert all(torch.equal(parameters[name], trained[name].float()) for name in adapter)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    whole = {name.replace(".base_layer", ""): p for name, p in parameters.items() if name not in adapter}
    assert len(whole) > 10 and all(torch.equal(p, weights[name]) for name, p in whole.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_evaluation_of_a_run_is_of_the_weights_that_training_measured(kind, base, tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    flags = ["--model_name_or_path", base, "--dataset_name", tmp_path / "data", "--reward_funcs", "token_f1"]
    flags += ["--use_peft", "true", f"--{kind}", "true", "--max_steps", 2, "--learning_rate", "5e-2"]
    flags += ["--per_device_train_batch_size", 4, "--num_generations", 2, "--max_completion_length", 4]
    flags += ["--eval_strategy", "steps", "--eval_steps", 2, "--resamples", 50, "--studies", "none"]
    flags += ["--strategies", "greedy", "--num_cpu_threads", 1, "--output_dir", run]
    run_in_process(monkeypatch, "grpo", *flags)

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    during = [line for line in lines if "eval_nll_per_token" in line][-1]
    results = json.loads((run / "evaluation" / "results.json").read_text())
    final = results["models"]["rl"]
    assert during["eval_nll_per_token"] == pytest.approx(final["likelihood"]["nll_per_token"]["value"], abs=1e-4)
    greedy = final["strategies"]["greedy"]["logprob"]["value"]
    assert during["eval_greedy/logprob"] == pytest.approx(greedy, abs=1e-3)

    asked = "it", str(run)
    prompts, tokenizer = build_prompts(ROWS, tiny_tokenizer()), tiny_tokenizer()
    answers = [[*tokenizer(row["references"][0])["input_ids"], tokenizer.eos_token_id] for row in ROWS]
    of_saved = score(load_checkpoint(*asked), [p.prompt_ids for p in prompts], answers)
    nll = -sum(x.sum().item() for x in of_saved) / sum(map(len, answers))
    assert abs(nll - during["eval_nll_per_token"]) > 1e-3  # rounding shows

    bits = 4 if kind == "load_in_4bit" else 8
    assert results["notes"][0].startswith(f"This evaluation takes the base in {bits} bits, as training did")
    assert results["spec"]["settings"]["quantization"][kind] is True


def test_a_run_on_weights_as_they_were_saved_has_no_word_of_quantisation(base):
    plain = ModelArguments(model_name_or_path=str(base))
    assert quantization_of(plain) is None and quantization_note(plain, None) is None
    assert "quantization" not in ContrastSettings().reproducibility_fields()
