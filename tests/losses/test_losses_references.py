"""The pure functions of the reference-exact gradient and of PPO's bookkeeping: hand arithmetic and definitions."""

import itertools
import math

import pytest
import torch

from rlseq.losses import (
    adapt_kl_coefficient,
    error_by_position,
    explained_variance,
    last_token_rewards,
    leave_one_prompt_out_baseline,
    reference_exact_references,
    reference_exact_weight,
    whiten,
)

NAN = math.nan


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def mask(*rows):
    return torch.tensor(rows).bool()


# reference_exact_references


def test_the_references_share_by_hand():
    # Row 0: two references, p 0.2 and 0.3, rewards 1 and 0.5; row 1 none; row 2 one, p 0.4, reward 2.
    logprobs = tensor([0.2, 0.4, 0.3]).log().requires_grad_()
    loss, P, baseline = reference_exact_references(
        logprobs, tensor([1.0, 2.0, 0.5]), torch.tensor([0, 2, 0]), tensor([0.1, 0.7, -1.0])
    )
    assert P.tolist() == pytest.approx([0.5, 0, 0.4])
    b = [0.2 * 1 + 0.3 * 0.5 + 0.5 * 0.1, 0.7, 0.4 * 2 + 0.6 * -1]
    assert baseline.tolist() == pytest.approx(b)
    assert loss.tolist() == pytest.approx([-(0.2 * (1 - b[0]) + 0.3 * (0.5 - b[0])), 0, -(0.4 * (2 - b[2]))])
    loss.sum().backward()  # ∂(−p·(r − b)) / ∂log p = −p·(r − b): neither P nor b is differentiated
    assert logprobs.grad.tolist() == pytest.approx([-0.2 * (1 - b[0]), -0.4 * (2 - b[2]), -0.3 * (0.5 - b[0])])
    assert not P.requires_grad and not baseline.requires_grad


def test_a_reference_whose_reward_abstained_moves_nothing():
    logprobs = tensor([0.2, 0.3]).log().requires_grad_()
    loss, P, _ = reference_exact_references(logprobs, tensor([1.0, NAN]), torch.tensor([0, 0]), tensor([0.0]))
    loss.sum().backward()
    assert logprobs.grad[0] != 0 and logprobs.grad[1] == 0 and loss.isfinite().all()
    assert P.tolist() == pytest.approx([0.5])  # it is a reference all the same, and rejected from the rollouts


def test_rounding_does_not_make_references_likelier_than_certain():
    logprobs = torch.tensor([0.7, 0.3000001]).log()
    _, P, _ = reference_exact_references(logprobs, torch.ones(2), torch.tensor([0, 0]), torch.zeros(1))
    assert P.tolist() == [1.0]


def test_no_references_at_all_have_no_share():
    loss, P, baseline = reference_exact_references(
        tensor([]), tensor([]), torch.tensor([], dtype=torch.long), tensor([0.5, 2.0])
    )
    assert loss.tolist() == P.tolist() == [0, 0] and baseline.tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="three times"):
        reference_exact_references(tensor([0.1]), tensor([]), torch.tensor([0]), tensor([0.0]))


# reference_exact_weight


@pytest.mark.parametrize("G", [1, 2, 3, 5])
@pytest.mark.parametrize("P", [0.0, 0.3, 0.9])
def test_the_weights_make_the_rollouts_left_an_unbiased_estimate(G, P):
    # Completions: the reference with chance P, two others with 0.25 and 0.75 of the rest; f of them is 4 and −1.
    chances, f = [P, (1 - P) * 0.25, (1 - P) * 0.75], [None, 4.0, -1.0]
    mean = 0.0
    for samples in itertools.product(range(3), repeat=G):
        left = [f[i] for i in samples if i]
        weight = reference_exact_weight(tensor([P]), torch.tensor([len(left)]), G).item()
        mean += math.prod(chances[i] for i in samples) * weight * sum(left)
    assert mean == pytest.approx(chances[1] * 4 - chances[2])  # (1 − P)·E[f | no reference]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_weight_goes_to_one_over_all_samples_as_references_become_certain(dtype):
    for P in (1.0, 1 - 1e-7, 1 - 1e-4):
        found = reference_exact_weight(torch.tensor([P], dtype=dtype), torch.tensor([1]), 4)
        assert found.item() == pytest.approx(1 / 4, rel=1e-3)
    assert reference_exact_weight(tensor([1.0]), torch.tensor([2]), 4).item() == pytest.approx(1 / 8)


def test_where_every_sample_is_a_reference_nothing_has_weight():
    assert reference_exact_weight(tensor([0.5, 1.0]), torch.tensor([0, 0]), 4).tolist() == [0, 0]
    with pytest.raises(ValueError, match="num_samples 0"):
        reference_exact_weight(tensor([0.5]), torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"\(1,\), num_rest .*\(2,\)"):
        reference_exact_weight(tensor([0.5]), torch.tensor([1, 1]), 2)


# last_token_rewards


def test_a_sequence_s_reward_is_on_its_last_counted_token_and_an_empty_one_s_nowhere():
    counted = mask([1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    found = last_token_rewards(tensor([5.0, -2.0, 9.0, NAN, 3.0]), counted)
    assert found.tolist() == [[0, 5, 0, 0], [0, 0, 0, -2], [0, 0, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]


def test_rewards_of_no_tokens_and_of_the_wrong_number():
    assert last_token_rewards(tensor([1.0, 2.0]), torch.zeros(2, 0).bool()).shape == (2, 0)
    rewards = tensor([1.0]).requires_grad_()
    assert not last_token_rewards(rewards, mask([1])).requires_grad
    with pytest.raises(ValueError, match="one per sequence"):
        last_token_rewards(tensor([1.0]), mask([1], [1]))
    with pytest.raises(ValueError, match="bool"):
        last_token_rewards(tensor([1.0]), torch.ones(1, 2))


# whiten


def test_whitened_advantages_by_hand():
    counted = mask([1, 1, 0], [1, 0, 1])
    x = tensor([[1.0, 2.0, NAN], [3.0, math.inf, 6.0]])  # counted: 1 2 3 6
    found = whiten(x, counted, mean=3.0, std=2.0)
    s = 2.0 + 1e-4
    assert found.flatten().tolist() == pytest.approx([-2 / s, -1 / s, 0, 0, 0, 3 / s])
    split = [whiten(x[i : i + 1], counted[i : i + 1], mean=tensor(3.0), std=tensor(2.0)) for i in range(2)]
    assert torch.equal(torch.cat(split), found)  # the statistics are the caller's, so ranks agree
    assert whiten(torch.ones(1, 2), mask([1, 1]), mean=1.0, std=0.0).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="advantages_BT"):
        whiten(x[:, :2], counted, mean=0.0, std=1.0)


# explained_variance and error_by_position


def test_explained_variance_by_hand():
    counted = mask([1, 1, 1, 0], [1, 0, 0, 0])
    returns = tensor([[1.0, 2.0, 3.0, NAN], [6.0, 99, 99, 99]])  # mean 3; squares 4 1 0 9: variance 14/4
    perfect = torch.where(counted, returns, 0.0)
    assert explained_variance(perfect, returns, counted).item() == 1
    assert explained_variance(perfect + 7, returns, counted).item() == pytest.approx(1)  # a bias is no variance
    assert explained_variance(torch.full_like(returns, 3.0), returns, counted).item() == pytest.approx(0)
    values = tensor([[1.0, 2.0, 3.0, 50], [2.0, 0, 0, 0]])  # errors 0 0 0 4: mean 1, squares 1 1 1 9: 12/4
    assert explained_variance(values, returns, counted).item() == pytest.approx(1 - 12 / 14)
    assert explained_variance(-perfect, returns, counted).item() == pytest.approx(1 - 4)


def test_explained_variance_of_returns_that_do_not_vary_is_unknown():
    for counted in (mask([0, 0]), mask([1, 0]), mask([1, 1])):
        assert explained_variance(tensor([[0.1, 0.2]]), tensor([[5.0, 5.0]]), counted).isnan()


def test_the_error_by_position_by_hand():
    values = torch.zeros(2, 5, dtype=torch.float64)
    returns = tensor([[1.0, 2.0, 3.0, 4.0, NAN], [NAN, 5.0, NAN, 7.0, NAN]])
    counted = mask([1, 1, 1, 1, 0], [0, 1, 0, 1, 0])
    # halves: {1, 2, 5} and {3, 4, 7}; quarters: {1, 5} {2} {3, 7} {4}
    found = error_by_position(values, returns, counted, parts=2)
    assert found.tolist() == pytest.approx([math.sqrt(30 / 3), math.sqrt(74 / 3)])
    found = error_by_position(values, returns, counted)
    assert found.tolist() == pytest.approx([math.sqrt(13), 2, math.sqrt(29), 4])
    single = error_by_position(values[:1], returns[:1], mask([1, 0, 0, 0, 0]))
    assert single[0].item() == 1 and single[1:].isnan().all()


# adapt_kl_coefficient


@pytest.mark.parametrize(
    "kl, factor",
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98), (-3.0, 0.98)],  # e is clipped at ± 0.2
)
def test_the_kl_coefficient_is_steered_to_its_target(kl, factor):
    assert adapt_kl_coefficient(0.2, kl, target=6.0) == pytest.approx(0.2 * factor)


def test_a_coefficient_that_could_not_move_is_refused():
    assert adapt_kl_coefficient(1.0, 60.0, target=6.0, rate=0.5) == pytest.approx(1.1)
    for coefficient, target in ((0.0, 6.0), (0.1, 0.0), (0.1, -1.0), (0.1, NAN)):
        with pytest.raises(ValueError, match="above 0"):
            adapt_kl_coefficient(coefficient, 1.0, target=target)


def test_the_reward_of_the_rest_is_told_by_other_prompts_alone():
    rewards = torch.tensor([[1.0, 0.25, 0.5], [0.5, 1.0, float("nan")], [1.0, 1.0, 1.0]])
    rest = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    elsewhere, counts = leave_one_prompt_out_baseline(rewards, rest)
    # prompt 0: the 0.5 of prompt 1; prompt 1: 0.25 and 0.5; prompt 2: all three
    assert elsewhere.tolist() == pytest.approx([0.5, 0.375, 1.25 / 3])
    assert counts.tolist() == [2, 1, 0]
    alone, _ = leave_one_prompt_out_baseline(rewards[:1], rest[:1])
    assert alone.tolist() == [0.0]
    with pytest.raises(ValueError, match="bool"):
        leave_one_prompt_out_baseline(rewards, rest.float())
