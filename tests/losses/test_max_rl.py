"""MaxRL: the exact series from references, against 60-digit decimals and every sequence of a toy model."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from test_losses import RIGHT, tensor, toy_logprobs

from rlseq.losses import expected_accuracy, group_advantages, max_rl, max_rl_advantages


def of_toy(order):
    """The loss on a toy model's right answers, and its gradient."""
    parameters, logprobs = toy_logprobs()
    loss = max_rl(torch.stack([logprobs[y] for y in RIGHT]), torch.tensor([0, 0]), order=order)
    return loss, torch.autograd.grad(loss.sum(), parameters)


@pytest.mark.parametrize("order", [1, 2, 5, 64])
def test_max_rl_is_the_truncated_series_of_the_chance_of_a_right_answer(order):
    loss, found = of_toy(order)
    parameters, logprobs = toy_logprobs()
    wrong = sum(logprobs[y].exp() for y in logprobs if y not in RIGHT)  # 1 − p, by the other seven sequences
    series = sum(wrong**k / k for k in range(1, order + 1))
    assert loss.tolist() == pytest.approx([series.item()])
    for a, b in zip(found, torch.autograd.grad(series, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_max_rl_goes_from_expected_accuracy_to_the_log_likelihood():
    parameters, logprobs = toy_logprobs()
    right = torch.stack([logprobs[y] for y in RIGHT])
    of_accuracy = torch.autograd.grad(
        expected_accuracy(right, torch.tensor([0, 0])).sum(), parameters, retain_graph=True
    )
    of_likelihood = torch.autograd.grad(-right.logsumexp(0), parameters)
    for a, b in zip(of_toy(1)[1], of_accuracy, strict=True):
        torch.testing.assert_close(a, b)
    loss, found = of_toy(500)
    assert loss.item() == pytest.approx(-right.logsumexp(0).item())
    for a, b in zip(found, of_likelihood, strict=True):
        torch.testing.assert_close(a, b)


def test_max_rl_by_hand():
    # p = 0.1 + 0.15: 0.75 + 0.75² / 2. The gradient of each log-prob is −(1 − 0.75²) times its share of p.
    logprobs = tensor([0.1, 0.5, 0.15]).log().requires_grad_()
    loss = max_rl(logprobs, torch.tensor([2, 0, 2]), num_rows=4, order=2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.5 + 0.125, 0, 1.03125, 0])
    assert logprobs.grad.tolist() == pytest.approx([-0.4375 * 0.4, -0.75, -0.4375 * 0.6])


@pytest.mark.parametrize("logprob", [-1e-6, -1e-3, -0.4, -0.6, -3.0, -20.0, -60.0])
@pytest.mark.parametrize("order", [1, 3, 100])
def test_max_rl_keeps_the_digits_of_float32_near_0_and_1(logprob, order):
    x = torch.tensor([logprob, -200.0], requires_grad=True)  # beside a reference that is as good as impossible
    loss = max_rl(x, torch.tensor([0, 0]), order=order)
    loss.sum().backward()
    with localcontext(prec=60):  # more digits than 1 − p loses
        failure = 1 - Decimal(x[0].item()).exp()
        series = sum(failure**k / k for k in range(1, order + 1))
        pass_at_order = 1 - failure**order
    assert loss.item() == pytest.approx(float(series), rel=1e-5)
    assert x.grad[0].item() == pytest.approx(-float(pass_at_order), rel=1e-5)
    assert x.grad[1].isfinite()


def test_max_rl_of_what_is_certain_impossible_or_missing_is_finite():
    x = torch.tensor([1e-6, -math.inf], requires_grad=True)  # rounding passed 1; a token that has no chance
    loss = max_rl(x, torch.tensor([0, 1]), num_rows=3, order=4)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert x.grad.tolist() == pytest.approx([-1, 0])


def test_max_rl_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="order is 0; expected at least 1"):
        max_rl(torch.zeros(1), torch.tensor([0]), order=0)
    with pytest.raises(ValueError, match="twice"):
        max_rl(torch.zeros(2), torch.tensor([0]), order=1)


# the sampled estimator: advantages over the group's mean


@pytest.mark.parametrize("G", [2, 3, 4])
def test_advantages_over_the_mean_are_max_rl_of_one_order_less_over_all_groups(G):
    # Every group of G sequences, weighted by its probability.
    parameters, logprobs = toy_logprobs()
    groups = list(itertools.product(logprobs, repeat=G))
    rewards = tensor([[float(y in RIGHT) for y in group] for group in groups])
    advantages = group_advantages(rewards, scale="mean")
    taken = torch.stack([torch.stack([logprobs[y] for y in group]) for group in groups])  # (9^G, G)
    weights = taken.detach().sum(1).exp()
    found = torch.autograd.grad((weights * (advantages * taken).mean(1)).sum(), parameters)
    for a, b in zip(found, of_toy(G - 1)[1], strict=True):
        torch.testing.assert_close(a, -b)  # max_rl is a loss


def test_advantages_over_the_mean_by_hand():
    rewards = tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [1, 0.5, math.nan, 0]])
    advantages = group_advantages(rewards, scale="mean")
    expected = [[3, -1, -1, -1], [1, 1, -1, -1], [0] * 4, [0] * 4, [1, 0, 0, -1]]
    torch.testing.assert_close(advantages, tensor(expected))
    with pytest.raises(ValueError, match="a reward below 0"):
        group_advantages(tensor([[-0.5, 1.0]]), scale="mean")


@pytest.mark.parametrize(("G", "order"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 2), (4, 3)])
def test_advantages_of_an_order_up_to_the_samples_have_its_gradient_as_their_mean_over_all_groups(G, order):
    parameters, logprobs = toy_logprobs()
    groups = list(itertools.product(logprobs, repeat=G))
    rewards = tensor([[float(y in RIGHT) for y in group] for group in groups])
    advantages = max_rl_advantages(rewards, order=order)
    taken = torch.stack([torch.stack([logprobs[y] for y in group]) for group in groups])  # (9^G, G)
    weights = taken.detach().sum(1).exp()
    found = torch.autograd.grad((weights * (advantages * taken).mean(1)).sum(), parameters)
    for a, b in zip(found, of_toy(order)[1], strict=True):
        torch.testing.assert_close(a, -b)


def test_advantages_of_an_order_by_hand():
    # K = 2 of G = 4. One success: n = 0 for it, w(1) = 4·(1 − 3/6) = 2; for the others n = 1, w(2) = 2·(1 − 1/6).
    rewards = tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, math.nan, math.nan]])
    expected = [[2, -5 / 9, -5 / 9, -5 / 9], [0] * 4, [0] * 4, [2, -1, 0, 0]]  # the last: w(1) = 2, w(2) = 1
    torch.testing.assert_close(max_rl_advantages(rewards, order=2), tensor(expected))
    leave_one_out = group_advantages(rewards, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(max_rl_advantages(rewards, order=1), leave_one_out)
    alone = max_rl_advantages(tensor([[1, math.nan]]), order=2)
    assert alone.tolist() == [[0, 0]]
    for wrong, order, words in (
        ([[0.5, 1.0]], 1, "neither 0 nor 1"),
        ([[0.0, 1.0]], 3, "order is 3"),
        ([[1.0]], 1, "G"),
    ):
        with pytest.raises(ValueError, match=words):
            max_rl_advantages(tensor(wrong), order=order)
