"""What PPO leaves on disk and takes up again: the policy, the critic beside it, the best of both, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_ppo import equal, generated, load, plain_logprobs, policy_and_critic, ppo_settings, saved_model, tiny_ppo
from tiny_task import tiny_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from rlseq.errors import ModelError
from rlseq.training.averaging import WeightAverage
from rlseq.training.critic import build_critic

KINDS = ["separate", "shared"]
IDS = torch.tensor([[5, 6, 4, 14, 15]])
SAVES = {"save_strategy": "steps", "save_steps": 1}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def critic_of(folder):
    """The critic that a folder holds, by its names in the policy."""
    critic = build_critic(
        tiny_model("llama"), "separate" if (folder / "critic/config.json").exists() else "shared", str(folder)
    )
    return {f"rlseq_critic.{name}": p.detach() for name, p in critic.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_loads_by_plain_from_pretrained_and_is_the_trained_one(tmp_path, kind, tied):
    model = tiny_model("llama", initializer_range=0.1, tie_word_embeddings=tied)
    trainer = tiny_ppo(tmp_path, critic=kind, model=model, **SAVES)
    trainer.train()
    trainer.save_model(str(tmp_path))
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert torch.equal(logits(loaded), logits(trainer.model))
        assert not any("critic" in name or "value" in name for name in load_file(folder / "model.safetensors"))
        assert equal(critic_of(folder), policy_and_critic(trainer)[1])
    assert not torch.equal(logits(load(tmp_path / "checkpoint-1")), logits(trainer.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["checkpoint-2/critic", "checkpoint-2", "."])
def test_a_new_run_starts_from_a_critic_that_another_saved(tmp_path, kind, folder):
    first = tiny_ppo(tmp_path, critic=kind, **SAVES)
    first.train()
    first.save_model(str(tmp_path))
    path = str(tmp_path / folder)
    second = tiny_ppo(tmp_path / "next", critic=kind, critic_name_or_path=path, head=None)
    assert equal(policy_and_critic(second)[1], policy_and_critic(first)[1])
    assert not equal(policy_and_critic(second)[0], policy_and_critic(first)[0])


class StopAfter(TrainerCallback):
    """Ends training after a step, at which a checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step
        return control


def final_weights(path, step=None, resume=None, **settings):
    trainer = tiny_ppo(path, head=None if resume else 0.3, **{**SAVES, "max_steps": 6, **settings})
    if step:
        trainer.add_callback(StopAfter(step))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, policy_and_critic(trainer)


ROUND = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}
RESUMED = {
    "separate, at a round's end": (4, {"critic": "separate", "critic_learning_rate": 3e-3, **ROUND}),
    "shared, trunk and all": (4, {"critic": "shared", "critic_trunk_gradient": True, **ROUND}),
    "within a round that is over": (3, {"critic": "shared", "target_kl": 1e-3, **ROUND}),
    "within the warm-up": (1, {"critic": "separate", "critic_warmup_steps": 3}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, case):
    step, settings = RESUMED[case]
    whole, expected = final_weights(tmp_path / "whole", **settings)
    final_weights(tmp_path / "cut", step, **settings)
    resumed, found = final_weights(tmp_path / "cut", resume=str(tmp_path / f"cut/checkpoint-{step}"), **settings)
    assert equal(found[0], expected[0]) and equal(found[1], expected[1])
    logs = [[comparable(line) for line in t.state.log_history if "loss" in line] for t in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    rates = [[group["lr"] for group in t.optimizer.param_groups] for t in (whole, resumed)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 1 + ("critic_learning_rate" in settings)


def comparable(line):
    """A logged step without its wall-clock time; a number that is not there is None."""
    return {name: None if x != x else x for name, x in line.items() if name != "step_time"}


def test_a_checkpoint_without_a_critic_is_not_gone_on_from(tmp_path):
    grpo = tiny_trainer(tmp_path / "grpo", **SAVES)
    grpo.train()
    with pytest.raises(ModelError, match="holds no critic"):
        tiny_ppo(tmp_path / "ppo").train(resume_from_checkpoint=str(tmp_path / "grpo/checkpoint-1"))


def test_a_checkpoint_of_the_other_kind_of_critic_is_not_gone_on_from(tmp_path):
    tiny_ppo(tmp_path, critic="separate", **SAVES).train()
    with pytest.raises(ModelError, match="holds a separate critic, but --critic is shared"):
        tiny_ppo(tmp_path, critic="shared").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_taken_back_with_its_critic(tmp_path, kind):
    marks = iter([0.1, 0.9, 0.5, 0.4])
    trainer = tiny_ppo(
        tmp_path,
        critic=kind,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mark",
        greater_is_better=True,
        save_total_limit=1,
        more={"evaluator": lambda model: {"mark": next(marks)}},
        **SAVES,
    )
    steps = []

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(policy_and_critic(trainer))

    trainer.add_callback(Copy())
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    policy, critic = policy_and_critic(trainer)
    assert equal(policy, steps[1][0]) and equal(critic, steps[1][1])
    assert not equal(policy, steps[3][0]) and not equal(critic, steps[3][1])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_the_average_of_the_weights_is_saved_for_policy_and_critic(tmp_path):
    trainer = tiny_ppo(tmp_path, max_steps=2, **SAVES)
    steps = [policy_and_critic(trainer)]

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(policy_and_critic(trainer))

    trainer.add_callback(Copy())
    trainer.add_callback(average := WeightAverage(trainer, 0.75))
    trainer.train()
    average.apply()
    trainer.save_model(str(tmp_path))
    loaded = dict(load(tmp_path).named_parameters())
    for part, found in ((0, loaded), (1, critic_of(tmp_path))):
        for name, start in steps[0][part].items():  # θ̄_2 = d²·θ_0 + d(1 − d)·θ_1 + (1 − d)·θ_2
            expected = 0.5625 * start + 0.1875 * steps[1][part][name] + 0.25 * steps[2][part][name]
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


# adapters


def lora():
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def lora_ppo(path, *, start, **settings):
    return tiny_ppo(path, model=load(start), more={"peft_config": lora()}, **settings)


@pytest.fixture
def start(tmp_path):
    saved_model(tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_they_and_the_critic_train_and_the_base_stands_still(tmp_path, start, kind):
    trainer = lora_ppo(tmp_path / "run", start=start, critic=kind, max_steps=3)
    before = policy_and_critic(trainer)
    trainer.train()
    after = policy_and_critic(trainer)
    moved = {name for name in before[0] if not torch.equal(before[0][name], after[0][name])}
    adapters = {name for name in before[0] if "lora_" in name}
    assert moved == adapters and len(adapters) == 8
    assert not any("lora_" in name for name in before[1])
    still = {name for name in before[1] if torch.equal(before[1][name], after[1][name])}
    assert not still


def test_with_adapters_the_kl_to_the_start_is_0_at_step_0_and_the_reference_has_none(tmp_path, start):
    trainer = lora_ppo(tmp_path / "run", start=start, beta=0.1, max_steps=2, learning_rate=5e-2)
    trainer.train()
    first, second = (line["kl"] for line in trainer.state.log_history if "kl" in line)
    assert first == 0 and second != 0
    batch = generated(trainer, range(8))
    base = load(start)
    for row, y in enumerate(batch.completion_ids):
        with torch.no_grad():
            expected = plain_logprobs(base, trainer.prompts[row].prompt_ids, y)
        torch.testing.assert_close(batch.ref_logprobs[row, : len(y)], expected, atol=2e-5, rtol=0)


def adapted(start):
    """The start with an adapter on it that has learned something."""
    model = peft.get_peft_model(load(start), lora())
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=noise))
    return model


def test_on_a_start_with_an_adapter_the_reference_is_that_start_and_the_critic_a_whole_copy(tmp_path, start):
    model = adapted(start)
    assert not torch.allclose(logits(model), logits(load(start)), atol=1e-2)
    trainer = tiny_ppo(tmp_path / "run", model=model, beta=0.1, max_steps=2, learning_rate=5e-2, **SAVES)
    merged = adapted(start).merge_and_unload().get_decoder().state_dict()
    assert merged.keys() == trainer.critic.backbone.state_dict().keys()
    for name, x in trainer.critic.backbone.state_dict().items():
        torch.testing.assert_close(x, merged[name], atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in trainer.critic.parameters())
    trainer.train()
    first, second = (line["kl"] for line in trainer.state.log_history if "kl" in line)
    assert first == 0 and second != 0
    assert equal(critic_of(tmp_path / "run/checkpoint-2"), by_own_names(policy_and_critic(trainer)[1]))


def by_own_names(weights):
    return {name.removeprefix("base_model.model."): p for name, p in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_adapters_holds_them_and_the_critic_and_is_gone_on_from(tmp_path, start, kind):
    settings = {"start": start, "critic": kind, "max_steps": 4, **SAVES}
    whole = lora_ppo(tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = lora_ppo(tmp_path / "whole", head=None, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for mine, expected in zip(policy_and_critic(resumed), policy_and_critic(whole), strict=True):
        assert equal(mine, expected)
    saved = peft.PeftModel.from_pretrained(load(start), tmp_path / "whole/checkpoint-4")
    assert torch.equal(logits(saved), logits(whole.model))


def test_one_sample_a_prompt_is_sampled_by_default(tmp_path):
    assert ppo_settings(tmp_path).num_generations == 1
    tiny_ppo(tmp_path, max_steps=1).train()
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0] * 8 and len({row["prompt_key"] for row in rows}) == 8
