"""What PPO learns from a batch of rollouts: rewards a token, values, advantages and returns, each by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny import EOS, tiny_model
from tiny_ppo import double_sum_gae, fake_sampler, generated, load, plain_logprobs, saved_model, tiny_ppo, values_of

COMPLETIONS = [(14, EOS), (15, 16, 5, EOS), (17, 18, 19, 20, 21, 22), (EOS,)]  # the third is cut at the limit
REWARDS = dict(zip(COMPLETIONS, (1.0, -0.5, 2.0, 0.25), strict=True))
ROWS = range(4)
CUT = 2
GAMMA, LAM = 0.9, 0.8
RAW = {"per_device_train_batch_size": 4, "gamma": GAMMA, "lam": LAM, "whiten_advantages": False}


def table(completion_ids):
    return REWARDS[tuple(completion_ids)]


def at_the_end(reward, length):
    return [0.0] * (length - 1) + [reward]


def batch(tmp_path, monkeypatch, *, rewards=(table,), completions=COMPLETIONS, **settings):
    """A trainer and the batch it generates when it samples `completions`."""
    trainer = tiny_ppo(tmp_path, rewards=rewards, **{**RAW, **settings})
    fake_sampler(monkeypatch, trainer, completions)
    return trainer, generated(trainer, ROWS)


def expected_row(trainer, row, rewards, *, bootstraps=False):
    """(advantages, returns, values) of one row, from values by a plain forward and the double sum of GAE."""
    prompt = trainer.prompts[row].prompt_ids
    values = values_of(trainer, prompt, COMPLETIONS[row]).tolist()
    args = trainer.args
    advantages = double_sum_gae(rewards, values[:-1], values[-1] if bootstraps else 0.0, args.gamma, args.lam)
    return advantages, [a + v for a, v in zip(advantages, values[:-1], strict=True)], values[:-1]


def assert_targets(trainer, output, rewards, *, bootstraps=()):
    """Advantages, returns, values and mask of the batch equal those of `rewards`, lists a row (None: abstained)."""
    for row, mine in enumerate(rewards):
        length = len(COMPLETIONS[row])
        if mine is None:
            assert not output.value_mask[row].any()
            assert not output.advantages[row].any()
            continue
        advantages, returns, values = expected_row(trainer, row, mine, bootstraps=row in bootstraps)
        for name, expected in (("advantages", advantages), ("returns", returns), ("values", values)):
            torch.testing.assert_close(getattr(output, name)[row, :length], torch.tensor(expected), atol=2e-5, rtol=0)
        assert output.value_mask[row].tolist() == [t < length for t in range(6)]
        assert not output.advantages[row, length:].any() and not output.returns[row, length:].any()


@pytest.mark.parametrize("pack_updates", [True, False])
@pytest.mark.parametrize(("family", "critic"), [("llama", "separate"), ("llama", "shared"), ("gpt2", "separate")])
def test_advantages_are_gae_of_the_reward_on_the_last_token(tmp_path, monkeypatch, family, critic, pack_updates):
    trainer, output = batch(tmp_path, monkeypatch, family=family, critic=critic, pack_updates=pack_updates)
    assert trainer.forward.packs == pack_updates
    assert_targets(trainer, output, [at_the_end(REWARDS[y], len(y)) for y in COMPLETIONS])
    assert output.values[0, 0] != output.values[1, 0]  # the head is not 0, so the values are put to the test


def test_the_value_behind_the_last_token_is_of_the_state_after_it(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch)
    _, after, logprobs = trainer.batches.advantages.ask_critic(output)
    for row, y in enumerate(COMPLETIONS):
        prompt = trainer.prompts[row].prompt_ids
        assert after[row].item() == pytest.approx(values_of(trainer, prompt, y)[-1].item(), abs=2e-5)
        expected = plain_logprobs(trainer.model, prompt, y).detach()
        torch.testing.assert_close(logprobs[row, : len(y)], expected, atol=2e-5, rtol=0)


def test_the_kl_penalty_is_the_log_ratio_of_each_token_to_the_start(tmp_path, monkeypatch):
    beta = 0.3
    trainer = tiny_ppo(tmp_path, rewards=(table,), model=saved_model(tmp_path / "model"), beta=beta, **RAW)
    start = load(tmp_path / "model")
    perturb(trainer)
    fake_sampler(monkeypatch, trainer, COMPLETIONS)
    output = generated(trainer, ROWS)
    ratios = [log_ratio(trainer, start, row) for row in ROWS]
    assert max(abs(r) for row in ratios for r in row) > 0.1
    rewards = [
        [r - beta * k for r, k in zip(at_the_end(REWARDS[y], len(y)), ratio, strict=True)]
        for y, ratio in zip(COMPLETIONS, ratios, strict=True)
    ]
    assert_targets(trainer, output, rewards)
    metrics = trainer._metrics["train"]
    total = sum(map(sum, ratios))
    assert metrics["kl"] == [pytest.approx(total / 13, abs=1e-5)]  # 2 + 4 + 6 + 1 tokens
    assert metrics["kl_penalty"] == [pytest.approx(beta * total / 4, abs=1e-5)]
    assert metrics["kl_coefficient"] == [beta]
    # The reward holds it: the loss does not add it again.
    with_beta = trainer.micro_batch_loss(trainer.model, output).item()
    trainer.beta = 0.0
    assert trainer.micro_batch_loss(trainer.model, output).item() == with_beta


def test_the_kl_that_is_logged_and_steered_by_is_of_all_completions_abstained_or_not(tmp_path, monkeypatch):
    def abstains_on_the_second(completion_ids):
        return None if tuple(completion_ids) == COMPLETIONS[1] else table(completion_ids)

    settings = {**RAW, "beta": 0.3, "kl_target": 1e-3}
    trainer = tiny_ppo(tmp_path, rewards=(abstains_on_the_second,), model=saved_model(tmp_path / "model"), **settings)
    start = load(tmp_path / "model")
    perturb(trainer)
    fake_sampler(monkeypatch, trainer, COMPLETIONS)
    output = generated(trainer, ROWS)
    total = sum(sum(log_ratio(trainer, start, row)) for row in ROWS)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(total / 13, abs=1e-5)]
    # Clipped at −0.2 or 0.2 by Ziegler's rule, whose K is 0.1.
    assert trainer.kl_coefficient.of_next == pytest.approx(0.3 * (1.02 if total / 4 > 1e-3 else 0.98))
    assert not output.advantages[1].any()


def perturb(trainer):
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "rlseq_critic" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=noise))


def log_ratio(trainer, start, row):
    prompt, y = trainer.prompts[row].prompt_ids, COMPLETIONS[row]
    with torch.no_grad():
        return (plain_logprobs(trainer.model, prompt, y) - plain_logprobs(start, prompt, y)).tolist()


def test_the_kl_may_be_in_the_loss_instead(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "model")
    trainer = tiny_ppo(tmp_path, rewards=(table,), model=model, beta=0.3, kl_in_reward=False, **RAW)
    start = load(tmp_path / "model")
    perturb(trainer)
    fake_sampler(monkeypatch, trainer, COMPLETIONS)
    output = generated(trainer, ROWS)
    assert_targets(trainer, output, [at_the_end(REWARDS[y], len(y)) for y in COMPLETIONS])
    with_kl = trainer.micro_batch_loss(trainer.model, output).item()
    trainer.beta = 0.0
    without = trainer.micro_batch_loss(trainer.model, output).item()
    k3 = [math.exp(-d) - 1 + d for row in ROWS for d in log_ratio(trainer, start, row)]
    assert with_kl - without == pytest.approx(0.3 * sum(k3) / 13, abs=1e-5)
    assert sum(k3) > 0.01


def test_a_truncated_completion_is_scored_as_it_is_by_default(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch, truncated_completions="reward")
    assert_targets(trainer, output, [at_the_end(REWARDS[y], len(y)) for y in COMPLETIONS])


def test_a_truncated_completion_may_bootstrap_from_the_critic(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch, truncated_completions="bootstrap")
    rewards = [at_the_end(0.0 if row == CUT else REWARDS[y], len(y)) for row, y in enumerate(COMPLETIONS)]
    assert_targets(trainer, output, rewards, bootstraps=[CUT])


def test_a_truncated_completion_may_lose_a_penalty(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch, truncated_completions="penalty", truncation_penalty=0.75)
    lost = [0.75 if row == CUT else 0.0 for row in ROWS]
    rewards = [at_the_end(REWARDS[y] - lost[row], len(y)) for row, y in enumerate(COMPLETIONS)]
    assert_targets(trainer, output, rewards)


def test_the_advantage_that_is_logged_is_the_mean_over_all_trained_tokens(tmp_path):
    trainer = tiny_ppo(tmp_path, head=0, lam=0.0, whiten_advantages=False, max_steps=1)
    batches, make = [], trainer.make_batch
    trainer.make_batch = lambda rows: (batches.append(make(rows)), batches[-1])[1]
    trainer.train()
    (output,) = (one.trained for one in batches)
    advantages, mask = output.advantages, output.mask
    assert (advantages[mask] == 0).any()  # with one value for every state, all but a completion's last token
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    for row, mine, counted in zip(rows, advantages, mask, strict=True):
        assert row["advantage"] == pytest.approx(mine[counted].mean().item(), abs=1e-6)


def test_an_abstention_gives_advantage_0_and_leaves_the_critic_s_loss(tmp_path, monkeypatch):
    def abstains_on_the_second(completion_ids):
        return None if tuple(completion_ids) == COMPLETIONS[1] else table(completion_ids)

    trainer, output = batch(tmp_path, monkeypatch, rewards=[abstains_on_the_second], whiten_advantages=True)
    raw = [expected_row(trainer, row, at_the_end(REWARDS[COMPLETIONS[row]], len(COMPLETIONS[row]))) for row in ROWS]
    counted = torch.tensor([a for row in (0, 2, 3) for a in raw[row][0]])
    mean, std = counted.mean().item(), counted.std(correction=0).item()
    for row in (0, 2, 3):
        expected = [(a - mean) / (std + 1e-4) for a in raw[row][0]]
        assert output.advantages[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
    assert not output.advantages[1].any() and not output.value_mask[1].any()
    loss = trainer.micro_batch_loss(trainer.model, output).item()
    other = dataclasses.replace(output, returns=output.returns.clone())
    other.returns[1] = 100.0
    assert trainer.micro_batch_loss(trainer.model, other).item() == loss


def test_advantages_are_whitened_over_all_tokens_not_over_rows(tmp_path, monkeypatch):
    raw, plain = batch(tmp_path, monkeypatch)
    _, white = batch(tmp_path, monkeypatch, whiten_advantages=True)
    mask = white.value_mask
    tokens = plain.advantages[mask]
    assert mask.sum() == 13
    mean = sum(tokens.tolist()) / 13
    std = math.sqrt(sum((a - mean) ** 2 for a in tokens.tolist()) / 13)
    torch.testing.assert_close(white.advantages[mask], (tokens - mean) / (std + 1e-4), atol=1e-5, rtol=0)
    assert raw._metrics["train"]["advantages/std"] == [pytest.approx(std, abs=1e-5)]
    torch.testing.assert_close(white.returns, plain.returns)  # what the critic learns is in units of reward


def by_token(completion_ids):
    """0.1, 0.2, ... a token."""
    return [0.1 * (t + 1) for t in range(len(completion_ids))]


def test_a_reward_a_token_stands_on_its_token_and_the_others_on_the_last(tmp_path, monkeypatch):
    rewards = [{"func": by_token, "weight": 2.0}, {"func": table, "weight": 0.5}]
    trainer, output = batch(tmp_path, monkeypatch, rewards=rewards)
    expected = []
    for y in COMPLETIONS:
        row = [2 * 0.1 * (t + 1) for t in range(len(y))]
        row[-1] += 0.5 * REWARDS[y]
        expected.append(row)
    assert_targets(trainer, output, expected)


def test_an_abstention_beside_a_reward_a_token_scales_every_token_as_it_scales_the_total(tmp_path, monkeypatch):
    def abstains_on_the_second(completion_ids):
        return None if tuple(completion_ids) == COMPLETIONS[1] else 1.0

    rewards = [{"func": by_token, "weight": 2.0}, {"func": abstains_on_the_second, "weight": 1.0}]
    trainer, output = batch(tmp_path, monkeypatch, rewards=rewards)
    expected = [[2 * 0.1 * (t + 1) for t in range(len(y))] for y in COMPLETIONS]
    for row in (0, 2, 3):
        expected[row][-1] += 1.0
    expected[1] = [3 * 0.1 * (t + 1) for t in range(4)]  # (2 + 1) / 2 of its weight
    assert_targets(trainer, output, expected)


def test_a_truncated_completion_that_bootstraps_keeps_what_its_tokens_earned(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch, rewards=[by_token, table], truncated_completions="bootstrap")
    expected = [[0.1 * (t + 1) for t in range(len(y))] for y in COMPLETIONS]
    for row in (0, 1, 3):
        expected[row][-1] += REWARDS[COMPLETIONS[row]]
    assert_targets(trainer, output, expected, bootstraps=[CUT])


def test_what_is_logged_of_a_batch_is_of_all_its_tokens(tmp_path, monkeypatch):
    trainer, _ = batch(tmp_path, monkeypatch)
    rows = [expected_row(trainer, row, at_the_end(REWARDS[y], len(y))) for row, y in enumerate(COMPLETIONS)]
    returns = [r for row in rows for r in row[1]]
    errors = [r - v for row in rows for r, v in zip(row[1], row[2], strict=True)]
    metrics = trainer._metrics["train"]
    assert metrics["returns/mean"] == [pytest.approx(mean_of(returns), abs=1e-5)]
    assert metrics["returns/std"] == [pytest.approx(math.sqrt(variance(returns)), abs=1e-5)]
    explained = 1 - variance(errors) / variance(returns)
    assert metrics["critic/explained_variance"] == [pytest.approx(explained, rel=1e-4)]
    quarters = [[], [], [], []]  # token i of n is in quarter ⌊4i / n⌋
    for _, mine, values in rows:
        for i, (r, v) in enumerate(zip(mine, values, strict=True)):
            quarters[4 * i // len(mine)].append((r - v) ** 2)
    for number, squares in enumerate(quarters, start=1):
        expected = math.sqrt(mean_of(squares))
        assert metrics[f"critic/error_quarter_{number}"] == [pytest.approx(expected, abs=1e-4)]
    assert metrics["reward"] == [pytest.approx(mean_of(list(REWARDS.values())))]
    assert "frac_reward_zero_std" not in metrics  # of groups of one it would say nothing


def mean_of(numbers):
    return sum(numbers) / len(numbers)


def variance(numbers):
    return mean_of([(x - mean_of(numbers)) ** 2 for x in numbers])


def test_the_share_of_groups_without_spread_is_not_logged_since_samples_are_compared_with_the_critic(
    tmp_path, monkeypatch
):
    trainer = tiny_ppo(tmp_path, rewards=(table,), **{**RAW, "num_generations": 2})
    fake_sampler(monkeypatch, trainer, COMPLETIONS)
    generated(trainer, [0, 0, 1, 1])
    assert "reward" in trainer._metrics["train"]
    assert "frac_reward_zero_std" not in trainer._metrics["train"]


def test_a_batch_in_which_every_reward_abstains_moves_nothing(tmp_path, monkeypatch):
    trainer, output = batch(tmp_path, monkeypatch, rewards=[lambda completion: None])
    assert not output.value_mask.any()
    loss = trainer.micro_batch_loss(trainer.model, output)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_critic_packs_only_if_its_own_backbone_allows_it(tmp_path, monkeypatch, capsys):
    # A window of 4 tokens: in a packed row it would look at another sequence's columns.
    tiny_model("mistral", initializer_range=0.1).save_pretrained(tmp_path / "windowed")
    trainer, output = batch(tmp_path, monkeypatch, critic_name_or_path=str(tmp_path / "windowed"))
    assert not trainer.forward.packs and "because of the critic" in capsys.readouterr().out
    assert_targets(trainer, output, [at_the_end(REWARDS[y], len(y)) for y in COMPLETIONS])


def test_forced_tokens_are_not_judged_and_no_time_passes_on_them(tmp_path):
    trainer = tiny_ppo(tmp_path, reference_prefix=1, **RAW)
    output = generated(trainer, [1, 2, 5, 6])  # their references are longer than a token
    for row, one in enumerate(trainer.batch.scored):
        y, total = one.rollout.completion_ids, one.total
        assert one.rollout.loss_mask == (False,) + (True,) * (len(y) - 1)
        prompt = trainer.prompts[trainer.batch.rows[row]["index"]].prompt_ids
        values = values_of(trainer, prompt, y).tolist()[1:-1]
        advantages = double_sum_gae(at_the_end(total, len(y) - 1), values, 0.0, GAMMA, LAM)
        assert output.advantages[row, 1 : len(y)].tolist() == pytest.approx(advantages, abs=2e-5)
        assert output.value_mask[row].tolist() == [0 < t < len(y) for t in range(output.value_mask.shape[1])]
        assert output.advantages[row, 0] == 0


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_samples_that_share_their_prompt_in_a_packed_row_have_the_values_of_each_alone(tmp_path, critic):
    settings = {**RAW, "critic": critic, "num_generations": 4, "per_device_train_batch_size": 8}
    outputs = []
    for packs in (True, False):
        trainer = tiny_ppo(tmp_path / str(packs), pack_updates=packs, **settings)
        outputs.append(generated(trainer, [1] * 4 + [2] * 4))
        assert trainer.forward.packs == packs
    assert outputs[0].completion_ids == outputs[1].completion_ids
    for name in ("values", "returns", "advantages"):
        packed, alone = (getattr(output, name) for output in outputs)
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
        assert packed.std() > 0.05


def test_what_trl_s_own_generation_sampled_is_judged_alike(tmp_path):
    trainer = tiny_ppo(tmp_path, rlseq_sampler=False, **RAW)
    output = generated(trainer, ROWS)
    for row, one in enumerate(trainer.batch.scored):
        y = one.rollout.completion_ids
        values = values_of(trainer, trainer.prompts[row].prompt_ids, y).tolist()
        expected = double_sum_gae(at_the_end(one.total, len(y)), values[:-1], 0.0, GAMMA, LAM)
        assert output.advantages[row, : len(y)].tolist() == pytest.approx(expected, abs=2e-5)
