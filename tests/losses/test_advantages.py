"""Advantages: hand arithmetic over groups, and GAE beside the double sum of its definition."""

import math

import pytest
import torch
from test_losses import noise, tensor

from rlseq.losses import gae, group_advantages, normalize_then_sum

NAN = math.nan


# group_advantages


def test_advantages_of_a_group_by_hand():
    rewards = tensor([[1, 2, 3, 6]])  # mean 3; deviations -2 -1 0 3; sample variance 14/3
    std = math.sqrt(14 / 3) + 1e-4
    assert group_advantages(rewards).tolist()[0] == pytest.approx([-2 / std, -1 / std, 0, 3 / std])
    assert group_advantages(rewards, scale="none").tolist() == [[-2, -1, 0, 3]]
    others = group_advantages(rewards, baseline="leave_one_out", scale="none")
    assert others.tolist()[0] == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])
    greedy = group_advantages(rewards, baseline=tensor([2.5]), scale="none")
    assert greedy.tolist() == [[-1.5, -0.5, 0.5, 3.5]]
    greedy = group_advantages(rewards, baseline=tensor([2.5]))
    assert greedy.tolist()[0] == pytest.approx([-1.5 / std, -0.5 / std, 0.5 / std, 3.5 / std])


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    rewards = tensor([[0, 2], [4, 10]])  # mean 4; squares 16 4 0 36 = 56; over 3
    std = math.sqrt(56 / 3) + 1e-4
    found = group_advantages(rewards, scale="batch")
    assert found.flatten().tolist() == pytest.approx([-1 / std, 1 / std, -3 / std, 3 / std])


def test_rewards_normalised_before_they_are_summed_by_hand():
    values = tensor([[[1, 0], [3, NAN]], [[5, 2], [5, 6]]])  # (P, G, F)
    one, other = 1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8) + 1e-4)  # a group's deviation by its std; alone: nothing
    sums = [-one, one, -0.5 * other, 0.5 * other]  # weights 1 and 0.5; a group of equal values adds 0
    std = math.sqrt(sum(s * s for s in sums) / 3) + 1e-4
    found = normalize_then_sum(values, tensor([1, 0.5]))
    assert found.flatten().tolist() == pytest.approx([s / std for s in sums])
    nothing = normalize_then_sum(tensor([[[NAN, NAN], [2, 1], [4, 1]]]), tensor([1, 1]))
    assert nothing[0, 0] == 0 and nothing[0, 1] == -nothing[0, 2] < 0


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_an_abstainer_leaves_the_baseline_and_gets_zero(baseline, scale):
    # The group with abstentions is worth what the group without those samples is.
    full = tensor([[1, 2, 6], [4, 8, 5]])
    holes = tensor([[NAN, 1, 2, NAN, 6], [4, NAN, 8, 5, NAN]])
    found, expected = (group_advantages(x, baseline=baseline, scale=scale) for x in (holes, full))
    assert found[~holes.isnan()].tolist() == pytest.approx(expected.flatten().tolist())
    assert (found[holes.isnan()] == 0).all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", torch.tensor([0.1, 0.2, NAN])])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_groups_without_rewards_or_baseline_give_zero(baseline, scale):
    rewards = torch.tensor([[NAN, NAN, NAN], [0.5, 1.0, 0.0], [NAN, NAN, NAN]])
    found = group_advantages(rewards, baseline=baseline, scale=scale)
    assert found[0].tolist() == found[2].tolist() == [0, 0, 0] and found.isfinite().all()
    rewards[2] = torch.tensor([1.0, 2.0, 3.0])
    found = group_advantages(rewards, baseline=baseline, scale=scale)
    assert found.isfinite().all()
    if isinstance(baseline, torch.Tensor):
        assert found[2].tolist() == [0, 0, 0]
    assert (group_advantages(torch.full((2, 2), NAN), scale=scale) == 0).all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_equal_rewards_give_exactly_zero(baseline, scale):
    for reward in (0.35, 0.1, 1 / 3, 1e-8, -7.3, 1e6):
        for G in (1, 2, 3, 7, 8, 64):
            rewards = torch.full((2, G), reward, dtype=torch.float32)
            rewards[1] = 0.0
            assert (group_advantages(rewards, baseline=baseline, scale=scale) == 0).all()
    one_left = torch.tensor([[0.35, NAN, NAN], [0.0, 1.0, NAN]])
    assert group_advantages(one_left, baseline=baseline, scale=scale)[0].tolist() == [0, 0, 0]


def test_rounding_would_be_blown_up_without_care():
    # What the test above guards against: the plain formula on 7 equal rewards is not 0.
    rewards = torch.full((1, 7), 0.35)
    spread = (rewards - rewards.mean(1, keepdim=True)).abs().max()
    assert spread > 0


def test_equal_rewards_against_a_greedy_baseline_are_bounded():
    rewards, baseline = torch.tensor([[0.25, 0.25], [0.0, 1.0]]), torch.tensor([0.75, 0.5])
    assert group_advantages(rewards, baseline=baseline, scale="none")[0].tolist() == [-0.5, -0.5]
    assert group_advantages(rewards, baseline=baseline, scale="std")[0].tolist() == [0, 0]
    assert group_advantages(rewards, baseline=baseline, scale="batch").abs().max() < 10
    assert (group_advantages(rewards[:1], baseline=baseline[:1], scale="batch") == 0).all()
    single = group_advantages(tensor([[1.0]]), baseline=tensor([0.25]), scale="none")
    assert single.tolist() == [[0.75]]


def test_wrong_rewards_are_refused():
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(tensor([[1.0, math.inf]]))
    with pytest.raises(ValueError, match="int64"):
        group_advantages(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        group_advantages(tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="expected shape \\(1,\\)"):
        group_advantages(tensor([[1.0, 2.0]]), baseline=tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="'rloo'"):
        group_advantages(tensor([[1.0, 2.0]]), baseline="rloo")
    with pytest.raises(ValueError, match="'group'"):
        group_advantages(tensor([[1.0, 2.0]]), scale="group")


# gae


def gae_by_definition(rewards, values, gamma, lam, bootstrap):
    """The double sum: each advantage is the λ-weighted sum of all later differences."""
    after = [*values[1:], bootstrap]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** l * deltas[t + l] for l in range(len(values) - t)) for t in range(len(values))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_the_double_sum_of_its_definition(gamma, lam, bootstrap):
    rewards, values, tail = noise(4, 6), noise(4, 6, seed=1), noise(4, seed=2)
    # right-padded, cut on the left, with tool output between, complete
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=tail if bootstrap else None)
    for b in range(4):
        end = tail[b].item() if bootstrap else 0.0
        kept_values = values[b, mask[b]].tolist()
        expected = gae_by_definition(rewards[b, mask[b]].tolist(), kept_values, gamma, lam, end)
        assert advantages[b, mask[b]].tolist() == pytest.approx(expected)
        expected = [a + v for a, v in zip(expected, kept_values, strict=True)]
        assert returns[b, mask[b]].tolist() == pytest.approx(expected)
        assert (advantages[b, ~mask[b]] == 0).all() and (returns[b, ~mask[b]] == 0).all()


def test_masked_positions_add_nothing_to_gae():
    mask = torch.tensor([[True, True, False, False]])
    rewards, values = tensor([[0.0, 1.0, 0.0, 0.0]]), tensor([[0.5, 0.25, 0.0, 0.0]])
    clean = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    rewards[0, 2:], values[0, 2:] = tensor([NAN, 99]), tensor([math.inf, -7])
    for a, b in zip(clean, gae(rewards, values, mask, gamma=1.0, lam=0.5), strict=True):
        assert torch.equal(a, b)
    # by hand: δ₁ = 1 − 0.25 = 0.75; δ₀ = 0.25 − 0.5 = −0.25; A₀ = −0.25 + 0.5·0.75
    assert clean[0].tolist() == [[0.125, 0.75, 0, 0]]
    assert clean[1].tolist() == [[0.625, 1.0, 0, 0]]


def test_undiscounted_monte_carlo_returns_are_the_terminal_reward_everywhere():
    mask = torch.tensor([[True] * 3 + [False] * 2])
    _, returns = gae(tensor([[0, 0, 5, 0, 0]]), noise(1, 5), mask, gamma=1.0, lam=1.0)
    assert returns[0].tolist() == pytest.approx([5, 5, 5, 0, 0])


def test_gae_carries_no_gradient_and_survives_an_empty_row():
    values = noise(2, 3).requires_grad_()
    mask = torch.tensor([[False, False, False], [True, True, True]])
    advantages, returns = gae(noise(2, 3), values, mask, gamma=1.0, lam=1.0, bootstrap_B=noise(2))
    assert not advantages.requires_grad and not returns.requires_grad
    assert (advantages[0] == 0).all() and (returns[0] == 0).all()
