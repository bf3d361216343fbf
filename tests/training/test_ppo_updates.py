"""PPO's updates: one forward a micro-batch, the loss and its gradients by plain forwards, warm-up, epochs and KL."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from tiny import EOS, tiny_model
from tiny_ppo import (
    equal,
    fake_sampler,
    generated,
    plain_logprobs,
    plain_values,
    policy_and_critic,
    saved_model,
    tiny_ppo,
)
from transformers import TrainerCallback

COMPLETIONS = [(14, EOS), (15, 16, 5, EOS), (17, 18, 19, 20, 21, 22), (EOS,)]
TOKENS = 13
CRITICS = [("separate", False), ("shared", False), ("shared", True)]


def batch(tmp_path, monkeypatch, **settings):
    """A trainer, and a batch whose old log-probs and values are moved off, so that both clips are at work."""
    trainer = tiny_ppo(tmp_path, per_device_train_batch_size=4, **settings)
    fake_sampler(monkeypatch, trainer, COMPLETIONS)
    output = generated(trainer, range(4))
    noise = torch.Generator().manual_seed(2)
    shape = output.advantages.shape
    old = output.sampled_logprobs + 0.4 * torch.randn(shape, generator=noise)
    values = output.values + 0.4 * torch.randn(shape, generator=noise)
    return trainer, dataclasses.replace(output, old_logprobs=old, values=values)


class Counting(torch.nn.Module):
    """Calls the model, and counts."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **inputs):
        self.calls += 1
        return self.model(**inputs)


@pytest.mark.parametrize("reference_loss_coef", [0.0, 0.5])
@pytest.mark.parametrize(("critic", "trunk_gradient"), CRITICS)
def test_a_micro_batch_takes_one_forward(tmp_path, monkeypatch, critic, trunk_gradient, reference_loss_coef):
    settings = {"critic": critic, "critic_trunk_gradient": trunk_gradient, "reference_loss_coef": reference_loss_coef}
    trainer, output = batch(tmp_path, monkeypatch, **settings)
    model, passes = Counting(trainer.model), []
    trunks = [trainer.model.get_decoder()] + ([trainer.critic.backbone] if critic == "separate" else [])
    for trunk in trunks:
        trunk.register_forward_hook(lambda module, *_: passes.append(module))
    trainer.micro_batch_loss(model, output)
    assert model.calls == 1
    assert passes == trunks


def plain_loss(trainer, output, *, vf_coef, value_clip, clip=0.2):
    """Clipped surrogate plus value loss, the mean over all tokens, from a forward of each sequence alone."""
    critic, total = trainer.critic, 0.0
    trunk = critic.backbone if critic.backbone is not None else trainer.model.get_decoder()
    for row, y in enumerate(COMPLETIONS):
        prompt = trainer.prompts[row].prompt_ids
        logprobs = plain_logprobs(trainer.model, prompt, y)
        values = plain_values(trunk, critic.value_head, prompt, y)[:-1]
        if critic.backbone is None and not critic.trunk_gradient:
            states = trunk(input_ids=torch.tensor([[*prompt, *y]])).last_hidden_state[0, len(prompt) - 1 : -1]
            values = critic.value_head(states.detach()).squeeze(-1)
        for t in range(len(y)):
            advantage, ret = output.advantages[row, t], output.returns[row, t]
            ratio = (logprobs[t] - output.old_logprobs[row, t]).exp()
            total = total - min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            error = (values[t] - ret) ** 2
            if value_clip is not None:
                old = output.values[row, t]
                error = max(error, (old + (values[t] - old).clamp(-value_clip, value_clip) - ret) ** 2)
            total = total + vf_coef * 0.5 * error
    return total / TOKENS


@pytest.mark.parametrize("value_clip", [None, 0.1])
@pytest.mark.parametrize(("critic", "trunk_gradient"), CRITICS)
def test_the_loss_is_the_clipped_surrogate_plus_the_value_loss(
    tmp_path, monkeypatch, critic, trunk_gradient, value_clip
):
    settings = {"critic": critic, "critic_trunk_gradient": trunk_gradient, "vf_coef": 0.7, "value_clip": value_clip}
    trainer, output = batch(tmp_path, monkeypatch, **settings)
    parameters = dict(trainer.model.named_parameters())
    found, expected = [], []
    for into, loss in (
        (found, trainer.micro_batch_loss(trainer.model, output)),
        (expected, plain_loss(trainer, output, vf_coef=0.7, value_clip=value_clip)),
    ):
        into.append(loss.detach())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        into += [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]
    for name, mine, theirs in zip(["loss", *parameters], found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    clipped = trainer._metrics["train"].get("critic/clip_fraction")
    moved = (output.values - trainer_values(trainer, output)).abs() > 0.1
    share = moved[output.value_mask].float().mean().item()
    assert clipped == (None if value_clip is None else [pytest.approx(share, abs=1e-6)])
    assert 0.1 < share < 0.95  # both sides of the clip occur


def trainer_values(trainer, output):
    return trainer.batches.advantages.ask_critic(output)[0]


def gradients(trainer, loss):
    """Whether (the policy, the critic's backbone, its head) got any gradient."""
    loss.backward()
    found = [False, False, False]
    for name, p in trainer.model.named_parameters():
        place = 2 if "value_head" in name else 1 if "rlseq_critic" in name else 0
        found[place] |= p.grad is not None and bool(p.grad.any())
    return found


@pytest.mark.parametrize(
    ("critic", "trunk_gradient", "reached"),
    [
        ("separate", False, [False, True, True]),
        ("shared", False, [False, False, True]),
        ("shared", True, [True, False, True]),
    ],
)
def test_the_value_loss_reaches_what_it_may(tmp_path, monkeypatch, critic, trunk_gradient, reached):
    trainer, output = batch(tmp_path, monkeypatch, critic=critic, critic_trunk_gradient=trunk_gradient)
    output = dataclasses.replace(output, advantages=torch.zeros_like(output.advantages))
    assert gradients(trainer, trainer.micro_batch_loss(trainer.model, output)) == reached


@pytest.mark.parametrize(("critic", "trunk_gradient"), CRITICS)
def test_the_policy_s_loss_leaves_the_critic_alone(tmp_path, monkeypatch, critic, trunk_gradient):
    settings = {"critic": critic, "critic_trunk_gradient": trunk_gradient, "vf_coef": 0.0}
    trainer, output = batch(tmp_path, monkeypatch, **settings)
    assert gradients(trainer, trainer.micro_batch_loss(trainer.model, output)) == [True, False, False]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_each_loss_of_trl_takes_advantages_a_token_as_it_takes_them_a_row(tmp_path, monkeypatch, loss_type, level):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "vf_coef": 0.0}
    trainer, output = batch(tmp_path, monkeypatch, **settings)
    of_rows = torch.tensor([1.0, -0.5, 0.25, -2.0])
    found = []
    for advantages in (of_rows, of_rows[:, None].expand(4, 6).contiguous()):
        loss = trainer.micro_batch_loss(trainer.model, dataclasses.replace(output, advantages=advantages))
        found.append(torch.autograd.grad(loss, trainer.model.lm_head.weight)[0])
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


class Recorder(TrainerCallback):
    """Copies (policy, critic) at the start and after each step."""

    def __init__(self, trainer):
        self.trainer, self.after = trainer, [policy_and_critic(trainer)]

    def on_step_end(self, args, state, control, **_):
        self.after.append(policy_and_critic(self.trainer))


def trained(tmp_path, **settings):
    """A trainer after its run, the weights after each step, and the log of each step."""
    trainer = tiny_ppo(tmp_path, **settings)
    trainer.add_callback(recorder := Recorder(trainer))
    trainer.train()
    return trainer, recorder.after, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_an_update_and_its_log_do_not_depend_on_the_micro_batch_split(tmp_path, critic):
    settings = {"critic": critic, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "max_steps": 2}
    settings |= {"num_iterations": 2, "value_clip": 0.2}
    _, whole, whole_log = trained(tmp_path / "a", per_device_train_batch_size=8, **settings)
    assert not equal(whole[0][0], whole[2][0])
    for size in (4, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        _, parts, log = trained(tmp_path / str(size), **split, **settings)
        for mine, theirs in zip(parts[2], whole[2], strict=True):
            for name, weight in mine.items():
                torch.testing.assert_close(weight, theirs[name], atol=2e-5, rtol=0)
        for line, expected, many in zip(log, whole_log, (11, 3), strict=True):  # of the round, and of an update
            names = [n for n in expected if n.startswith(("critic/", "returns/", "advantages/")) or n == "approx_kl"]
            assert len(names) == many
            assert {n: line[n] for n in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-4)
    assert whole_log[1]["approx_kl"] > 1e-4


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_while_the_critic_warms_up_the_policy_stands_still_bit_for_bit(tmp_path, critic):
    settings = {"critic": critic, "critic_warmup_steps": 2, "weight_decay": 0.1, "max_steps": 3}
    _, after, _ = trained(tmp_path, **settings)
    assert equal(after[0][0], after[1][0]) and equal(after[1][0], after[2][0])
    assert not equal(after[2][0], after[3][0])
    for before, now in pairwise(after):
        assert not equal(before[1], now[1])


def test_while_the_critic_warms_up_the_clip_of_the_norm_is_of_its_gradient_alone(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e-3, "vf_coef": 1e-2, "max_steps": 1}
    _, (before, after), (log,) = trained(tmp_path, critic_warmup_steps=1, **settings)
    moved = sum((after[1][name] - before[1][name]).square().sum() for name in after[1]).sqrt().item()
    assert log["grad_norm"] > 2e-3
    assert moved == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("rate", [None, 3e-4])
def test_the_critic_s_learning_rate_is_of_the_critic_s_parameters_alone(tmp_path, rate):
    trainer = tiny_ppo(tmp_path, critic_learning_rate=rate, learning_rate=1e-2, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            assert id(p) in names
            found[names.pop(id(p))] = (group["lr"], group["weight_decay"])
    assert not names  # each parameter once
    for name, (lr, decay) in found.items():
        assert lr == (rate if rate and "rlseq_critic" in name else 1e-2)
        assert decay == (0.0 if "norm" in name or "bias" in name else 0.1)


def test_the_critic_s_learning_rate_follows_the_schedule(tmp_path):
    trainer, _, _ = trained(
        tmp_path, critic_learning_rate=4e-3, learning_rate=1e-2, lr_scheduler_type="linear", max_steps=4
    )
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}
    assert set(trainer.lr_scheduler.base_lrs) == {1e-2, 4e-3}


EPOCHS = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}


def test_every_epoch_compares_with_the_log_probs_and_values_of_rollout_time(tmp_path):
    trainer = tiny_ppo(tmp_path, max_steps=4, **EPOCHS)
    model, seen = tiny_model("llama", initializer_range=0.1), []
    critic = {name: p.clone() for name, p in trainer.critic.state_dict().items()}
    compute = trainer.micro_batch_loss

    def looking(model, inputs):
        loss = compute(model, inputs)
        seen.append(inputs)
        return loss

    trainer.micro_batch_loss = looking
    trainer.train()
    assert len(seen) == 4
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and not (tmp_path / "rollouts/000002.jsonl").exists()
    for first, second in ((seen[0], seen[2]), (seen[1], seen[3])):
        for name in ("old_logprobs", "values", "advantages", "returns"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert first.completion_ids == second.completion_ids
    trainer.critic.load_state_dict(critic)
    for batch in seen[:2]:
        for i, (index, y) in enumerate(zip(batch.prompt_index, batch.completion_ids, strict=True)):
            prompt = trainer.prompts[index].prompt_ids
            old = plain_logprobs(model, prompt, y)
            values = plain_values(trainer.critic.backbone, trainer.critic.value_head, prompt, y)[:-1]
            torch.testing.assert_close(batch.old_logprobs[i, : len(y)], old, atol=2e-5, rtol=0)
            torch.testing.assert_close(batch.values[i, : len(y)], values, atol=2e-5, rtol=0)
    log = [line["approx_kl"] for line in trainer.state.log_history if "approx_kl" in line]
    assert abs(log[0]) < 1e-6 and min(log[1:]) > 1e-3


def test_past_target_kl_the_rest_of_the_round_is_left_out_and_the_next_round_goes_on(tmp_path):
    _, after, log = trained(tmp_path, max_steps=6, target_kl=1e-3, weight_decay=0.1, **EPOCHS)
    assert log[1]["approx_kl"] > 1e-3
    assert [line["updates_left_out"] for line in log] == [0, 1, 1, 1, 0, 1]
    still = [all(equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(after)]
    assert still == [False, True, True, True, False, True]


def test_below_target_kl_nothing_is_left_out(tmp_path):
    _, after, log = trained(tmp_path / "a", max_steps=4, target_kl=100.0, **EPOCHS)
    _, free, _ = trained(tmp_path / "b", max_steps=4, **EPOCHS)
    assert [line["updates_left_out"] for line in log] == [0, 0, 0, 0]
    assert equal(after[4][0], free[4][0]) and equal(after[4][1], free[4][1])


def test_target_kl_judges_all_micro_batches_of_an_update(tmp_path):
    split = {"num_iterations": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    whole = {"num_iterations": 3, "per_device_train_batch_size": 8}
    _, _, reference = trained(tmp_path / "a", max_steps=3, learning_rate=2e-3, **whole)
    target = (reference[1]["approx_kl"] + reference[2]["approx_kl"]) / 2
    assert reference[1]["approx_kl"] < target < reference[2]["approx_kl"]
    for name, settings in (("b", split), ("c", whole)):
        _, _, log = trained(tmp_path / name, max_steps=3, learning_rate=2e-3, target_kl=target, **settings)
        assert [line["updates_left_out"] for line in log] == [0, 0, 1]


def test_kl_target_adapts_beta_once_a_round_by_ziegler_s_rule(tmp_path):
    settings = {"beta": 0.1, "kl_target": 0.05, "max_steps": 8, "learning_rate": 3e-2, "num_iterations": 2}
    trainer, _, log = trained(tmp_path / "run", model=saved_model(tmp_path / "model"), **settings)
    rounds = log[::2]
    beta = 0.1
    for number, line in enumerate(rounds):
        assert line["kl_coefficient"] == pytest.approx(beta, rel=1e-6)
        kl = line["kl_penalty"] / beta  # nats a completion; its own test is in test_ppo.py
        assert (abs(kl) < 1e-5) == (number == 0)
        beta *= 1 + 0.1 * max(-0.2, min(0.2, kl / 0.05 - 1))
    assert trainer.beta != 0.1


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_gradient_checkpointing_changes_no_rollout_no_value_and_no_update(tmp_path, critic):
    settings = {"critic": critic, "critic_trunk_gradient": critic == "shared", "optim": "sgd", "learning_rate": 0.1}
    _, plain, plain_log = trained(tmp_path / "a", gradient_checkpointing=False, **settings)
    trainer, saving, log = trained(tmp_path / "b", gradient_checkpointing=True, **settings)
    trunks = [trainer.model.get_decoder()] + ([trainer.critic.backbone] if critic == "separate" else [])
    assert all(trunk.layers[0].gradient_checkpointing for trunk in trunks)
    files = [(tmp_path / name / "rollouts/000002.jsonl").read_text() for name in ("a", "b")]
    assert files[0] == files[1]
    for part in (0, 1):
        for name, p in saving[2][part].items():
            torch.testing.assert_close(p, plain[2][part][name], atol=1e-6, rtol=0)
    assert [x["critic/explained_variance"] for x in log] == pytest.approx(
        [x["critic/explained_variance"] for x in plain_log], abs=1e-5
    )
