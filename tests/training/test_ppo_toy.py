"""On a toy policy whose every completion is listed, PPO and GRPO find the best policy there is."""

from __future__ import annotations

import pytest
import torch
from toy import COMPLETIONS, ROWS, exact_logprobs, expected_reward, toy_model, toy_trainer
from transformers import AutoModelForCausalLM

from rlseq.config.training import PPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.training.ppo import PPOTrainer

STAIRS = dict(zip(COMPLETIONS, (0.0, 0.5, 0.0, 0.0, 2.0, 1.0, 1.0), strict=True))  # b, and then a, is best
COMMON = {
    "num_generations": 32,  # of 2 prompts
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 60,
    "save_strategy": "no",
    "report_to": "none",
}


def stairs(completion_ids):
    return STAIRS[tuple(completion_ids)]


def toy_ppo(tmp_path, reward, model=None, **settings):
    tokenizer = toy_trainer(tmp_path, rows=ROWS).processing_class
    fields = {"output_dir": str(tmp_path), "max_completion_length": 2, "use_cpu": True, "disable_tqdm": True}
    config = PPOConfig(**{**fields, **COMMON, **settings})
    prompts = build_prompts(ROWS, tokenizer)
    return PPOTrainer(model or toy_model(), reward, config, prompts, processing_class=tokenizer)


def exact_reward(trainer):
    """The mean over prompts of the expected reward, every completion listed."""
    with torch.no_grad():
        found = [expected_reward(trainer.model, p.prompt_ids, STAIRS).item() for p in trainer.prompts]
    return sum(found) / len(found)


PPO = {
    "separate": {"critic": "separate"},
    "shared": {"critic": "shared", "critic_trunk_gradient": True},
    "several epochs": {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 32},
}


@pytest.mark.parametrize("case", [*PPO, "grpo"])
def test_training_comes_within_1_percent_of_the_best_policy(tmp_path, case):
    if case == "grpo":
        trainer = toy_trainer(tmp_path, rows=ROWS, rewards=[stairs], loss_type="dapo", scale_rewards="group", **COMMON)
    else:
        trainer = toy_ppo(tmp_path, stairs, **PPO[case])
    best = max(STAIRS.values())  # of a policy that always gives the best completion
    assert exact_reward(trainer) < 0.6 * best
    trainer.train()
    assert exact_reward(trainer) > 0.99 * best


def penalised(model, start, prompts, beta):
    """E[r] − β·KL(π‖π₀), summed over prompts, every completion listed."""
    total = 0.0
    for prompt in prompts:
        mine = exact_logprobs(model, prompt)
        with torch.no_grad():
            reference = exact_logprobs(start, prompt)
        total = total + sum(mine[y].exp() * (STAIRS[y] - beta * (mine[y] - reference[y])) for y in COMPLETIONS)
    return total


@pytest.mark.soak
def test_with_the_kl_in_the_reward_ppo_gains_what_exact_ascent_of_the_penalised_reward_gains(tmp_path):
    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float64)

    toy_model().save_pretrained(tmp_path / "start")
    start, ascended, beta = load(), load(), 1.0
    schedule = {"lr_scheduler_type": "linear", "learning_rate": 1e-2, "max_steps": 100, "lam": 1.0}
    trainer = toy_ppo(tmp_path, stairs, load(), beta=beta, **schedule)
    prompts = [p.prompt_ids for p in trainer.prompts]
    optimizer = torch.optim.Adam(ascended.parameters(), lr=2e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-penalised(ascended, start, prompts, beta)).backward()
        optimizer.step()
    trainer.train()
    with torch.no_grad():
        first, best, found = (penalised(m, start, prompts, beta).item() for m in (start, ascended, trainer.model))
    assert best > first + 0.2
    assert found - first > 0.99 * (best - first)
