"""The objectives and baselines in training: what they sample, score, optimise and log, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_family
import torch
from tiny import EOS, tiny_model
from tiny_task import ROWS, shares_letters, tiny_tokenizer, tiny_trainer

from rlseq.config.training import GRPOConfig
from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.data.prompts import build_prompts

WEIGHTS = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
FAMILY = {
    "mean": {},
    "leave_one_out": {"advantage_baseline": "leave_one_out", "scale_rewards": "none"},
    "greedy": {"advantage_baseline": "greedy", "scale_rewards": "none"},
    "batch": {"advantage_baseline": "batch", "scale_rewards": "batch"},
    "prefix": {"reference_prefix": 2},
    "minimum_risk": {"objective": "minimum_risk", "minimum_risk_sharpness": 0.5},
    "minimum_risk with references": {
        "objective": "minimum_risk",
        "minimum_risk_sharpness": 0.5,
        "minimum_risk_references": True,
    },
    "expected_accuracy": {"objective": "expected_accuracy"},
    "max_rl": {"objective": "max_rl", "max_rl_order": 8},
    "reference_exact": {"objective": "reference_exact"},
}
SETTINGS = [pytest.param(settings, id=name) for name, settings in FAMILY.items()]


def family_trainer(tmp_path, **settings):
    if settings.get("objective", "policy_gradient") != "policy_gradient":
        settings.setdefault("loss_type", GRPOConfig.loss_type)
    return tiny_trainer(tmp_path, **settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weights_after(trainer):
    trainer.train()
    return weights(trainer.model)


def logged(tmp_path, step=1):
    return [json.loads(line) for line in (tmp_path / f"rollouts/{step:06d}.jsonl").read_text().splitlines()]


def sometimes_abstains(completion, references):
    return None if completion.startswith(("A", "B", "a", "b", "c")) else shares_letters(completion, references)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_update_does_not_depend_on_the_micro_batch_split(tmp_path, settings):
    rewards, rows = [sometimes_abstains], 16
    if settings.get("objective") in EXACT_OBJECTIVES:  # each of the 8 prompts once; their chances are small
        rows, settings = 8, {**settings, "learning_rate": 20.0}
    settings = {**WEIGHTS, **settings}
    whole = family_trainer(tmp_path / "a", rewards=rewards, per_device_train_batch_size=rows, **settings)
    small = 4 if settings.get("objective") == "minimum_risk" else 2  # minimum risk needs whole groups
    split = family_trainer(
        tmp_path / "b",
        rewards=rewards,
        per_device_train_batch_size=small,
        gradient_accumulation_steps=rows // small,
        **settings,
    )
    start = weights(whole.model)
    after = weights_after(whole)
    assert after.isfinite().all() and (after - start).abs().max() > 1e-3
    torch.testing.assert_close(weights_after(split), after, atol=2e-5, rtol=0)
    if settings.get("objective") not in EXACT_OBJECTIVES:
        assert {row["status"]["sometimes_abstains"] for row in logged(tmp_path / "a")} == {"ok", "abstained"}


@pytest.mark.parametrize("settings", SETTINGS)
def test_several_steps_on_one_batch_of_rollouts_learn(tmp_path, settings):
    rounds = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}
    if settings.get("objective") == "reference_exact":  # exact on policy alone: minibatches of one update
        rounds = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
    trainer = family_trainer(tmp_path, **settings, **rounds, max_steps=8)
    start = weights(trainer.model)
    assert (weights_after(trainer) - start).abs().max() > 1e-3
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


# the greedy and the batch baseline


def greedy_by_a_loop(model, prompt_ids, limit):
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + limit:
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("G", [1, 4])
def test_the_greedy_baseline_is_the_reward_of_the_greedy_completion(tmp_path, G):
    size = {"num_generations": G, "per_device_train_batch_size": 8}
    trainer = family_trainer(tmp_path, max_steps=1, **size, **FAMILY["greedy"])
    model, tokenizer = tiny_model("llama", initializer_range=0.1), tiny_tokenizer()
    baseline = {}
    for prompt, row in zip(build_prompts(ROWS, tokenizer), ROWS, strict=True):
        text = tokenizer.decode(greedy_by_a_loop(model, prompt.prompt_ids, 6), skip_special_tokens=True)
        baseline[prompt.key] = shares_letters(text, row["references"])
    trainer.train()
    rows = logged(tmp_path)
    assert len(rows) == 8
    for row in rows:
        assert row["advantage"] == pytest.approx(row["total"] - baseline[row["prompt_key"]], abs=1e-5)
    mean = sum(baseline[row["prompt_key"]] for row in rows) / 8
    assert trainer.state.log_history[0]["greedy_reward"] == pytest.approx(mean, abs=1e-5)


def test_where_the_greedy_completion_abstains_nothing_is_compared_with_it(tmp_path):
    seen = set()

    def abstains_when_met_again(completion, completion_ids):
        return None if tuple(completion_ids) in seen else 1.0 + len(completion_ids)

    tokenizer = tiny_tokenizer()
    first = build_prompts(ROWS, tokenizer)[0]
    greedy = tuple(greedy_by_a_loop(tiny_model("llama", initializer_range=0.1), first.prompt_ids, 6))
    seen.add(greedy)
    trainer = family_trainer(
        tmp_path, rows=ROWS[:1] * 4, rewards=[abstains_when_met_again], max_steps=1, **FAMILY["greedy"]
    )
    trainer.train()
    assert all(row["advantage"] == 0 for row in logged(tmp_path))


@pytest.mark.parametrize("G", [1, 4])
def test_the_batch_baseline_is_the_mean_of_what_did_not_abstain(tmp_path, G):
    settings = {"advantage_baseline": "batch", "scale_rewards": "none", "per_device_train_batch_size": 8}
    trainer = family_trainer(tmp_path, rewards=[sometimes_abstains], num_generations=G, max_steps=1, **settings)
    trainer.train()
    rows = logged(tmp_path)
    present = [row["total"] for row in rows if row["total"] is not None]
    assert 1 < len(present) < len(rows) == 8
    for row in rows:
        expected = 0 if row["total"] is None else row["total"] - sum(present) / len(present)
        assert row["advantage"] == pytest.approx(expected, abs=1e-5)


# reference_prefix


def len_of(completion):
    return float(len(completion))


def test_rewards_of_different_scales_have_equal_weight_where_each_is_normalised_first(tmp_path):
    def large(completion):
        return 100.0 * len(completion)

    trainer = tiny_trainer(tmp_path, rewards=[shares_letters, large], multi_objective_aggregation="normalize_then_sum")
    trainer.model.train()
    batch = trainer.make_batch([trainer.train_dataset[i] for i in (0,) * 4 + (1,) * 4])

    def normalised(values):
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return [(v - mean) / (std + 1e-4) for v in values]

    sums = [0.0] * 8
    for name in trainer.suite.names:
        values = [one.values[name] for one in batch.scored]
        sums = [s + v for s, v in zip(sums, normalised(values[:4]) + normalised(values[4:]), strict=True)]
    assert len(set(sums)) > 2
    assert batch.trained.advantages.tolist() == pytest.approx(normalised(sums), abs=1e-4)


def test_rollouts_continue_from_reference_tokens_which_are_not_trained(tmp_path):
    rows = [{"prompt": "a b = ", "references": ["A B C D", "E"]}, {"prompt": "c = ", "references": []}]
    trainer = family_trainer(
        tmp_path, rows=rows, rewards=[len_of], per_device_train_batch_size=8, reference_prefix=3, **WEIGHTS
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    tokenizer = tiny_tokenizer()
    batch = trainer.make_batch([trainer.train_dataset[i] for i in (0,) * 4 + (1,) * 4]).trained
    forced = {0: tokenizer("A B C")["input_ids"], 1: tokenizer("E")["input_ids"]}  # a token at least is sampled
    trained = 0
    for row, rollout in enumerate(trainer.batch.rollouts):
        prefix = forced[rollout.sample % 2] if row < 4 else []
        k, length = len(prefix), len(rollout.completion_ids)
        assert list(rollout.completion_ids[:k]) == prefix and length > k
        assert length <= 6
        assert rollout.text.startswith(tokenizer.decode(prefix))
        assert rollout.loss_mask == (False,) * k + (True,) * (length - k)
        mask = batch.mask[row].tolist()
        assert mask == [k <= t < length for t in range(len(mask))]
        trained += length - k
    assert batch.trained_tokens == trained
    assert batch.mask.sum() == trained

    batch = dataclasses.replace(batch, advantages=torch.ones(8))
    loss = trainer.micro_batch_loss(trainer.model, batch)
    found = torch.autograd.grad(loss, list(trainer.model.parameters()))
    # dapo on policy with advantages of 1: minus the mean of ∇log π over the tokens that were sampled
    total = 0.0
    for rollout in trainer.batch.rollouts:
        index = 0 if rollout.prompt_key == trainer.prompts[0].key else 1
        prompt = trainer.prompts[index].prompt_ids
        ids = torch.tensor([[*prompt, *rollout.completion_ids]])
        logprobs = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for t, counted in enumerate(rollout.loss_mask):
            if counted:
                total = total + logprobs[len(prompt) - 1 + t, rollout.completion_ids[t]]
    expected = torch.autograd.grad(-total / trained, list(trainer.model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# exact objectives


def chance(model, prompt_ids, completions):
    """Σ p of completions, by plain forwards."""
    total = 0.0
    for completion in completions:
        ids = torch.tensor([[*prompt_ids, *completion]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        total += logprobs.gather(1, torch.tensor(completion)[:, None]).sum().exp().item()
    return total


LONG = [
    {"prompt": "a = ", "references": ["A", "B", "A"]},  # one of them twice
    {"prompt": "b c = ", "references": ["B C D E F G H", ""]},  # eight tokens with the end: cannot be sampled
    {"prompt": "d = ", "references": ["D E F G H I A"]},
    {"prompt": "e = ", "references": []},
]


@pytest.mark.parametrize("objective", ["expected_accuracy", "max_rl", "reference_exact"])
def test_expected_accuracy_is_that_of_the_references_that_can_be_sampled(tmp_path, objective):
    per_prompt = 1 if objective in EXACT_OBJECTIVES else 4
    trainer = family_trainer(
        tmp_path,
        rows=LONG,
        rewards=[len_of],
        objective=objective,
        max_rl_order=3 if objective == "max_rl" else None,
        per_device_train_batch_size=4 * per_prompt,
        learning_rate=0.0,
        max_steps=1,
    )
    model, tokenizer = tiny_model("llama", initializer_range=0.1), tiny_tokenizer()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in LONG]
    kept = [["A", "B"], [""], [], []]
    expected = [
        chance(model, p, [[*tokenizer(text)["input_ids"], EOS] for text in texts])
        for p, texts in zip(prompts, kept, strict=True)
    ]
    trainer.train()
    assert trainer.state.log_history[0]["expected_accuracy"] == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_expected_accuracy_samples_nothing_and_a_micro_batch_may_lack_references(tmp_path):
    def unwanted(completion):
        raise AssertionError("nothing is sampled, so nothing is scored")

    settings = {"rows": LONG, "rewards": [unwanted], "objective": "expected_accuracy", **WEIGHTS}
    whole = family_trainer(tmp_path / "a", per_device_train_batch_size=4, **settings)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = family_trainer(tmp_path / "b", **single, **settings)
    padded = family_trainer(tmp_path / "c", **single, **settings, pack_updates=False)
    after = weights_after(whole)
    assert not (tmp_path / "a/rollouts").exists()
    for other in (split, padded):
        torch.testing.assert_close(weights_after(other), after, atol=2e-5, rtol=0)


@pytest.mark.parametrize("objective", ["minimum_risk", "reference_exact"])
def test_references_that_cannot_be_sampled_are_not_scored(tmp_path, objective):
    scored = set()

    def remembers(completion):
        scored.add(completion)
        return 0.5

    references = {"minimum_risk_references": True} if objective == "minimum_risk" else {}
    trainer = family_trainer(tmp_path, rows=LONG, rewards=[remembers], objective=objective, max_steps=1, **references)
    trainer.train()
    assert {"A", "B", ""} <= scored
    assert not {"B C D E F G H", "D E F G H I A"} & scored


def test_references_are_not_scored_where_only_their_likelihood_is_wanted(tmp_path):
    calls = []

    def counts(completion):
        calls.append(completion)
        return 0.5

    trainer = family_trainer(tmp_path, rewards=[counts], objective="minimum_risk", reference_loss_coef=0.5, max_steps=1)
    trainer.train()
    assert len(calls) == 16


def test_the_share_of_references_does_not_count_abstentions(tmp_path):
    trainer = family_trainer(
        tmp_path, rewards=[lambda completion: None], objective="reference_exact", max_steps=1, max_completion_length=2
    )
    trainer.train()
    references = {row["prompt"]: row["references"][0] for row in ROWS}
    right = [
        row["completion"] == references[row["prompt"]] and row["finish_reason"] == "stop" for row in logged(tmp_path)
    ]
    assert trainer.state.log_history[0]["frac_reference"] == pytest.approx(sum(right) / 16)


@pytest.mark.soak
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu-2proc.yaml"]
    script = Path(__file__).parents[1] / "tiny_family.py"
    command = [sys.executable, *launcher, script, tmp_path / "two"]
    subprocess.run(list(map(str, command)), cwd=script.parents[1], check=True, timeout=240, capture_output=True)
    tiny_family.run(tmp_path / "one", processes=1)
    for name in tiny_family.RUNS:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for step in (1, 2) if name != "expected_accuracy" else ():
            rows = [{(r["prompt_key"], r["sample"]): r for r in logged(path, step)} for path in (one, two)]
            assert rows[0].keys() == rows[1].keys() and len(rows[0]) == tiny_family.RUNS[name][0]
            for key, row in rows[0].items():
                assert rows[1][key]["completion"] == row["completion"]
                assert rows[1][key]["advantage"] == pytest.approx(row["advantage"], abs=1e-5)
        losses = [json.loads((path / "loss.json").read_text()) for path in (one, two)]
        assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)
        found, expected = torch.load(two / "weights.pt"), torch.load(one / "weights.pt")
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


TWINS = [
    {"prompt": "a b = ", "references": ["A B"]},
    {"prompt": "c = ", "references": ["C", "C C"]},
    {"prompt": "a b = ", "references": ["B", "A"]},
    {"prompt": "d = ", "references": []},
]


def of_first_reference(completion, references):
    return len(completion) + 0.5 * completion.startswith(references[0]) if references else 0.25 * len(completion)


@pytest.mark.parametrize(
    "settings",
    [
        {"reference_loss_coef": 1.0},
        {"objective": "minimum_risk", "minimum_risk_sharpness": 0.5, "minimum_risk_references": True},
        {"objective": "expected_accuracy", "learning_rate": 20.0},
        {"objective": "reference_exact"},
    ],
    ids=lambda settings: settings.get("objective", "reference_loss"),
)
def test_rows_of_one_prompt_keep_their_own_references(tmp_path, settings):
    G = 1 if settings.get("objective") == "expected_accuracy" else 4
    common = {"rows": TWINS, "rewards": [of_first_reference], **WEIGHTS, **settings}
    whole = family_trainer(tmp_path / "a", per_device_train_batch_size=4 * G, **common)
    split = family_trainer(tmp_path / "b", per_device_train_batch_size=G, gradient_accumulation_steps=4, **common)
    start = weights(whole.model)
    after = weights_after(whole)
    assert (after - start).abs().max() > 1e-3
    torch.testing.assert_close(weights_after(split), after, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings, logged",
    [
        ({}, True),
        ({"advantage_baseline": "greedy", "scale_rewards": "none"}, False),
        ({"objective": "reference_exact"}, False),
        ({"objective": "minimum_risk"}, True),
    ],
)
def test_groups_of_equal_rewards_are_counted_only_where_they_teach_nothing(tmp_path, settings, logged):
    trainer = tiny_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    assert ("frac_reward_zero_std" in trainer.state.log_history[0]) == logged
