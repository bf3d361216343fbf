"""Every objective's gradient against the exact gradient of what it states, by listing all that a toy policy may sample.

The trainer samples what the test chose and does the rest itself: rewards, advantages, the packed forward, the loss.
The oracles are plain forwards, one completion at a time, and sums over all seven completions or all their groups.
A mean over *all* samples, each with its probability, has no sampling noise: unbiased means equal.
"""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from toy import (
    COMPLETIONS,
    LONGEST,
    PROMPT,
    REWARDS,
    ROWS,
    STOP,
    A,
    B,
    exact_logprobs,
    expected_reward,
    gradient,
    groups,
    mean_gradient,
    step_gradient,
    step_loss,
    token_logprobs,
    toy_model,
    toy_trainer,
)

from rlseq.errors import TrainingError
from rlseq.training.rollouts import MicroBatch

ROUNDING = 1e-6  # rewards and log-probs travel in float32; gradients here are of size 0.1 and more


def assert_equal(found, expected):
    assert expected.abs().max() > 0.01, "a gradient of zero would equal anything that vanishes"
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=ROUNDING)


# policy gradients with the advantages of a group, a greedy completion or the batch


@pytest.mark.parametrize(
    "baseline, G, share",
    [
        ("leave_one_out", 2, 1),
        ("leave_one_out", 3, 1),
        ("mean", 2, 1 / 2),  # the mean holds the sample itself, which shrinks the gradient by (G − 1) / G
        ("mean", 3, 2 / 3),
        ("batch", 2, 1 / 2),  # so does the mean of a batch, by (B − 1) / B
        ("greedy", 2, 1),
    ],
)
def test_an_unscaled_policy_gradient_has_the_gradient_of_expected_reward_as_its_mean(
    tmp_path, monkeypatch, baseline, G, share
):
    trainer = toy_trainer(tmp_path, advantage_baseline=baseline, num_generations=G)
    exact = gradient(expected_reward(trainer.model, PROMPT), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -share / LONGEST * exact)  # dr_grpo divides by the longest


@pytest.mark.parametrize("baseline", ["greedy", "batch"])
def test_one_sample_a_prompt_is_enough_for_a_baseline_from_elsewhere(tmp_path, monkeypatch, baseline):
    # Two prompts, one sample each: the mean over all 49 pairs.
    trainer = toy_trainer(tmp_path, rows=ROWS, num_generations=1, advantage_baseline=baseline)
    probs = [exact_logprobs(trainer.model, p.prompt_ids) for p in trainer.prompts]
    found = sum(
        (probs[0][y] + probs[1][z]).exp().item() * step_gradient(trainer, monkeypatch, [y], [z])
        for y, z in itertools.product(COMPLETIONS, repeat=2)
    )
    both = sum(expected_reward(trainer.model, p.prompt_ids) for p in trainer.prompts) / 2
    share = 1 if baseline == "greedy" else 1 / 2
    assert_equal(found, -share / LONGEST * gradient(both, trainer.model))


def test_std_scaled_grpo_is_the_mean_over_enumerated_groups(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, num_generations=3, scale_rewards="group", loss_type="grpo")
    logprobs = exact_logprobs(trainer.model, PROMPT)
    # Σ over groups of p(group) · (1/G) Σ_g A_g / |y_g| · ∇log p(y_g): the weight of each completion's ∇log p.
    weight = dict.fromkeys(COMPLETIONS, 0.0)
    for group, p in groups(trainer.model, PROMPT, 3):
        rewards = [REWARDS[y] for y in group]
        for y, reward in zip(group, rewards, strict=True):
            advantage = (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)
            weight[y] += p * advantage / len(y) / 3
    expected = gradient(sum(weight[y] * logprobs[y] for y in COMPLETIONS), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -expected)
    # It is not the gradient of expected reward, nor a multiple of it.
    exact = gradient(expected_reward(trainer.model, PROMPT), trainer.model)
    assert torch.cosine_similarity(expected, exact, dim=0) < 0.999


def test_dapo_weighs_every_token_of_a_step_alike(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, loss_type="dapo")
    logprobs = exact_logprobs(trainer.model, PROMPT)
    weight = dict.fromkeys(COMPLETIONS, 0.0)
    for (y, z), p in groups(trainer.model, PROMPT, 2):
        advantage = (REWARDS[y] - REWARDS[z]) / 2
        weight[y] += p * advantage / (len(y) + len(z))
        weight[z] -= p * advantage / (len(y) + len(z))
    expected = gradient(sum(weight[y] * logprobs[y] for y in COMPLETIONS), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -expected)


def test_the_mean_over_real_samples_is_the_exact_gradient_within_its_standard_error(tmp_path):
    # The same with rlseq's sampler: 60 rounds of 64 groups of 2, along 20 random directions.
    trainer = toy_trainer(
        tmp_path, rows=[{**ROWS[0], "n": n} for n in range(64)], advantage_baseline="leave_one_out", max_steps=1
    )
    exact = -gradient(expected_reward(trainer.model, PROMPT), trainer.model) / LONGEST
    rows = [trainer.train_dataset[i] for i in range(64) for _ in range(2)]
    found = []
    for round in range(60):
        trainer._step = round  # names the noise
        batch = trainer.make_batch(rows).trained
        found.append(gradient(trainer.micro_batch_loss(trainer.model, batch), trainer.model))
    directions = torch.randn(len(exact), 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = torch.stack(found) @ directions  # (60, 20)
    error = samples.std(0) / math.sqrt(60)
    z = (samples.mean(0) - exact @ directions) / error
    assert z.abs().max() < 4
    assert ((exact @ directions).abs() / error).max() > 8, "so many samples tell the gradient from zero"


# reference-exact


@pytest.mark.parametrize("G", [1, 2, 3])
def test_the_reference_exact_gradient_is_unbiased_for_every_group_size(tmp_path, monkeypatch, G):
    trainer = toy_trainer(tmp_path, objective="reference_exact", num_generations=G)
    exact = gradient(expected_reward(trainer.model, PROMPT), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -exact)


def toy_model_that_gives(completion, chance):
    """A toy policy, trained by plain likelihood until one completion of PROMPT has that chance."""
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3000):
        loss = -token_logprobs(model, PROMPT, completion).sum()
        if loss < -math.log(chance):
            return model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the toy policy does not learn {completion}")


@pytest.mark.parametrize("chance", [0.9, 0.999])
@pytest.mark.parametrize("G", [1, 2])
def test_it_stays_unbiased_where_the_reference_is_nearly_certain(tmp_path, monkeypatch, G, chance):
    model = toy_model_that_gives((B, STOP), chance)
    trainer = toy_trainer(tmp_path, model=model, objective="reference_exact", num_generations=G)
    exact = gradient(expected_reward(trainer.model, PROMPT), trainer.model)
    found = mean_gradient(trainer, monkeypatch)
    assert exact.norm() > 1e-3
    assert (found + exact).norm() < 1e-3 * exact.norm()  # float32 rewards and the P of a nearly sure thing


def test_it_is_unbiased_with_several_references_and_a_baseline_from_other_prompts(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, rows=ROWS, objective="reference_exact", num_generations=1)
    probs = [exact_logprobs(trainer.model, p.prompt_ids) for p in trainer.prompts]
    found = sum(
        (probs[0][y] + probs[1][z]).exp().item() * step_gradient(trainer, monkeypatch, [y], [z])
        for y, z in itertools.product(COMPLETIONS, repeat=2)
    )
    both = sum(expected_reward(trainer.model, p.prompt_ids) for p in trainer.prompts) / 2
    assert_equal(found, -gradient(both, trainer.model))


def variance(trainer, monkeypatch):
    """Σ p(group)·‖g − mean‖² over all groups."""
    mean, square = 0.0, 0.0
    for group, p in groups(trainer.model, PROMPT, trainer.args.num_generations):
        g = step_gradient(trainer, monkeypatch, group)
        mean, square = mean + p * g, square + p * g.square().sum()
    return (square - mean.square().sum()).item()


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
def test_its_variance_is_below_that_of_other_unbiased_gradients_on_the_same_samples(tmp_path, monkeypatch, chance):
    model = toy_model_that_gives((B, STOP), chance)
    ours = variance(toy_trainer(tmp_path / "a", model=model, objective="reference_exact"), monkeypatch)
    for baseline in ("leave_one_out", "greedy"):
        other = toy_trainer(tmp_path / baseline, model=model, advantage_baseline=baseline)
        assert ours < LONGEST**2 * variance(other, monkeypatch)  # dr_grpo's constant divides those gradients


def test_a_group_that_is_all_right_still_teaches(tmp_path, monkeypatch):
    right = [(B, STOP)] * 2
    ours = toy_trainer(tmp_path / "a", objective="reference_exact")
    theirs = toy_trainer(tmp_path / "b", advantage_baseline="leave_one_out")
    assert step_gradient(theirs, monkeypatch, right).abs().max() == 0
    assert step_gradient(ours, monkeypatch, right).abs().max() > 0.01


# exact expected accuracy


def is_reference(completion_ids, references):
    return float(tuple(completion_ids) in {({"a": A, "b": B}[x], STOP) for x in references})


@pytest.mark.parametrize("row", [0, 1])
def test_grpo_under_exact_match_has_expected_accuracy_as_its_mean(tmp_path, monkeypatch, row):
    exact = toy_trainer(
        tmp_path / "a", rows=ROWS[row : row + 1], objective="expected_accuracy", per_device_train_batch_size=2
    )
    sampled = toy_trainer(tmp_path / "b", rows=ROWS[row : row + 1], rewards=[is_reference], num_generations=2)
    batch = MicroBatch((0, 0), (exact.prompts[0].prompt_ids,) * 2)
    loss = exact.micro_batch_loss(exact.model, batch)
    rewards = {y: is_reference(y, ROWS[row]["references"]) for y in COMPLETIONS}
    chance = expected_reward(exact.model, exact.prompts[0].prompt_ids, rewards)
    assert loss.item() == pytest.approx(-chance.item(), abs=ROUNDING)
    found = gradient(loss, exact.model)
    assert_equal(found, -gradient(chance, exact.model))
    assert_equal(mean_gradient(sampled, monkeypatch), found / 2 / LONGEST)  # (G − 1) / G, and dr_grpo's constant


def max_rl(chance, order):
    return -sum((1 - chance) ** k / k for k in range(1, order + 1))


@pytest.mark.parametrize("order", [1, 2, 7, 200])
@pytest.mark.parametrize("row", [0, 1])
def test_max_rl_is_the_series_of_the_enumerated_chance_of_a_right_answer(tmp_path, row, order):
    trainer = toy_trainer(
        tmp_path, rows=ROWS[row : row + 1], objective="max_rl", max_rl_order=order, per_device_train_batch_size=2
    )
    rewards = {y: is_reference(y, ROWS[row]["references"]) for y in COMPLETIONS}
    chance = expected_reward(trainer.model, trainer.prompts[0].prompt_ids, rewards)
    batch = MicroBatch((0, 0), (trainer.prompts[0].prompt_ids,) * 2)
    loss = trainer.micro_batch_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(-max_rl(chance, order).item(), abs=ROUNDING)
    assert_equal(gradient(loss, trainer.model), -gradient(max_rl(chance, order), trainer.model))


@pytest.mark.parametrize("G", [2, 3])
def test_advantages_over_the_group_s_mean_have_the_gradient_of_max_rl_as_their_mean(tmp_path, monkeypatch, G):
    def right(completion_ids):
        return is_reference(completion_ids, ["a", "b"])

    trainer = toy_trainer(tmp_path, rewards=[right], num_generations=G, scale_rewards="mean")
    chance = expected_reward(trainer.model, PROMPT, {y: right(y) for y in COMPLETIONS})
    exact = gradient(max_rl(chance, G - 1), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -exact / LONGEST)  # dr_grpo divides by the longest


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sampled_max_rl_of_an_order_has_its_gradient_as_mean(tmp_path, monkeypatch, order):
    def right(completion_ids):
        return float(is_reference(completion_ids, ["a", "b"]))

    trainer = toy_trainer(tmp_path, rewards=[right], num_generations=3, scale_rewards="mean", max_rl_order=order)
    chance = expected_reward(trainer.model, PROMPT, {y: right(y) for y in COMPLETIONS})
    exact = gradient(max_rl(chance, order), trainer.model)
    assert_equal(mean_gradient(trainer, monkeypatch), -exact / LONGEST)


def test_sampled_max_rl_of_an_order_counts_successes(tmp_path):
    settings = {"rewards": [lambda completion_ids: 0.5], "scale_rewards": "mean", "max_rl_order": 2}
    trainer = toy_trainer(tmp_path, **settings)
    with pytest.raises(TrainingError, match=r"reward 0\.5, but max_rl_order counts successes"):
        trainer.make_batch([trainer.train_dataset[0]] * 2)


def test_advantages_over_the_group_s_mean_need_rewards_from_0_up(tmp_path):
    trainer = toy_trainer(tmp_path, rewards=[lambda completion_ids: -1.0], scale_rewards="mean")
    with pytest.raises(TrainingError, match="a rollout has reward -1, but scale_rewards mean divides by"):
        trainer.make_batch([trainer.train_dataset[0]] * 2)


# minimum risk


@pytest.mark.parametrize("sharpness", [0.5, 1.0])
@pytest.mark.parametrize("references", [False, True])
def test_minimum_risk_is_the_explicit_sum_over_each_enumerated_set(tmp_path, monkeypatch, sharpness, references):
    trainer = toy_trainer(
        tmp_path,
        objective="minimum_risk",
        minimum_risk_sharpness=sharpness,
        minimum_risk_references=references,
        num_generations=2,
    )
    seen_duplicates = 0
    for group, _ in groups(trainer.model, PROMPT, 2):
        members = set(group) | ({(B, STOP)} if references else set())  # a set: each once, the reference too
        seen_duplicates += len(members) < 2 + references
        logprobs = exact_logprobs(trainer.model, PROMPT)
        weights = {y: logprobs[y].exp() ** sharpness for y in members}
        risk = sum(weights[y] / sum(weights.values()) * -REWARDS[y] for y in members)
        loss = step_loss(trainer, monkeypatch, group)
        assert loss.item() == pytest.approx(risk.item(), abs=ROUNDING)
        torch.testing.assert_close(
            gradient(loss, trainer.model), gradient(risk, trainer.model), atol=ROUNDING, rtol=ROUNDING
        )
    assert seen_duplicates > 5


# KL to the start


def hand_made(completion, **more):
    """A micro-batch of one completion of PROMPT, as the trainer hands it to its loss."""
    fields = {
        "mask": (torch.arange(LONGEST) < len(completion))[None],
        "trained_tokens": torch.tensor(1.0),  # so that a "mean over tokens" is a sum
        "advantages": torch.zeros(1, dtype=torch.float64),
    }
    return MicroBatch((0,), (PROMPT,), (completion,), **fields | more)


def padded(values):
    return torch.cat([values, values.new_zeros(LONGEST - len(values))])[None]


PREFIXES = [(), (A,), (B,)]  # whatever a next token may follow


def next_logprobs(model, prefix):
    return model(input_ids=torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].log_softmax(-1)


def kl_by_prefix(model, start, *, forward):
    """Σ over prefixes of p(prefix), held fixed, times the KL of the next token."""
    total = 0.0
    for prefix in PREFIXES:
        p, q = next_logprobs(model, prefix), next_logprobs(start, prefix).detach()
        chance = token_logprobs(model, PROMPT, prefix).sum().exp().detach() if prefix else 1.0
        if forward:
            p, q = q, p
        total = total + chance * (p.exp() * (p - q)).sum()
    return total


@pytest.mark.parametrize(
    "objective, kind, forward",
    [
        ("policy_gradient", "k2", False),
        ("policy_gradient", "k3", True),
        ("policy_gradient", None, False),  # TRL's k3 times the ratio, whose gradient is the reverse KL's
        ("minimum_risk", "k2", False),
        ("minimum_risk", "k3", True),
        ("minimum_risk", None, True),
    ],
)
def test_a_kl_in_the_loss_is_that_of_the_next_token_with_prefixes_held_fixed(tmp_path, objective, kind, forward):
    start = toy_model(seed=1)
    loss = {"loss_type": "dapo"} if objective == "policy_gradient" else {}
    trainer = toy_trainer(tmp_path, objective=objective, **loss)
    trainer.beta, trainer.args.kl_estimator = 0.7, kind  # afterwards: the start is made by hand below
    trainer.num_generations = 1  # one completion at a time: no risk to compare, only the KL
    logprobs = exact_logprobs(trainer.model, PROMPT)
    found = sum(logprobs[y].exp().item() * kl_gradient(trainer, start, y) for y in COMPLETIONS)
    assert_equal(found, 0.7 * gradient(kl_by_prefix(trainer.model, start, forward=forward), trainer.model))
    other = gradient(kl_by_prefix(trainer.model, start, forward=not forward), trainer.model)
    assert (found - 0.7 * other).abs().max() > 1e-3


def kl_gradient(trainer, start, y):
    ref = padded(token_logprobs(start, PROMPT, y).detach())
    batch = hand_made(y, ref_logprobs=ref, totals=torch.zeros(1, dtype=torch.float64))
    return gradient(trainer.micro_batch_loss(trainer.model, batch), trainer.model)


def test_k1_in_the_loss_regularises_nothing(tmp_path):
    start = toy_model(seed=1)
    trainer = toy_trainer(tmp_path, loss_type="dapo")
    trainer.beta = 0.7
    trainer.args.kl_estimator = "k1"  # which the settings refuse: this is why
    logprobs = exact_logprobs(trainer.model, PROMPT)
    found = [logprobs[y].exp().item() * kl_gradient(trainer, start, y) for y in COMPLETIONS]
    assert max(g.abs().max() for g in found) > 0.01
    assert sum(found).abs().max() < ROUNDING


def test_k1_as_reward_to_go_is_the_sequence_s_reverse_kl(tmp_path):
    start = toy_model(seed=1)
    trainer = toy_trainer(tmp_path, loss_type="dapo")
    logprobs, ref = exact_logprobs(trainer.model, PROMPT), exact_logprobs(start, PROMPT)
    kl = sum(logprobs[y].exp() * (logprobs[y] - ref[y].detach()) for y in COMPLETIONS)
    found = 0.0
    for y in COMPLETIONS:
        difference = (token_logprobs(trainer.model, PROMPT, y) - token_logprobs(start, PROMPT, y)).detach()
        to_go = difference.flip(0).cumsum(0).flip(0)  # Σ_{s ≥ t} k1_s
        loss = trainer.micro_batch_loss(trainer.model, hand_made(y, advantages=-padded(to_go)))
        found = found + logprobs[y].exp().item() * gradient(loss, trainer.model)
    assert_equal(found, gradient(kl, trainer.model))
