"""rlseq's own losses of a micro-batch on hand-made scores, and their KL to the start in training."""

from __future__ import annotations

import math

import pytest
import torch
from test_grpo_family import family_trainer, weights_after
from tiny import tiny_model
from tiny_task import tiny_tokenizer
from transformers import AutoModelForCausalLM

from rlseq.training.rollouts import MicroBatch
from rlseq.training.update.forward import References, Scores
from rlseq.training.update.objectives import (
    expected_accuracy_loss,
    minimum_risk_loss,
    reference_exact_loss,
    reference_loss,
)

NAN = math.nan


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def risk(probs, rewards, completions, **references):
    """minimum_risk_loss of one-token completions with sharpness 1, in groups of 3, over its rows."""
    logprobs = tensor(probs).log()[:, None]
    return minimum_risk_loss(
        Scores(logprobs, torch.zeros_like(logprobs), references=references.pop("scored", References())),
        tensor(rewards),
        completions,
        torch.ones(len(probs), 1).bool(),
        num_generations=3,
        sharpness=1.0,
        **({"reference_ids": [], "reference_rewards": []} | references),
    ).item() / len(probs)  # fmt: skip


def test_minimum_risk_counts_a_repeated_sample_once():
    found = risk([0.2, 0.3, 0.2], [1.0, 0.0, 1.0], [(5,), (6,), (5,)])
    assert found == pytest.approx(-0.2 / (0.2 + 0.3))


def test_minimum_risk_keeps_the_repeat_of_a_sample_that_abstained():
    found = risk([0.2, 0.3, 0.2], [NAN, 0.0, 1.0], [(5,), (6,), (5,)])
    assert found == pytest.approx(-0.2 / (0.2 + 0.3))
    assert risk([0.2, 0.3, 0.2], [NAN, 0.5, NAN], [(5,), (6,), (5,)]) == pytest.approx(-0.5)
    assert risk([0.2, 0.3, 0.2], [NAN, NAN, NAN], [(5,), (6,), (5,)]) == 0


def test_minimum_risk_puts_each_group_s_references_among_its_samples():
    # Group 0 has a reference (7,) and one that a sample found, (6,); group 1 has none.
    scored = References(
        rows=[3, 3],
        of_row=[0, 0, 0, 1, 1, 1],
        prompt_of=[0, 0],
        logprobs=[tensor([0.4]).log(), tensor([0.3]).log()],
    )
    found = risk(
        [0.2, 0.3, 0.2, 0.1, 0.1, 0.4],
        [1.0, 0.5, 1.0, 1.0, 1.0, 0.0],
        [(5,), (6,), (5,), (8,), (9,), (5,)],
        scored=scored,
        reference_ids=[[(7,), (6,)]] * 3 + [[]] * 3,
        reference_rewards=[[2.0, 0.5]] * 3 + [[]] * 3,
    )
    first = -(0.2 * 1 + 0.3 * 0.5 + 0.4 * 2) / (0.2 + 0.3 + 0.4)
    second = -(0.1 + 0.1) / (0.1 + 0.1 + 0.4)
    assert found == pytest.approx((first + second) / 2)


def test_expected_accuracy_and_the_reference_loss_weigh_rows_alike():
    # Prompt 0 stands for three rows and has two references, of 2 and 1 tokens; prompt 1 for one row, one reference.
    references = References(
        rows=[3, 1],
        of_row=[0, 0, 0, 1],
        prompt_of=[0, 0, 1],
        logprobs=[tensor([0.5, 0.4]).log(), tensor([0.1]).log(), tensor([0.5, 0.5]).log()],
    )
    loss, P = expected_accuracy_loss(references)
    assert P.tolist() == pytest.approx([0.5 * 0.4 + 0.1, 0.25])
    assert loss.item() == pytest.approx(-(3 * 0.3 + 0.25))
    first = (-math.log(0.5 * 0.4) / 2 - math.log(0.1)) / 2  # mean over tokens, then over the references
    assert reference_loss(references).item() == pytest.approx(3 * first - math.log(0.25) / 2)
    assert reference_loss(References(rows=[2], of_row=[0, 0])) is None


def reference_exact(totals, is_reference, num_rest, scored, rewards, v=0.25):
    logprobs = tensor([[-1.0, -2.0]] * 2).requires_grad_()
    batch = MicroBatch(
        (0, 0),
        ((5,), (5,)),
        mask=torch.tensor([[True, True], [True, False]]),
        totals=tensor(totals),
        is_reference=torch.tensor(is_reference),
        num_rest=torch.tensor([num_rest] * 2),
        rest_reward=tensor([v, v]),
    )
    loss, P = reference_exact_loss(
        Scores(logprobs, torch.zeros(2, 2), references=scored),
        batch,
        num_generations=2,
        clip_low=0.2,
        clip_high=0.2,
        reference_rewards=rewards,
    )
    return P, torch.autograd.grad(loss, logprobs)[0]


def test_reference_exact_weighs_the_rollouts_that_are_left_by_hand():
    scored = References(rows=[2], of_row=[0, 0], prompt_of=[0], logprobs=[tensor([0.5, 0.8]).log()])  # P = 0.4
    b = 0.4 * 1.0 + 0.6 * 0.25
    P, grad = reference_exact([3.0, 1.0], [False, True], 1, scored, [[1.0]] * 2)
    assert P.tolist() == pytest.approx([0.4, 0.4])
    weight = 2 * 0.6 / (1 * (1 - 0.4**2))  # G·(1 − P) / (n·(1 − P^G))
    assert grad.tolist()[0] == pytest.approx([-weight * (3 - b)] * 2) and grad.tolist()[1] == [0, 0]
    _, grad = reference_exact([3.0, NAN], [False, False], 1, scored, [[1.0]] * 2)
    assert grad.tolist()[0] == pytest.approx([-weight * (3 - b)] * 2) and grad.tolist()[1] == [0, 0]


def test_reference_exact_without_references_is_a_policy_gradient_against_other_prompts():
    P, grad = reference_exact([3.0, 1.0], [False, False], 2, References(rows=[2], of_row=[0, 0]), [[], []])
    assert P.tolist() == [0, 0]
    assert grad.tolist() == [[-2.75, -2.75], [-0.75, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"objective": "minimum_risk", "minimum_risk_sharpness": 0.5},
        {"objective": "reference_exact", "kl_estimator": "k2"},
    ],
    ids=str,
)
def test_the_kl_to_the_start_holds_the_policy_and_does_not_depend_on_the_split(tmp_path, settings):
    tiny_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")

    def train(name, beta, **size):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        common = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 3, "beta": beta, **settings}
        if not beta:
            common.pop("kl_estimator", None)  # it has no effect then, and is refused
        trainer = family_trainer(tmp_path / name, model=model, **common, **size)
        after = weights_after(trainer)
        return after, [line.get("kl") for line in trainer.state.log_history if "loss" in line]

    free, _ = train("free", 0.0)
    held, kl = train("held", 1.0)
    split, kl_split = train("split", 1.0, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert (held - free).abs().max() > 1e-3
    torch.testing.assert_close(split, held, atol=2e-5, rtol=0)
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
    if settings:  # TRL's own is logged as the mean of its micro-batches' means
        assert kl_split == pytest.approx(kl, abs=1e-5)
