"""bfloat16, of the weights or by autocast: samples and training are those of float32, to bfloat16's precision."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_ppo import tiny_ppo
from tiny_task import tiny_trainer

NEAR = 0.05  # nats; bfloat16 has 8 bits, and these logits are below 4


@pytest.mark.parametrize("make", [tiny_trainer, tiny_ppo])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_a_step_in_bfloat16(make, autocast, tmp_path):
    exact = tiny_model("qwen2", initializer_range=0.1)
    dtype = torch.float32 if autocast else torch.bfloat16
    model = tiny_model("qwen2", initializer_range=0.1, dtype=dtype)
    trainer = make(tmp_path, model=model, bf16=autocast, max_steps=1, learning_rate=0.05)
    trainer.train()
    assert trainer.model.dtype == dtype
    before = dict(tiny_model("qwen2", initializer_range=0.1, dtype=dtype).named_parameters())
    moved = [
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert len(moved) > 10 and all(p.isfinite().all() for p in trainer.model.parameters())
    far = 0.0
    for rollout in trainer.batch.rollouts:
        prompt = next(p for p in trainer.prompts if p.key == rollout.prompt_key)
        ids = torch.tensor([[*prompt.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            rows = exact(input_ids=ids).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = rows.gather(-1, torch.tensor([rollout.completion_ids]).T)[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=NEAR, rtol=0)
        far = max(far, (torch.tensor(rollout.logprobs) - expected).abs().max().item())
    assert far > 1e-5  # it was not float32


def test_under_autocast_old_log_probs_are_those_of_a_forward_like_the_update_s(tmp_path):
    # Nothing moves, so every ratio is 1. Of those to the sampler's own log-probs, a quarter leaves GSPO's narrow clip.
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model("llama", initializer_range=0.3),
        bf16=True,
        steps_per_generation=2,
        max_steps=2,
        learning_rate=0.0,
        logging_steps=1,
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
    )
    trainer.train()
    clipped = [line["clip_ratio/region_mean"] for line in trainer.state.log_history if "loss" in line]
    assert len(clipped) == 2 and max(clipped) < 0.1
