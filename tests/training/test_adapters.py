"""Adapters: trained, continued from where teacher forcing left them, merged, evaluated and counted."""

from __future__ import annotations

import importlib.util
import sys

import peft
import pytest
import torch
from tiny import tiny_model
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlseq.config.groups.adapters import ignored_adapter_settings, peft_config_of
from rlseq.config.training import GRPOConfig, ModelArguments, SFTConfig
from rlseq.data.prompts import build_prompts
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.training.models import load_model, write_merged
from rlseq.training.plan.memory import checkpoint_bytes, optimizer_bytes, size_of, weightless_model
from rlseq.training.run.launch import run_recipe
from rlseq.training.run.recipe import check_fit

IDS = torch.tensor([[5, 6, 7, 4, 14, 15]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def lora(**settings):
    return peft.LoraConfig(
        **{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and on it an adapter that is far from it, as teacher forcing would leave one; each with a tokenizer."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_model(initializer_range=0.1).save_pretrained(folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        peft.get_peft_model(base, lora(init_lora_weights=False)).save_pretrained(folder / "sft")
    for name in ("base", "sft"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_kl_is_to_the_adapter_that_the_run_started_from(dora, folders, tmp_path):
    start = folders / "sft"
    if dora:
        start = tmp_path / "dora"
        base = AutoModelForCausalLM.from_pretrained(folders / "base")
        torch.manual_seed(0)
        peft.get_peft_model(base, lora(use_dora=True, init_lora_weights=False)).save_pretrained(start)
    sft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), start)
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    trainer = tiny_trainer(
        tmp_path / "run", model=load_model(ModelArguments(model_name_or_path=str(start))), beta=0.5, max_steps=2
    )
    asked, make = [], trainer.make_batch

    def remember(inputs):
        batch = make(inputs)
        asked.append(batch.trained)
        return batch

    trainer.make_batch = remember
    trainer.train()
    # At the first step no weight has moved: the reference is the policy. At the second it is still the start.
    first, second = (line["kl"] for line in trainer.state.log_history if "kl" in line)
    assert first == pytest.approx(0, abs=1e-8) and second > 1e-6
    for batch in asked:
        found = [x[: len(ids)] for ids, x in zip(batch.completion_ids, batch.ref_logprobs, strict=True)]
        far = score(base, batch.prompt_ids, batch.completion_ids)
        near = score(sft, batch.prompt_ids, batch.completion_ids)
        for expected, reference, of_base in zip(near, found, far, strict=True):
            assert torch.allclose(reference, expected, atol=1e-4)
            assert not torch.allclose(reference, of_base, atol=1e-2)
    # Only the adapter that trains has moved: neither the base nor the copy that is the reference.
    for name, parameter in sft.named_parameters():
        copy = name.replace(".default", ".ref") if ".default" in name else name
        assert torch.equal(trainer.model.get_parameter(copy), parameter)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(".default" in name for name in trained)
    assert len(trainer.optimizer.state) == len(trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_adapter_is_a_plain_model_with_the_same_logits(dtype, folders, tmp_path):
    args = ModelArguments(model_name_or_path=str(folders / "sft"), dtype=dtype)
    adapted = load_model(args)
    adapted.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    folder = write_merged(tmp_path, args)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(merged) is type(tiny_model()) and merged.dtype == getattr(torch, dtype)
    assert not list(folder.glob("adapter*"))
    expected, base = logits(adapted), logits(AutoModelForCausalLM.from_pretrained(folders / "base"))
    allowed = {"float32": 1e-5, "bfloat16": 3e-2}[dtype] * expected.abs().max()
    assert (logits(merged) - expected).abs().max() <= allowed < (expected - base).abs().max()
    assert load_checkpoint("merged", str(folder)).num_parameters() == tiny_model().num_parameters()


def test_an_adapter_is_evaluated_as_it_was_trained(folders):
    trained = load_model(ModelArguments(model_name_or_path=str(folders / "sft")))
    assert torch.allclose(logits(load_checkpoint("tuned", str(folders / "sft"))), logits(trained), atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        ("LoRA", "float32"),
        ("DoRA", "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in ((None, "float32"), (None, "bfloat16"), ("LoRA", "bfloat16"), ("DoRA", "float32"))
        ),
    ],
)
def test_checkpointing_changes_no_gradient_of_packed_updates(adapter, dtype, folders, tmp_path):
    found, forwards = [], []
    for checkpointing in (False, True):
        model = load_model(ModelArguments(model_name_or_path=str(folders / "base"), dtype=dtype))
        settings = None if adapter is None else lora(use_dora=adapter == "DoRA", lora_dropout=0.0)
        torch.manual_seed(0)  # of the adapter's first weights
        trainer = tiny_trainer(
            tmp_path / str(checkpointing),
            model=model,
            peft_config=settings,
            gradient_checkpointing=checkpointing,
            max_steps=1,
            max_grad_norm=0.0,
        )
        assert trainer.forward.packs
        gradients, step = {}, trainer.training_step
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_: forwards.append(len(found)))

        def remember(model, *args, into=gradients, step=step):
            loss = step(model, *args)
            into.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return loss

        trainer.training_step = remember
        trainer.train()
        found.append(gradients)
    assert forwards.count(1) == forwards.count(0) + 1  # the layer was computed again for the backward
    without, with_it = found
    assert without.keys() == with_it.keys() and any(g.abs().max() > 0 for g in without.values())
    for name, gradient in without.items():
        assert torch.allclose(with_it[name], gradient, rtol=1e-4, atol=1e-7), name


def counted(model):
    """(all, trained) parameters and their bytes, as the loaded model has them."""
    every = list(model.parameters())
    some = [p for p in every if p.requires_grad]
    return [sum(p.numel() for p in ps) for ps in (every, some)] + [
        sum(p.numel() * p.element_size() for p in ps) for ps in (every, some)
    ]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"lora_r": 4}, "float32"),
        ({"lora_r": 4, "use_dora": True}, "bfloat16"),
        pytest.param({}, "float32", marks=pytest.mark.soak),
        pytest.param({}, "bfloat16", marks=pytest.mark.soak),
        pytest.param({"lora_r": 4}, "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_a_dry_run_counts_what_a_run_holds(flags, dtype, folders, tmp_path):
    args = ModelArguments(
        model_name_or_path=str(folders / "base"),
        dtype=dtype,
        use_peft=bool(flags),
        lora_target_modules=["q_proj", "up_proj"],
        **flags,
    )
    size = size_of(weightless_model(args))
    settings = peft_config_of(args)
    trainer = tiny_trainer(tmp_path, model=load_model(args), peft_config=settings, max_steps=1)
    trainer.train()
    found = [size.parameters, size.trained, size.weight_bytes, size.trained_bytes]
    assert found == counted(trainer.model)
    state = [x for held in trainer.optimizer.state.values() for name, x in held.items() if name != "step"]
    assert optimizer_bytes("adamw_torch", size) == sum(x.numel() * x.element_size() for x in state)
    if flags:
        trainer.save_model(str(tmp_path / "saved"))
        written = (tmp_path / "saved/adapter_model.safetensors").stat().st_size
        only = checkpoint_bytes(size, optim="adamw_torch", average=False, save_only_model=True)
        assert only <= written <= only + 4096  # and the names


def test_what_is_quantised_is_counted_by_its_bits(folders):
    size = size_of(weightless_model(ModelArguments(model_name_or_path=str(folders / "base"), use_peft=True, lora_r=2)))
    # 2 layers of q 16×16, k and v 16×8, o 16×16, and gate, up, down 16×24; the output layer stays as it is.
    assert size.linear == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert size.linear_bytes == 4 * size.linear


def test_what_cannot_train_is_refused_before_anything_loads(folders, monkeypatch):
    base, sft = str(folders / "base"), str(folders / "sft")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ConfigError, match="--load_in_4bit rounds the weights"):
        ModelArguments(model_name_or_path=base, load_in_4bit=True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for flags in ({"model_name_or_path": base, "use_peft": True}, {"model_name_or_path": sft}):
        with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed"):
            ModelArguments(load_in_4bit=True, **flags)
    for flag in ("merge_adapter", "use_dora"):
        with pytest.raises(ConfigError, match=f"--{flag} is True, which has no effect without an adapter"):
            ModelArguments(model_name_or_path=base, **{flag: True})
        ModelArguments(model_name_or_path=sft, **{flag: True})


def test_settings_of_an_adapter_that_come_to_nothing_are_named(folders):
    base, sft = str(folders / "base"), str(folders / "sft")
    said = ignored_adapter_settings(ModelArguments(model_name_or_path=base, lora_r=4, lora_target_modules="q_proj"))
    assert said.startswith("lora_r, lora_target_modules come to nothing: the run trains all weights")
    said = ignored_adapter_settings(ModelArguments(model_name_or_path=sft, lora_dropout=0.0, use_dora=True))
    assert said.startswith("lora_dropout, use_dora come to nothing: the adapter") and said.endswith("as it is")
    for given in ({"use_peft": True, "lora_r": 4}, {"lora_r": 16}, {}):
        assert ignored_adapter_settings(ModelArguments(model_name_or_path=base, **given)) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_r": 0}, "--lora_r is 0; expected at least 1"),
        ({"lora_alpha": 0}, "--lora_alpha is 0; expected at least 1"),
        ({"lora_dropout": 1.0}, r"--lora_dropout is 1.0; expected a number in \[0, 1\)"),
        ({"lora_target_modules": "q_porj"}, r"the adapter does not fit .*'q_porj'.* layers: .*, o_proj, q_proj"),
    ],
)
@pytest.mark.parametrize("config", [SFTConfig, GRPOConfig])
def test_an_adapter_that_does_not_fit_is_refused_before_anything_loads(config, flags, message, folders, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    prompts = build_prompts(ROWS, tiny_tokenizer())
    with pytest.raises(ConfigError, match=message):
        model = ModelArguments(model_name_or_path=str(folders / "base"), use_peft=True, **flags)
        check_fit(config(use_cpu=True), model, tiny_tokenizer(), prompts)


def test_an_adapter_on_the_output_layer_is_refused_for_rollouts_before_anything_loads(folders, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    peft.get_peft_model(base, lora(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    new = {"model_name_or_path": str(folders / "base"), "use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]}
    old = {"model_name_or_path": str(tmp_path / "adapter")}
    for given, todo in ((new, "leave that out of --lora_target_modules"), (old, "merge it into its base")):
        prompts = build_prompts(ROWS, tiny_tokenizer())
        check_fit(SFTConfig(use_cpu=True), ModelArguments(**given), tiny_tokenizer(), prompts)
        with pytest.raises(ConfigError, match=rf"on the output layer too \(lm_head\).*: {todo}") as refused:
            check_fit(GRPOConfig(use_cpu=True), ModelArguments(**given), tiny_tokenizer(), prompts)
        assert "\n" not in str(refused.value)
    sft = ModelArguments(model_name_or_path=str(folders / "sft"))
    check_fit(GRPOConfig(use_cpu=True), sft, tiny_tokenizer(), build_prompts(ROWS, tiny_tokenizer()))


def test_an_adapter_samples_what_its_merged_model_samples(folders, tmp_path):
    from rlseq.engine.strategies import Sample

    args = ModelArguments(model_name_or_path=str(folders / "sft"))
    prompts = build_prompts([{"prompt": "a b = "}, {"prompt": "c = "}], tiny_tokenizer())
    settings = {"num_samples": 4, "max_new_tokens": 6, "strategy": Sample(), "seed": 0, "stop_ids": [2]}
    sampled = [sample(m, prompts, **settings) for m in (load_model(args), load_model(args).merge_and_unload())]
    assert [[r.completion_ids for r in group] for group in sampled[0]] == [
        [r.completion_ids for r in group] for group in sampled[1]
    ]


@pytest.mark.parametrize("name", ["grpo", pytest.param("sft", marks=pytest.mark.soak)])
def test_a_recipe_writes_the_adapter_and_the_merged_model(name, folders, tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    write_data(data)
    settings = {
        "model_name_or_path": folders / "base",
        "dataset_name": data,
        "output_dir": run,
        "use_peft": "true",
        "lora_target_modules": "q_proj",
        "merge_adapter": "true",
        "learning_rate": 0.05,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_cpu_threads": 1,
        "disable_tqdm": "true",
    }
    if name == "grpo":
        settings |= {"reward_funcs": "exact_match", "reference_loss_coef": 1, "max_completion_length": 4}
        settings |= {"num_generations": 2, "evaluate": "false"}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", [name, *flags])
    recipe = importlib.import_module(f"rlseq.recipes.{name}")
    with pytest.raises(SystemExit) as ended:
        run_recipe(recipe.main)
    assert not ended.value.code and str(run / "merged") in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert torch.allclose(logits(merged), logits(load_checkpoint("tuned", str(run))), atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(folders / "base")
    assert not torch.allclose(logits(merged), logits(start), atol=1e-3)
    assert AutoTokenizer.from_pretrained(run / "merged").get_vocab() == tiny_tokenizer().get_vocab()
