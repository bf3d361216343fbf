"""Losses: hand arithmetic, loops over the definitions, and gradients by enumeration of a toy vocabulary."""

import itertools
import math

import pytest
import torch

from rlseq.losses import (
    cispo,
    clipped_surrogate,
    expected_accuracy,
    gae,
    group_advantages,
    importance_ratio,
    kl_estimate,
    masked_mean,
    minimum_risk,
    reduce_losses,
    sapo,
    value_loss,
    vespo,
    vespo_weight,
)

NAN = math.nan


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# masked_mean


def test_a_masked_mean_counts_the_same_entries_above_and_below():
    x, mask = tensor([[1, 2, 100], [4, NAN, math.inf]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 0.0]


def test_a_fully_masked_batch_gives_a_finite_zero_with_a_zero_gradient():
    x = tensor([[1.0, 2.0]]).requires_grad_()
    loss = masked_mean(x, torch.zeros(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and x.grad.tolist() == [[0.0, 0.0]]


def test_every_per_token_loss_is_zero_and_silent_where_masked():
    mask = torch.tensor([[True, False, False, False]])
    bad = tensor([[0.5, NAN, math.inf, -math.inf]])
    losses = {
        "token": lambda x: clipped_surrogate(x, bad, bad, mask, clip_low=0.2, clip_high=0.2),
        "sequence": lambda x: clipped_surrogate(
            x, bad, tensor([1.0]), mask, clip_low=0.2, clip_high=0.2, level="sequence"
        ),
        "cispo": lambda x: cispo(x, bad, bad, mask, largest=2.0),
        "sapo": lambda x: sapo(x, bad, bad, mask, temperature_pos=1.0, temperature_neg=1.05),
        "vespo": lambda x: vespo(x, bad, mask, weight=tensor([[2.0]])),
        "value": lambda x: value_loss(x, bad, bad, mask, clip=0.1),
    }
    for name, loss in losses.items():
        x = tensor([[0.6, 1.0, NAN, math.inf]]).requires_grad_()
        per_token = loss(x)
        masked_mean(per_token, mask).backward()
        assert per_token[0, 1:].tolist() == [0, 0, 0], name
        assert x.grad.isfinite().all() and x.grad[0, 0] != 0 and x.grad[0, 1:].tolist() == [0, 0, 0], name


# clipped_surrogate


@pytest.mark.parametrize(
    "ratio, advantage, expected, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the policy gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # a good token that became unlikely is not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is not clipped
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, expected, slope):
    new = tensor([[math.log(ratio)]]).requires_grad_()
    mask = torch.tensor([[True]])
    for advantages in (tensor([advantage]), tensor([[advantage]])):
        loss = clipped_surrogate(new, torch.zeros_like(new), advantages, mask, clip_low=0.2, clip_high=0.28)
        assert loss.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        assert gradient.item() == pytest.approx(slope)  # d loss / d log π = −ratio·A, or 0 where clipped


def test_the_sequence_ratio_is_the_geometric_mean_over_counted_tokens():
    new, old = (
        tensor([[-1.0, -2.0, 50.0], [-1.0, -1.0, -4.0]]),
        tensor([[-1.2, -1.7, 0.0], [-1.0, -1.3, -4.6]]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    loss = clipped_surrogate(new, old, tensor([1.0, 2.0]), mask, clip_low=0.2, clip_high=0.28, level="sequence")
    first, second = math.exp((0.2 - 0.3) / 2), math.exp((0.0 + 0.3 + 0.6) / 3)
    assert loss[0].tolist() == pytest.approx([-first, -first, 0])
    assert loss[1].tolist() == pytest.approx([-2.56] * 3) and second > 1.28
    # GSPO: the gradient of a sequence's loss is −A·ρ·mean_t ∇log π(y_t)
    new.requires_grad_()
    loss = clipped_surrogate(new, old, tensor([1.0, 0]), mask, clip_low=1, clip_high=math.inf, level="sequence")
    masked_mean(loss, mask, dim=1)[0].backward()
    assert new.grad[0].tolist() == pytest.approx([-first / 2, -first / 2, 0])


def test_the_surrogate_refuses_what_does_not_fit():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="old_logprobs_BT"):
        clipped_surrogate(x, torch.zeros(2, 2), torch.zeros(2), mask, clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match=r"\(2,\) or \(2, 3\)"):
        clipped_surrogate(x, x, torch.zeros(3), mask, clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="bool"):
        clipped_surrogate(x, x, torch.zeros(2), mask.float(), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="at least 0"):
        clipped_surrogate(x, x, torch.zeros(2), mask, clip_low=-0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="'word'"):
        clipped_surrogate(x, x, torch.zeros(2), mask, clip_low=0.2, clip_high=0.2, level="word")


# the losses by loss_type


def test_the_other_policy_losses_by_hand():
    new, old, mask = tensor([[math.log(3.0), 5.0]]), tensor([[0.0, 0.0]]), torch.tensor([[True, False]])
    common = (new, old, tensor([2.0]), mask)
    assert cispo(*common, largest=2.5).tolist()[0] == pytest.approx([-2.5 * 2 * math.log(3), 0])
    gate = 4 / 0.5 / (1 + math.exp(-0.5 * 2))
    assert sapo(*common, temperature_pos=0.5, temperature_neg=9.0).tolist()[0] == pytest.approx([-gate * 2, 0])
    shape = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 9.0, "lambda_neg": 9.0}
    weight = vespo_weight(*common, **shape, importance_BT=tensor([[0.5, 7.0]]))
    assert weight.item() == pytest.approx(1.5**2 * math.exp(3 - 3 * 1.5))
    assert vespo(new, tensor([2.0]), mask, weight=weight)[0, 0].item() == pytest.approx(
        -weight.item() * 2 * math.log(3)
    )
    assert clipped_surrogate(new, old, tensor([-2.0]), mask, clip_low=0.2, clip_high=0.2, largest=2.0).tolist()[
        0
    ] == pytest.approx([4.0, 0])  # ρ = 3 counts as 2


def test_each_loss_type_is_reduced_by_hand():
    losses, mask = tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    expected = {"grpo": (1.5 + 6) / 2, "sapo": (1.5 + 6) / 2, "bnpo": 9 / 3, "dr_grpo": 9 / (2 * 5), "luspo": 9 / 2}
    expected |= dict.fromkeys(("dapo", "cispo", "vespo"), 9 / 4)
    for name, value in expected.items():
        found = reduce_losses(losses, mask, name, max_completion_length=5, step_tokens=tensor(4.0))
        assert found.item() == pytest.approx(value), name
    with pytest.raises(ValueError, match="'dpo'; expected one of grpo"):
        reduce_losses(losses, mask, "dpo", max_completion_length=5, step_tokens=tensor(4.0))


# value_loss


def test_the_value_loss_by_hand():
    values, old, returns = tensor([[1.0, 1.0, 0.0]]), tensor([[0.0, 0.9, 9.0]]), tensor([[3.0, 3.0, 5.0]])
    mask = torch.tensor([[True, True, False]])
    assert value_loss(values, old, returns, mask).tolist() == [[2.0, 2.0, 0.0]]
    # clip 0.2: the first becomes 0.2, error 2.8² / 2; the second is within the clip
    assert value_loss(values, old, returns, mask, clip=0.2)[0].tolist() == pytest.approx([3.92, 2.0, 0.0])
    values.requires_grad_()
    value_loss(values, old, returns, mask, clip=0.2).sum().backward()
    assert values.grad.tolist() == [[0.0, -2.0, 0.0]]
    with pytest.raises(ValueError, match="clip is -1"):
        value_loss(values, old, returns, mask, clip=-1)


# kl_estimate: the expectation over a vocabulary of 5, term by term


def enumerated(kind):
    """Value and gradient of Σ_y π(y)·k(y), with the sampling π(y) held fixed as sampling does."""
    logits, ref = noise(5).requires_grad_(), torch.log_softmax(noise(5, seed=1), -1)
    logprobs = torch.log_softmax(logits, -1)
    expected = (logprobs.detach().exp() * kl_estimate(logprobs[None], ref[None], kind)[0]).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    return expected.item(), gradient


def exact_kl(forward):
    logits, ref = noise(5).requires_grad_(), torch.log_softmax(noise(5, seed=1), -1)
    logprobs = torch.log_softmax(logits, -1)
    p, q = (ref, logprobs) if forward else (logprobs, ref)
    kl = sum(p[y].exp() * (p[y] - q[y]) for y in range(5))
    return kl.item(), torch.autograd.grad(kl, logits)[0]


def test_the_ratio_to_a_generator_is_cut_or_left_out_by_token_or_by_sequence():
    policy, generator = tensor([[-1, -2, -3], [-1, -1, -9]]), tensor([[-2, -1, math.nan], [-1.5, -1, -1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def ratio(level, how, **bounds):
        return importance_ratio(policy, generator, mask, level=level, how=how, **bounds).tolist()

    e, root = math.e, math.exp(0.5)
    assert ratio("token", "truncate") == [pytest.approx([e, 1 / e, 1]), pytest.approx([root, 1, 1])]
    assert ratio("token", "truncate", low=0.5, high=1.5) == [[1.5, 0.5, 1], [1.5, 1, 1]]
    assert ratio("token", "mask", low=0.5, high=2) == [[0, 0, 1], pytest.approx([root, 1, 1])]
    assert ratio("sequence", "truncate", high=1.5) == [[1], [1.5]]  # e · 1/e, and √e
    assert ratio("sequence", "mask", high=1.5) == [[1], [0]]
    with pytest.raises(ValueError, match="expected 'token' or 'sequence'"):
        ratio("word", "mask")


def test_kl_estimators_as_values_and_as_losses():
    reverse, reverse_gradient = exact_kl(forward=False)
    _, forward_gradient = exact_kl(forward=True)
    value, gradient = enumerated("k1")
    assert value == pytest.approx(reverse) and gradient.abs().max() < 1e-15
    value, gradient = enumerated("k3")
    assert value == pytest.approx(reverse)
    torch.testing.assert_close(gradient, forward_gradient)
    _, gradient = enumerated("k2")
    torch.testing.assert_close(gradient, reverse_gradient)


def test_kl_estimates_by_hand():
    new, ref = tensor([[-1.0, -1.0]]), tensor([[-1.5, -1.0]])
    assert kl_estimate(new, ref, "k1").tolist() == [[0.5, 0]]
    assert kl_estimate(new, ref, "k2").tolist() == [[0.125, 0]]
    assert kl_estimate(new, ref, "k3").tolist()[0] == pytest.approx([math.exp(-0.5) - 0.5, 0])
    close = torch.full((1, 1), 1e-4)  # in float32 exp(−d) − 1 would keep three digits of d
    assert kl_estimate(close, torch.zeros(1, 1), "k3").item() >= 0
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(new, ref, "k4")
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        kl_estimate(new, tensor([[0.0]]))


# minimum_risk


def test_minimum_risk_is_the_explicit_sum_over_its_set():
    logprobs, rewards = (-3 * noise(3, 4).abs()).requires_grad_(), noise(3, 4, seed=1)
    members = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    rewards[2, 3] = NAN  # abstained: leaves the set
    sets = [[0, 1, 2, 3], [0, 2], [1, 2]]
    for sharpness in (0.005, 1.0, 3.0):
        found = minimum_risk(logprobs, rewards, sharpness=sharpness, mask_PG=members)
        (gradient,) = torch.autograd.grad(found.sum(), logprobs)
        for i, chosen in enumerate(sets):
            weights = {g: math.exp(logprobs[i, g].item()) ** sharpness for g in chosen}
            q = {g: weights[g] / sum(weights.values()) for g in chosen}
            risk = sum(q[g] * -rewards[i, g].item() for g in chosen)
            assert found[i].item() == pytest.approx(risk)
            for g in range(4):  # ∂risk/∂log p(y) = α·Q(y)·(Δ(y) − risk)
                slope = sharpness * q[g] * (-rewards[i, g].item() - risk) if g in chosen else 0.0
                assert gradient[i, g].item() == pytest.approx(slope)


def test_an_empty_set_has_no_risk_and_no_gradient():
    logprobs = noise(2, 3).requires_grad_()
    rewards = tensor([[NAN, NAN, NAN], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [False, False, False]])
    loss = minimum_risk(logprobs, rewards, sharpness=1.0, mask_PG=mask)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and (logprobs.grad == 0).all()
    with pytest.raises(ValueError, match="sharpness is 0"):
        minimum_risk(logprobs, rewards, sharpness=0)
    with pytest.raises(ValueError, match=r"\(2, 3\) and .*\(3,\)"):
        minimum_risk(logprobs, rewards[0], sharpness=1)


# expected_accuracy: a model of two tokens over a vocabulary of 3, every sequence listed


def toy_logprobs():
    """Parameters, and the log-prob of each of the 9 sequences under them."""
    first, second = noise(3, seed=3).requires_grad_(), noise(3, 3, seed=4).requires_grad_()
    start, step = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    sequences = list(itertools.product(range(3), repeat=2))
    return (first, second), {y: start[y[0]] + step[y[0], y[1]] for y in sequences}


RIGHT = [(0, 2), (1, 1)]


def test_expected_accuracy_is_the_expected_reward_of_exact_match():
    parameters, logprobs = toy_logprobs()
    loss = expected_accuracy(torch.stack([logprobs[y] for y in RIGHT]), torch.tensor([0, 0]))
    found = torch.autograd.grad(loss.sum(), parameters)
    parameters, logprobs = toy_logprobs()
    accuracy = sum(logprobs[y].exp() * (1.0 if y in RIGHT else 0.0) for y in logprobs)
    assert loss.tolist() == pytest.approx([-accuracy.item()])
    for a, b in zip(found, torch.autograd.grad(-accuracy, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("baseline, share", [("leave_one_out", 1.0), ("mean", 2 / 3)])
def test_the_unscaled_group_gradient_under_exact_match_has_it_as_its_mean(baseline, share):
    # Every group of G = 3 sequences, weighted by its probability. A mean that holds the sample itself shrinks
    # the gradient by (G − 1) / G; leaving it out does not.
    parameters, logprobs = toy_logprobs()
    loss = expected_accuracy(torch.stack([logprobs[y] for y in RIGHT]), torch.tensor([0, 0]))
    wanted = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
    groups = list(itertools.product(logprobs, repeat=3))
    rewards = tensor([[float(y in RIGHT) for y in group] for group in groups])
    advantages = group_advantages(rewards, baseline=baseline, scale="none")
    taken = torch.stack([torch.stack([logprobs[y] for y in group]) for group in groups])  # (729, 3)
    weights = taken.detach().sum(1).exp()
    mask = torch.ones_like(taken, dtype=torch.bool)
    surrogate = clipped_surrogate(taken, taken.detach(), advantages, mask, clip_low=0.2, clip_high=0.2)
    found = torch.autograd.grad((weights * surrogate.mean(1)).sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, share * b)


def test_expected_accuracy_keeps_rows_apart():
    logprobs = tensor([0.1, 0.3, 0.4]).log()
    assert expected_accuracy(logprobs, torch.tensor([1, 1, 0])).tolist() == pytest.approx([-0.4, -0.4])
    rows = expected_accuracy(logprobs, torch.tensor([2, 0, 2]), num_rows=4)
    assert rows.tolist() == pytest.approx([-0.3, 0, -0.5, 0])
    with pytest.raises(ValueError, match="twice"):
        expected_accuracy(logprobs, torch.tensor([0]))


def test_results_keep_dtype_and_shape():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, mask = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=torch.bool)
        results = [
            group_advantages(x),
            *gae(x, x, mask, gamma=1.0, lam=1.0),
            clipped_surrogate(x, x, x[:, 0], mask, clip_low=0.2, clip_high=0.2, level="sequence"),
            value_loss(x, x, x, mask, clip=0.2),
            kl_estimate(x, x),
        ]
        assert all(result.dtype == dtype and result.shape == (2, 3) for result in results)
        assert minimum_risk(x, x, sharpness=1.0).dtype == dtype
