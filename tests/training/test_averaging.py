"""The weight average: its definition, unrolled by hand; training does not see it; it survives a resumed run."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_task import tiny_trainer
from transformers import TrainerCallback

from rlseq.errors import ConfigError
from rlseq.training.averaging import WeightAverage


class Recorder(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append([p.detach().clone() for p in model.parameters()])


def train(path, decay=None, **settings):
    trainer = tiny_trainer(path, **settings)
    recorder = Recorder()
    trainer.add_callback(recorder)
    average = None
    if decay:
        average = WeightAverage(trainer, decay)
        trainer.add_callback(average)
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    return trainer, recorder.weights, average


def test_the_result_is_the_moving_average_of_the_weights_and_training_does_not_see_it(tmp_path):
    _, plain, _ = train(tmp_path / "a", max_steps=3)
    trainer, averaged, average = train(tmp_path / "b", 0.75, max_steps=3)
    for with_average, without in zip(averaged[-1], plain[-1], strict=True):
        assert torch.equal(with_average, without)
    average.apply()
    start = list(tiny_model("llama", initializer_range=0.1).parameters())
    for i, p in enumerate(trainer.model.parameters()):
        # 0.75³ θ0 + 0.25·0.75² θ1 + 0.25·0.75 θ2 + 0.25 θ3
        expected = 0.421875 * start[i] + 0.140625 * plain[0][i] + 0.1875 * plain[1][i] + 0.25 * plain[2][i]
        torch.testing.assert_close(p.detach(), expected.detach(), atol=1e-6, rtol=0)


def test_a_resumed_run_goes_on_with_its_average(tmp_path):
    _, _, whole = train(tmp_path / "whole", 0.75, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = tiny_trainer(tmp_path / "whole", max_steps=2)
    resumed = WeightAverage(trainer, 0.75)
    trainer.add_callback(resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, value in whole.average.items():
        torch.testing.assert_close(resumed.average[name], value, atol=1e-6, rtol=0)


def test_the_average_of_bfloat16_weights_is_not_rounded_to_bfloat16(tmp_path):
    model = tiny_model("llama", initializer_range=0.1, dtype=torch.bfloat16)
    expected = [p.detach().double() for p in model.parameters()]
    trainer, weights, average = train(tmp_path, 0.995, model=model, max_steps=20, learning_rate=3e-3)
    for theta in weights:
        expected = [0.995 * mean + 0.005 * p.double() for mean, p in zip(expected, theta, strict=True)]
    for mean, kept in zip(expected, average.average.values(), strict=True):
        torch.testing.assert_close(kept.double(), mean, atol=1e-6, rtol=0)
    average.apply()
    for mean, p in zip(expected, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), mean.to(torch.bfloat16), atol=0, rtol=1e-2)


@pytest.mark.parametrize("decay", [1.0, -0.5])
def test_a_decay_outside_its_range_is_refused(tmp_path, decay):
    with pytest.raises(ConfigError, match="ema_decay"):
        WeightAverage(tiny_trainer(tmp_path), decay)


def test_the_start_takes_its_share_of_the_result(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    average = WeightAverage(trainer, 0.5, interpolation_weight=0.25)
    trainer.add_callback(average)
    trainer.train()
    average.apply()
    start = dict(tiny_model("llama", initializer_range=0.1).named_parameters())
    for name, p in trainer.model.named_parameters():
        expected = 0.25 * start[name] + 0.75 * average.average[name]
        torch.testing.assert_close(p.detach(), expected.detach(), atol=1e-6, rtol=0)
