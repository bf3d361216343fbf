"""The critic by itself: what it starts from, what it refuses, and that the policy around it is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VOCAB, tiny_model
from tiny_ppo import plain_logprobs, plain_values, tiny_ppo
from trl.trainer.utils import add_fused_lm_head

from rlseq.errors import ModelError
from rlseq.training.critic import (
    HEAD_FILE,
    attach,
    build_critic,
    check_critic_path,
    critic_folder,
    is_critic,
    split_weights,
)

IDS = torch.tensor([[5, 6, 4, 14, 15, 2]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(6)[None]}


def policy_with(kind, name_or_path=None, *, family="llama", head=0.5, **changes):
    """A policy with TRL's fused head and a critic in it, whose value head is random."""
    policy = tiny_model(family, **changes)
    critic = build_critic(policy, kind, name_or_path)
    if head:
        with torch.no_grad():
            critic.value_head.weight.copy_(head * torch.randn(critic.value_head.weight.shape))
    add_fused_lm_head(policy, temperature=1.0)
    attach(policy, critic)
    return policy, critic


def ask(policy):
    with torch.no_grad():
        return policy(**INPUTS, labels=IDS, fused_lm_head=True, return_values=True)


def save(policy, critic, folder):
    critic.save(folder, split_weights(policy.state_dict())[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_one_call_gives_log_probs_and_values(family, kind):
    policy, critic = policy_with(kind, family=family)
    found = ask(policy)
    trunk = critic.backbone if kind == "separate" else policy.get_decoder()
    prompt, completion = IDS[0, :1].tolist(), IDS[0, 1:].tolist()
    with torch.no_grad():
        values = plain_values(trunk, critic.value_head, prompt, completion)
        torch.testing.assert_close(found.state_values[0], values, atol=1e-5, rtol=0)
        expected = plain_logprobs(policy, prompt, completion)
    torch.testing.assert_close(found.log_probs[0], expected, atol=1e-5, rtol=0)


def test_what_a_call_gives_is_still_a_dict_whose_entries_ddp_can_list():
    policy, _ = policy_with("separate")
    found = ask(policy)
    assert any(x is found.state_values for x in found.values())


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_policy_that_is_asked_for_no_values_answers_as_before(kind):
    policy, _ = policy_with(kind)
    with torch.no_grad():
        assert torch.equal(policy(input_ids=IDS).logits, tiny_model("llama")(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_critic_that_has_learned_nothing_says_0(kind):
    policy, _ = policy_with(kind, head=0)
    assert not ask(policy).state_values.any()


def test_a_separate_critic_starts_as_the_policy_and_goes_its_own_way():
    policy, critic = policy_with("separate")
    before = ask(policy).state_values
    trunk = policy.get_decoder().state_dict()
    assert all(torch.equal(x, trunk[name]) for name, x in critic.backbone.state_dict().items())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if not is_critic(name):
                p.zero_()
    assert torch.equal(ask(policy).state_values, before)


def test_a_critic_trains_whole_where_the_policy_is_frozen():
    policy = tiny_model("llama").requires_grad_(False)
    critic = build_critic(policy, "separate")
    assert all(p.requires_grad for p in critic.parameters())


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_are_computed_in_float32_where_weights_are_bfloat16_or_autocast(kind):
    whole, _ = policy_with(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ask(whole).state_values
    policy, critic = policy_with(kind, dtype=torch.bfloat16)
    assert critic.value_head.weight.dtype == torch.bfloat16
    for values in (ask(policy).state_values, under_autocast):
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())  # not rounded on the way
    trunk = critic.backbone if kind == "separate" else policy.get_decoder()
    states = trunk(**INPUTS).last_hidden_state.float()
    expected = (states * critic.value_head.weight.float()).sum(-1) + critic.value_head.bias.float()
    torch.testing.assert_close(ask(policy).state_values, expected, atol=1e-5, rtol=0)


def test_a_critic_of_another_size_starts_from_any_model_of_the_same_vocabulary(tmp_path):
    tiny_model("gpt2", seed=3, n_embd=24).save_pretrained(tmp_path / "other")
    policy, critic = policy_with("separate", str(tmp_path / "other"), head=0)
    assert critic.value_head.weight.shape == (1, 24) and not critic.value_head.weight.any()
    expected = tiny_model("gpt2", seed=3, n_embd=24).get_decoder().state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in critic.backbone.state_dict().items())
    assert ask(policy).state_values.shape == IDS.shape


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_saved_critic_is_found_in_its_folder_its_checkpoint_and_its_run(tmp_path, kind):
    policy, critic = policy_with(kind)
    save(policy, critic, tmp_path / "run" / "critic")
    for path in (tmp_path / "run" / "critic", tmp_path / "run"):
        assert critic_folder(str(path)) == tmp_path / "run" / "critic"
        again, other = policy_with(kind, str(path), head=0)
        assert torch.equal(ask(again).state_values, ask(policy).state_values)
    fresh, other = policy_with(kind, head=0)
    other.load(tmp_path / "run" / "critic")
    assert torch.equal(ask(fresh).state_values, ask(policy).state_values)


def test_the_folder_of_a_separate_critic_holds_a_model_that_plain_transformers_loads(tmp_path):
    from transformers import AutoModel

    policy, critic = policy_with("separate")
    save(policy, critic, tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(x, critic.backbone.state_dict()[name]) for name, x in model.state_dict().items())


def test_weights_are_parted_into_the_policy_s_and_the_critic_s():
    policy, critic = policy_with("separate")
    mine, its = split_weights(policy.state_dict())
    assert mine.keys() == tiny_model("llama").state_dict().keys()
    assert its.keys() == critic.state_dict().keys()


REFUSED = {
    "a path that is not there": ("separate", "nowhere", "there is no model at"),
    "a folder without weights": ("separate", "empty", "holds no weights"),
    "a plain model for a shared critic": ("shared", "plain", HEAD_FILE),
    "a separate critic for a shared one": ("shared", "separate", "holds a separate critic, but --critic is shared"),
    "a shared critic for a separate one": ("separate", "shared", "holds a shared critic, but --critic is separate"),
}


@pytest.fixture
def starts(tmp_path):
    (tmp_path / "empty").mkdir()
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    tiny_model("llama", vocab_size=VOCAB + 2).save_pretrained(tmp_path / "wordy")
    for kind in ("separate", "shared"):
        save(*policy_with(kind), tmp_path / kind / "critic")
    save(*policy_with("shared", hidden_size=32), tmp_path / "wide")
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_a_path_that_no_such_critic_can_start_from_is_refused_before_a_model_loads(starts, case):
    kind, name, message = REFUSED[case]
    for check in (check_critic_path, lambda *given: build_critic(tiny_model("llama"), *given)):
        with pytest.raises(ModelError, match=message):
            check(kind, str(starts / name))


def test_a_critic_of_another_vocabulary_is_refused(starts):
    with pytest.raises(ModelError, match=rf"another vocabulary than the policy \({VOCAB + 2} and {VOCAB} tokens\)"):
        build_critic(tiny_model("llama"), "separate", str(starts / "wordy"))


def test_a_head_of_another_width_is_refused(starts):
    with pytest.raises(ModelError, match="does not fit this model"):
        build_critic(tiny_model("llama"), "shared", str(starts / "wide"))


def test_weights_of_the_other_kind_are_not_loaded(starts):
    for kind, other in (("separate", "shared"), ("shared", "separate")):
        critic = build_critic(tiny_model("llama"), kind)
        with pytest.raises(ModelError, match=f"holds a {other} critic"):
            critic.load(starts / other / "critic")
    with pytest.raises(ModelError, match="holds no critic of this kind"):
        build_critic(tiny_model("llama"), "shared").load(starts / "wide")


def test_a_quantised_policy_is_not_copied():
    policy = tiny_model("llama")
    policy.is_quantized = True
    with pytest.raises(ModelError, match="--critic shared"):
        build_critic(policy, "separate")


def test_a_new_critic_begins_at_the_mean_reward_and_a_trained_one_is_left_alone(tmp_path):
    trainer = tiny_ppo(tmp_path, head=0.0, max_steps=1, learning_rate=0.0)
    assert trainer.critic.is_new
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    mean = sum(row["total"] for row in rows) / len(rows)
    assert mean != 0
    assert trainer.critic.value_head.bias.item() == pytest.approx(mean, abs=1e-6)
    assert not trainer.critic.is_new
    trained = tiny_ppo(tmp_path / "trained", head=0.3, max_steps=1, learning_rate=0.0)
    before = trained.critic.value_head.bias.item()
    trained.train()
    assert trained.critic.value_head.bias.item() == before
