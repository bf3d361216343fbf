"""The guard and PPO's limits without a trainer: plain objects that get what they need as arguments."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from rlseq.errors import TrainingError
from rlseq.training.ppo import KLCoefficient, TargetKL
from rlseq.training.trl.guard import Guard


@pytest.fixture
def guard(tmp_path):
    def describe(inputs):
        return [{"text": text} for text in inputs["texts"]]

    return Guard(tmp_path, max_in_a_row=2, accelerator=Accelerator(cpu=True), describe=describe)


def with_gradient():
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1, 1)).sum().backward()
    return model


def step(guard, losses, grad_norm, number=1):
    """One optimizer step's worth of micro-batches; returns the losses to log, and whether gradients are left."""
    kept = [guard.keep({"texts": [f"text {i}"]}, torch.tensor(loss)).item() for i, loss in enumerate(losses)]
    model = with_gradient()
    guard.before_step(model, grad_norm, step=number)
    return kept, all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "losses, grad_norm, moves",
    [
        ([1.0, 2.0], 3.0, True),
        ([1.0, math.nan], 3.0, False),
        ([1.0, 2.0], math.inf, False),
        ([1.0, 2.0], None, True),  # no norm was computed
        ([math.inf, 2.0], None, False),
    ],
)
def test_a_step_moves_weights_only_if_loss_and_gradient_are_finite(guard, losses, grad_norm, moves):
    kept, has_gradients = step(guard, losses, grad_norm)
    assert kept == [loss if math.isfinite(loss) else 0.0 for loss in losses]
    assert has_gradients == moves and guard.step_was_skipped == (not moves)


def test_the_rows_of_a_skipped_step_are_its_own(guard, tmp_path):
    step(guard, [1.0, 2.0, 3.0], 1.0)
    step(guard, [1.0, math.nan], 1.0, number=2)
    rows = [json.loads(line) for line in (tmp_path / "skipped/step-000002/rank-0.jsonl").read_text().splitlines()]
    assert [(row["text"], row["micro_batch"], row["loss"]) for row in rows] == [("text 0", 0, 1.0), ("text 1", 1, None)]


def test_only_skipped_steps_in_a_row_end_the_run(guard):
    for number, loss in enumerate([math.nan, 1.0, math.nan], start=1):
        step(guard, [loss], 1.0, number)
    with pytest.raises(TrainingError, match=r"step 4 was skipped.*2 in a row"):
        step(guard, [math.nan], 1.0, 4)


def test_skipped_steps_are_logged_once_and_counted_on_after_resuming(guard, tmp_path):
    logs = {"loss": 0.5, "reward": 1.0}
    assert guard.with_skipped(logs) is logs
    step(guard, [math.nan], 1.0)
    resumed = Guard(tmp_path, max_in_a_row=2, accelerator=guard.accelerator, describe=guard.describe)
    resumed.load_state_dict(guard.state_dict())
    logged = resumed.with_skipped(logs)
    assert logged["skipped_steps"] == 1 and math.isnan(logged["loss"]) and logged["reward"] == 1.0
    assert "skipped_steps" not in resumed.with_skipped(logs) and logs["loss"] == 0.5


def test_a_coefficient_that_adapts_is_that_of_the_next_batch():
    coefficient = KLCoefficient(0.5, target=0.1)
    coefficient.adapt(10.0)  # far above the target
    assert coefficient.value == 0.5 and coefficient.of_next > 0.5
    resumed = KLCoefficient(0.5, target=0.1)
    resumed.load_state_dict(coefficient.state_dict())
    resumed.begin_batch()
    assert resumed.value == coefficient.of_next
    fixed = KLCoefficient(0.5, target=None)
    fixed.adapt(10.0)
    fixed.begin_batch()
    assert fixed.value == 0.5


def test_the_limit_is_of_the_mean_over_a_steps_micro_batches_and_holds_for_the_batch():
    accelerator, limit = Accelerator(cpu=True), TargetKL(0.1)
    for sums in [(0.9, 3), (0.0, 7)]:  # 0.9 / 10 tokens: below, though the first micro-batch is above
        limit.add(torch.tensor(sums[0]), torch.tensor(sums[1]))
    limit.end_step(accelerator)
    assert not limit.is_passed
    limit.add(torch.tensor(1.1), torch.tensor(10))
    limit.end_step(accelerator)
    assert limit.is_passed
    limit.end_step(accelerator)  # the updates that are left out add nothing
    assert limit.is_passed
    limit.begin_batch()
    assert not limit.is_passed
