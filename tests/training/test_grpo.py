"""The GRPO trainer at TRL's seams: each step against a plain forward, hand arithmetic, or TRL's own trainer."""

from __future__ import annotations

import json
import math

import pytest
import torch
import trl
from tiny import EOS, tiny_model
from tiny_chat import chat_model, chat_tokenizer
from tiny_shapes import tiny_shape
from tiny_task import ROWS, as_micro_batch, shares_letters, tiny_tokenizer, tiny_trainer

from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError, RewardError
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.trl.batch import packed_forward


def padded_batch():
    """Three completions of two prompts in TRL's layout: prompts padded on the left, completions on the right."""
    prompt_ids = torch.tensor([[0, 0, 5, 4], [0, 0, 5, 4], [7, 8, 9, 4]])
    prompt_mask = (prompt_ids != 0).long()
    completion_ids = torch.tensor([[14, EOS, 0], [15, 16, EOS], [17, EOS, 0]])
    completion_mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "prompt_index": torch.tensor([0, 0, 2]),
    }


def plain_logprobs(model, prompt, completion, temperature=1.0):
    """Log-probs and entropies of one sequence by one forward without padding."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    taken = logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    return taken, -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pack_updates", [True, False])
def test_log_probs_and_entropies_equal_those_of_each_sequence_alone(tmp_path, family, pack_updates):
    trainer = tiny_trainer(tmp_path, family=family, pack_updates=pack_updates, temperature=0.7)
    assert trainer.forward.packs == pack_updates
    batch = as_micro_batch(padded_batch())
    found = trainer.forward.scores(trainer.model, batch)
    logps, entropies = found.logprobs, found.entropies
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        expected, expected_entropy = plain_logprobs(trainer.model, prompt, completion, temperature=0.7)
        torch.testing.assert_close(logps[row, : len(completion)], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies[row, : len(completion)], expected_entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "loss_type, level",
    [*((loss_type, "token") for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")), ("grpo", "sequence")],
)
def test_loss_and_gradient_equal_those_of_plain_trl_on_the_same_batch(tmp_path, loss_type, level):
    ours = tiny_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    theirs = trl.GRPOTrainer(
        tiny_model("llama", initializer_range=0.1),
        reward_funcs=[lambda **_: 0.0],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=6,
            use_cpu=True,
            loss_type=loss_type,
            importance_sampling_level=level,
        ),
        train_dataset=ours.train_dataset,
        processing_class=tiny_tokenizer(),
    )
    inputs = padded_batch() | {
        "advantages": torch.tensor([1.0, -0.5, 0.25]),
        "old_per_token_logps": torch.full((3, 3), -2.5),
        "num_items_in_batch": torch.tensor(7.0),
    }
    losses, gradients = [], []
    for trainer, batch in ((ours, as_micro_batch(inputs)), (theirs, inputs)):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_rows_without_an_advantage_are_left_out_and_change_no_gradient(tmp_path, monkeypatch, loss_type, on_policy):
    trainer = tiny_trainer(tmp_path, loss_type=loss_type)
    inputs = padded_batch() | {"advantages": torch.tensor([1.0, 0.0, -0.25]), "num_items_in_batch": torch.tensor(7.0)}
    if not on_policy:
        inputs["old_per_token_logps"] = torch.full((3, 3), -2.5)
    batch = as_micro_batch(inputs)
    trainer.current_gradient_accumulation_steps = 1
    scored, forward = [], packed_forward.forward  # scored: tokens of completions, by forward

    def counted(model, prompts, completions, *args, **options):
        scored.append(sum(map(len, completions)))
        return forward(model, prompts, completions, *args, **options)

    monkeypatch.setattr(packed_forward, "forward", counted)
    losses, gradients = [], []
    for all_rows in (False, True):
        if all_rows:
            monkeypatch.setattr(trainer.loss, "rows_that_teach", lambda *_: None)
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    left_out, whole = scored
    assert whole == sum(map(len, batch.completion_ids))
    assert left_out == whole - len(batch.completion_ids[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert any(g.abs().max() > 1e-3 for g in gradients[1])
    for some, every in zip(*gradients, strict=True):
        torch.testing.assert_close(some, every, atol=1e-6, rtol=1e-5)
    entropies = [trainer.forward.scores(trainer.model, batch.select([row])).entropies for row in (0, 2)]
    of_tokens = torch.cat([e[0, : len(batch.completion_ids[row])] for e, row in zip(entropies, (0, 2), strict=True)])
    assert trainer._metrics["train"]["entropy"][0] == pytest.approx(of_tokens.mean().item(), abs=1e-5)


def test_a_batch_whose_groups_are_all_equal_leaves_the_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, rewards=["constant"], max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("setting", [{"beta": 0.1}, {"entropy_coef": 0.01}, {"reference_loss_coef": 0.5}])
def test_rows_without_an_advantage_stay_where_another_term_needs_them(tmp_path, setting):
    trainer = tiny_trainer(tmp_path, **setting)
    batch = as_micro_batch(padded_batch() | {"advantages": torch.zeros(3)})
    assert trainer.loss.rows_that_teach(batch) is None


def test_a_router_s_loss_is_added(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_shape("mixtral"), max_steps=1, router_aux_loss_coef=0.5)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "aux_loss" in line]
    assert line["loss"] == pytest.approx(0.5 * line["aux_loss"], rel=0.2)  # advantages sum to 0: the rest is small


def weights_after(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("reference_loss_coef", [0.0, 0.5])
def test_an_update_does_not_depend_on_the_micro_batch_split(tmp_path, reference_loss_coef):
    settings = {"reference_loss_coef": reference_loss_coef, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
    whole = weights_after(tiny_trainer(tmp_path / "a", per_device_train_batch_size=16, **settings))
    split = weights_after(
        tiny_trainer(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings)
    )
    split_groups = weights_after(
        tiny_trainer(tmp_path / "c", per_device_train_batch_size=2, gradient_accumulation_steps=8, **settings)
    )
    start = torch.cat([p.detach().flatten() for p in tiny_model("llama", initializer_range=0.1).parameters()])
    assert (whole - start).abs().max() > 1e-3
    torch.testing.assert_close(split, whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(split_groups, whole, atol=2e-5, rtol=0)


def test_reference_loss_is_the_mean_token_nll_of_the_references(tmp_path):
    trainer = tiny_trainer(tmp_path, reference_loss_coef=0.5, learning_rate=0.0, max_steps=1)
    model, tokenizer = tiny_model("llama", initializer_range=0.1), tiny_tokenizer()
    trainer.train()
    seen = {json.loads(line)["prompt"] for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()}
    expected = []
    for row in ROWS:
        if row["prompt"] in seen:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["references"][0])["input_ids"] + [EOS]
            expected.append(-plain_logprobs(model, prompt, answer)[0].mean().item())
    logged = next(line for line in trainer.state.log_history if "reference_nll" in line)
    assert len(expected) == 4
    assert logged["reference_nll"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def test_advantages_are_of_the_logged_reward_within_each_group(tmp_path):
    def first(completion, references):
        return shares_letters(completion, references)

    def abstains_on_long(completion):
        return None if len(completion.split()) > 3 else 1.0 if "A" in completion else 0.0

    trainer = tiny_trainer(
        tmp_path, rewards=[{"func": first, "weight": 2.0}, {"func": abstains_on_long, "weight": 1.0}], max_steps=1
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {row["status"]["abstains_on_long"] for row in rows} == {"ok", "abstained"}
    groups = {}
    for row in rows:
        a, b = row["values"]["first"], row["values"]["abstains_on_long"]
        # Σ w v over the present, scaled to all weights: 2a + b, or 2a · 3/2 where the second abstains.
        expected = 2 * a + b if b is not None else 3 * a
        assert row["total"] == pytest.approx(expected, abs=1e-6)
        groups.setdefault(row["prompt_key"], []).append(row)
    for group in groups.values():
        assert sorted(row["sample"] for row in group) == [0, 1, 2, 3]
        totals = [row["total"] for row in group]
        mean = sum(totals) / 4
        std = math.sqrt(sum((t - mean) ** 2 for t in totals) / 3)
        for row in group:
            expected = (row["total"] - mean) / (std + 1e-4) if std > 1e-6 else 0.0
            assert row["advantage"] == pytest.approx(expected, abs=1e-4)
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(sum(row["total"] for row in rows) / 16, abs=1e-5)
    assert logged["rewards/abstains_on_long/abstained"] == sum(
        row["status"]["abstains_on_long"] == "abstained" for row in rows
    )


def test_two_rewards_of_one_name_stay_two_series(tmp_path):
    def make(value):
        def quality(completion):
            return value

        return quality

    trainer = tiny_trainer(tmp_path, rewards=[make(1.0), make(0.25)], max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/quality/mean"] == 1.0
    assert logged["rewards/quality-2/mean"] == 0.25
    assert logged["reward"] == pytest.approx(1.25)
    assert logged["frac_reward_zero_std"] == 1.0


def test_an_infinite_reward_stops_the_step_before_the_weights_and_names_the_row(tmp_path):
    def unbounded(completion):
        return float("inf")

    trainer = tiny_trainer(tmp_path, rewards=[unbounded])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RewardError, match=r"(?s)unbounded.*inf.*prompt"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_a_prompt_met_again_gets_new_noise(tmp_path):
    trainer = tiny_trainer(
        tmp_path, rows=ROWS[:4], learning_rate=0.0, max_steps=3, per_device_train_batch_size=16, shuffle_dataset=False
    )
    trainer.train()
    completions = []
    for step in (1, 2, 3):
        rows = [json.loads(line) for line in (tmp_path / f"rollouts/{step:06d}.jsonl").read_text().splitlines()]
        completions.append(sorted((row["prompt_key"], row["sample"], row["completion"]) for row in rows))
    assert [c[:2] for c in completions[0]] == [c[:2] for c in completions[1]]
    assert completions[0] != completions[1] != completions[2]


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tmp_path):
    first = weights_after(tiny_trainer(tmp_path / "a", seed=3))
    again = weights_after(tiny_trainer(tmp_path / "b", seed=3))
    other = weights_after(tiny_trainer(tmp_path / "c", seed=4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_on_policy_a_recomputed_ratio_is_one_and_off_policy_it_is_not(tmp_path):
    trainer = tiny_trainer(tmp_path, num_iterations=2, max_steps=2, learning_rate=3e-2, epsilon=1e-6)
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "clip_ratio/region_mean" in line)
    # With old log-probs from the sampler, an on-policy ratio differs from 1 by rounding alone: the clip range of
    # 1e-6 may catch some of that, but after an update nearly every token with the right sign is outside it.
    assert second["clip_ratio/region_mean"] > 0.3
    assert first["clip_ratio/region_mean"] < second["clip_ratio/region_mean"] / 2


def test_groups_are_shuffled_whole(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4, steps_per_generation=4)
    prompts = [3, 3, 3, 3, 1, 1, 1, 1, 2, 2, 2, 2]
    rows = trainer.batches.shuffled(prompts)
    assert sorted(rows) == list(range(12))
    for start in range(0, 12, 4):
        assert len({prompts[row] for row in rows[start : start + 4]}) == 1


def test_minibatches_hold_the_same_groups_on_any_number_of_processes(tmp_path):
    def minibatches(processes, batch):
        found = [set(), set()]
        for process in range(processes):
            trainer = tiny_trainer(tmp_path, per_device_train_batch_size=32 // (2 * processes), steps_per_generation=2)
            trainer._step = batch * 2
            trainer.accelerator.state._shared_state["process_index"] = process
            prompts = torch.arange(8).repeat_interleave(4).chunk(processes)[process].tolist()
            shuffled, half = [prompts[row] for row in trainer.batches.shuffled(prompts)], 16 // processes
            for number, part in enumerate((shuffled[:half], shuffled[half:])):
                assert len(part) == half
                found[number] |= set(part)
        trainer.accelerator.state._shared_state["process_index"] = 0
        return found

    rounds = [minibatches(1, batch) for batch in range(20)]
    assert rounds == [minibatches(2, batch) for batch in range(20)] == [minibatches(4, batch) for batch in range(20)]
    for first, second in rounds:
        assert first | second == set(range(8))
        assert all(len(first & {block, block + 1}) == 1 for block in (0, 2, 4, 6))
    assert len({tuple(sorted(first)) for first, _ in rounds}) > 8  # of 2⁴


@pytest.mark.parametrize("accumulation, per_round", [(3, 2), (5, 2), (4, 2), (2, 3)])
def test_every_round_is_logged_however_rounds_fall_on_optimizer_steps(tmp_path, accumulation, per_round):
    trainer = tiny_trainer(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_round,
        max_steps=4,
    )
    rounds, make = [], trainer.make_batch
    trainer.make_batch = lambda rows: (rounds.append(len(rows)), make(rows))[1]
    trainer.train()
    files = list((tmp_path / "rollouts").glob("*.jsonl"))
    assert len(files) == len(rounds)
    assert sum(len(file.read_text().splitlines()) for file in files) == sum(rounds)


@pytest.mark.parametrize("setting", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_truncated_sampling_is_refused_in_training(tmp_path, setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        tiny_trainer(tmp_path, **setting)


def test_settings_of_a_generator_that_does_not_sample_or_would_warp_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="rlseq's sampler does not read"):
        tiny_trainer(tmp_path, generation_kwargs={"num_beams": 1})
    for warp in ({"top_k": 1}, {"temperature": 0.2}):
        with pytest.raises(ConfigError, match=r"\(generation_kwargs\) cannot be used in training"):
            tiny_trainer(tmp_path, rlseq_sampler=False, generation_kwargs=warp)
    tiny_trainer(tmp_path, rlseq_sampler=False, generation_kwargs={"num_beams": 1})


def chat_trainer(path, rendered, given):
    tokenizer = chat_tokenizer()
    rows = [{"prompt": [{"role": "user", "content": letter}]} for letter in "abcd"]
    return GRPOTrainer(
        chat_model(tokenizer),
        lambda completion: float(len(completion)),
        GRPOConfig(
            output_dir=str(path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            use_cpu=True,
            chat_template_kwargs=given,
        ),
        build_prompts(rows, tokenizer, chat_template_kwargs=rendered),
        processing_class=tokenizer,
    )


def test_the_update_scores_the_prompts_that_were_sampled_from(tmp_path):
    silent = {"enable_thinking": False}
    trainer = chat_trainer(tmp_path, silent, silent)
    batch = trainer.make_batch([trainer.train_dataset[i] for i in (0,) * 4 + (1,) * 4]).trained
    assert batch.prompt_ids == tuple(trainer.prompts[index].prompt_ids for index in batch.prompt_index)
    for rendered, given in ((None, silent), (silent, None)):
        with pytest.raises(ConfigError, match="rendered otherwise"):
            chat_trainer(tmp_path, rendered, given)


def test_trl_s_own_generation_path_gives_the_same_kind_of_rollouts(tmp_path):
    trainer = tiny_trainer(tmp_path, rlseq_sampler=False, max_steps=1)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {row["sample"] for row in rows} == {0, 1, 2, 3}
    assert all(row["logprob"] is None for row in rows)
    assert all(row["status"] == {"shares_letters": "ok"} for row in rows)


def test_training_raises_the_reward(tmp_path):
    def answers_a(completion):
        return float(completion.split()[:1] == ["A"])

    trainer = tiny_trainer(tmp_path, rewards=[answers_a], max_steps=30, learning_rate=2e-2)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.9
