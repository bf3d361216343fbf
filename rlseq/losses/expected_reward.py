"""Losses that are an expected reward, in part or whole, rather than an estimate of one."""

from __future__ import annotations

import torch
from torch import Tensor

from rlseq.losses.masking import check_mask, describe


def minimum_risk(
    sequence_logprobs_PG: Tensor, rewards_PG: Tensor, *, sharpness: float, mask_PG: Tensor | None = None
) -> Tensor:
    """Minimum risk training (Shen et al. 2016, section 3): expected risk over samples, renormalised.

        Q(y) = p(y)^α / Σ_{y' ∈ S} p(y')^α        loss = Σ_{y ∈ S} Q(y)·Δ(y),  with risk Δ = −reward

    S is a set: a sample that repeats another is to be masked.

    Args:
        sequence_logprobs_PG: (P, G) nats, log p(y | x); the gradient flows through them.
        rewards_PG: (P, G); a NaN reward abstained and leaves S.
        sharpness: α > 0; the paper takes 5e-3, and 1 renormalises the model's own probabilities.
        mask_PG: (P, G) bool, the members of S; None: all.

    Returns:
        (P,) expected risk, in units of −reward; 0 where S is empty.

    Raises:
        ValueError: shapes differ, or sharpness not above 0.
    """
    if sequence_logprobs_PG.ndim != 2 or sequence_logprobs_PG.shape != rewards_PG.shape:
        shapes = f"{describe(sequence_logprobs_PG)} and {describe(rewards_PG)}"
        raise ValueError(f"sequence_logprobs_PG and rewards_PG are {shapes}; expected (P, G) twice")
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}; expected above 0")
    members = ~rewards_PG.isnan()
    if mask_PG is not None:
        check_mask(mask_PG, rewards_PG.shape)
        members = members & mask_PG
    lowest = torch.finfo(sequence_logprobs_PG.dtype).min  # finite, so that an empty S gives no NaN
    scaled = torch.where(members, sharpness * sequence_logprobs_PG, lowest)
    Q = torch.softmax(scaled, dim=1)  # (P, G)
    risk = -torch.where(members, rewards_PG.detach(), 0.0).to(Q)
    return (Q * risk).sum(1)


def expected_accuracy(reference_logprobs: Tensor, row_index: Tensor, num_rows: int | None = None) -> Tensor:
    """Minus the exact chance that one sample is right, where references enumerate the answers.

        loss_i = −Σ_{y ∈ references of row i} exp(log p(y | x_i))

    Its gradient is the mean of the policy gradient under the reward "equals a reference", without
    sampling noise: ∇E[1{y right}] = Σ_{y right} p(y)·∇log p(y). Likelihood training descends −Σ log p
    instead.

    Args:
        reference_logprobs: (N,) nats, of distinct references; the gradient flows through them.
        row_index: (N,) long, the row of each.
        num_rows: rows of the result; None: up to the last that has a reference.

    Returns:
        (num_rows,) in −1..0; 0 for a row without references.

    Raises:
        ValueError: shapes differ.
    """
    num_rows = _check_references(reference_logprobs, row_index, num_rows)
    return -reference_logprobs.new_zeros(num_rows).index_add(0, row_index, reference_logprobs.exp())


def max_rl(reference_logprobs: Tensor, row_index: Tensor, num_rows: int | None = None, *, order: int) -> Tensor:
    """Minus the likelihood of a right answer, its series cut after K terms (MaxRL, Tajwar et al. 2026).

        log p = −Σ_{k ≥ 1} (1 − p)^k / k        loss_i = Σ_{k = 1..K} (1 − p_i)^k / k
        p_i = Σ_{y ∈ references of row i} exp(log p(y | x_i))

    The gradient of row i is −pass@K_i·∇log p_i, with pass@K = 1 − (1 − p)^K the chance that one of K samples is
    right: at K = 1 that of `expected_accuracy`, p·∇log p = ∇p, and as K grows that of log p. It is computed in that
    form, from log p, so that a p near 0 or 1 loses no digits.

    Args:
        reference_logprobs: (N,) nats, of distinct references; the gradient flows through them.
        row_index: (N,) long, the row of each.
        num_rows: rows of the result; None: up to the last that has a reference.
        order: K, at least 1.

    Returns:
        (num_rows,) in 0..(1 + 1/2 + … + 1/K); 0, without gradient, for a row without references.

    Raises:
        ValueError: shapes differ, or order below 1.
    """
    if order < 1:
        raise ValueError(f"order is {order}; expected at least 1")
    num_rows = _check_references(reference_logprobs, row_index, num_rows)
    # log p of each row, by its largest term
    largest = reference_logprobs.new_full((num_rows,), -torch.inf)
    largest = largest.scatter_reduce(0, row_index, reference_logprobs.detach(), "amax")
    possible = largest > -torch.inf
    largest = torch.where(possible, largest, 0.0)
    sums = torch.zeros_like(largest).index_add(0, row_index, (reference_logprobs - largest[row_index]).exp())
    logprobs = largest + torch.where(possible, sums, 1.0).log()  # (num_rows,)

    with torch.no_grad():
        at_most_1 = logprobs.clamp(max=0)  # rounding may pass 1
        failure = -torch.expm1(at_most_1)  # 1 − p
        log_failure = torch.where(at_most_1 > -0.5, failure.log(), torch.log1p(-at_most_1.exp()))
        pass_at_order = -torch.expm1(order * log_failure)
        series = torch.zeros_like(failure)
        for k in range(order, 0, -1):
            series = (series + 1 / k) * failure
    return torch.where(possible, series - pass_at_order * (logprobs - logprobs.detach()), 0.0)


def _check_references(reference_logprobs: Tensor, row_index: Tensor, num_rows: int | None) -> int:
    """How many rows there are to be; ValueError where the references are not one-dimensional and aligned."""
    if reference_logprobs.ndim != 1 or reference_logprobs.shape != row_index.shape:
        shapes = f"{describe(reference_logprobs)} and {describe(row_index)}"
        raise ValueError(f"reference_logprobs and row_index are {shapes}; expected (N,) twice")
    if num_rows is None:
        return int(row_index.max()) + 1 if len(row_index) else 0
    return num_rows


def reference_exact_references(
    reference_logprobs: Tensor,
    reference_rewards: Tensor,
    row_index: Tensor,
    rest_rewards: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The references' share of the expected reward, exactly (memory-augmented policy optimization).

    With the references as the memory B of Liang et al. 2018 (section 3, eq. 6), the expected reward splits:

        E[r] = Σ_{y ∈ B} p(y)·r(y) + (1 − P)·E_{y ∉ B}[r(y)]        P = Σ_{y ∈ B} p(y)

    The first term is computed here by teacher forcing, without sampling noise; the second is estimated from
    rollouts of which those that are references are rejected (`reference_exact_weight`). Both subtract one
    baseline, which changes no expectation, since it does not depend on this row's rollouts:

        b = Σ_{y ∈ B} p(y)·r(y) + (1 − P)·v        loss = −Σ_{y ∈ B} p(y)·(r(y) − b)

    where v estimates the reward of completions that are not references, from elsewhere (other prompts' rollouts).

    Args:
        reference_logprobs: (N,) nats, of distinct references; the gradient flows through them.
        reference_rewards: (N,); NaN abstained, and moves nothing.
        row_index: (N,) long, the row of each.
        rest_rewards: (rows,) v of each row.

    Returns:
        The loss, P and b of each row, (rows,) each; the gradient flows through the loss alone.

    Raises:
        ValueError: shapes differ.
    """
    if reference_logprobs.ndim != 1 or not reference_logprobs.shape == reference_rewards.shape == row_index.shape:
        shapes = ", ".join(describe(x) for x in (reference_logprobs, reference_rewards, row_index))
        raise ValueError(f"reference log-probs, rewards and rows are {shapes}; expected (N,) three times")
    probabilities = reference_logprobs.exp()
    rest_rewards = rest_rewards.detach().to(probabilities)
    known = ~reference_rewards.isnan()
    rewards = torch.where(known, reference_rewards, 0.0).detach().to(probabilities)
    zeros = torch.zeros_like(rest_rewards)  # (rows,)
    P = zeros.index_add(0, row_index, probabilities.detach()).clamp(max=1)
    baseline = zeros.index_add(0, row_index, probabilities.detach() * rewards) + (1 - P) * rest_rewards
    advantages = torch.where(known, rewards - baseline[row_index], 0.0)
    loss = -zeros.index_add(0, row_index, probabilities * advantages)
    return loss, P, baseline


def leave_one_prompt_out_baseline(rewards_PG: Tensor, rest_PG: Tensor) -> tuple[Tensor, Tensor]:
    """v of each prompt: the mean reward of *other* prompts' rollouts that are not references.

        v_i = Σ_{j ≠ i} Σ_{g rest} r_jg / Σ_{j ≠ i} n_j        n_i = how many of row i's rollouts are not references

    It does not depend on the prompt's own samples, so as a baseline it changes no expectation.

    Args:
        rewards_PG: (P, G), all processes' rows; read where `rest_PG` is True.
        rest_PG: (P, G) bool, the rollouts that are no reference and did not abstain.

    Returns:
        v and n, (P,) each; v is 0 where no other prompt has such a rollout.

    Raises:
        ValueError: wrong shapes.
    """
    check_mask(rest_PG, rewards_PG.shape)
    sums = torch.where(rest_PG, rewards_PG, 0.0).sum(1)  # (P,)
    counts = rest_PG.sum(1)
    elsewhere = (sums.sum() - sums) / (counts.sum() - counts).clamp(min=1)
    return elsewhere, counts


def reference_exact_weight(P: Tensor, num_rest: Tensor, num_samples: int) -> Tensor:
    """The weight of each rollout that is not a reference, in the mean over a prompt's rollouts.

        w = (1 − P) / (n·(1 − P^G))        of each of the n ≥ 1 of G rollouts that are not rejected

    n of G samples are left with probability 1 − P^G > 0 in all cases but one: all G are references, and give no
    term. Dividing by 1 − P^G makes up for that case, so Σ w·f over the rollouts left is unbiased for
    (1 − P)·E_{y ∉ B}[f] with G samples, however likely the references are. As P → 1 the weight goes to 1 / G.

    Args:
        P: (rows,) chance of a reference under the policy sampled from.
        num_rest: (rows,) n, how many of the row's G rollouts are no reference.
        num_samples: G.

    Returns:
        (rows,) w, without gradient; 0 where n is 0.

    Raises:
        ValueError: shapes differ, or num_samples below 1.
    """
    if P.shape != num_rest.shape or num_samples < 1:
        raise ValueError(f"P is {describe(P)}, num_rest {describe(num_rest)} and num_samples {num_samples}")
    P = P.detach().clamp(0, 1)
    series = sum(P**power for power in range(num_samples))  # (1 − P^G) / (1 − P), also at P = 1, where it is G
    weight = 1 / (num_rest.clamp(min=1) * series)
    return torch.where(num_rest > 0, weight, 0.0)
