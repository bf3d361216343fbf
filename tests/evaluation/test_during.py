"""Evaluation during training: its numbers by hand, no trace in the run, one count a row at any number of processes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import tiny_model

from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import DataError, RewardError
from rlseq.evaluation.during import ValidationEvaluator, learning_warnings, measured_together
from rlseq.scoring import load_rewards

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E F A", "D E"]},
    {"prompt": "h = ", "references": []},
    {"prompt": "b c = ", "references": ["B", "B C"]},
]
NEW_TOKENS = 5


def letters(completion: str) -> float:
    return float(len(completion.split()))


def says_a(completion: str) -> float:
    return float("A" in completion.split())


def policy(**changes):
    return tiny_model("llama", seed=1, initializer_range=0.3, **changes)


def make_evaluator(rewards=(letters,), eval_rewards=None, rows=ROWS, **settings):
    tokenizer = word_tokenizer()
    suite = load_rewards(list(rewards))
    eval_suite = load_rewards(list(eval_rewards)) if eval_rewards else None
    settings = {"max_new_tokens": NEW_TOKENS, "seed": 3, "samples_per_row": 2} | settings
    return ValidationEvaluator(build_prompts(rows, tokenizer), tokenizer, suite, eval_suite, **settings)


def ids_of(text):
    return [VOCABULARY.index(word) for word in text.split()]


def next_logprobs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def decoded_greedily(model, prompt):
    ids = ids_of(prompt)
    start = len(ids)
    while len(ids) < start + NEW_TOKENS and (len(ids) == start or ids[-1] != EOS):
        ids.append(int(next_logprobs(model, ids).argmax()))
    return ids[start:]


def logprob(model, prompt, reference):
    ids, total = ids_of(prompt), 0.0
    for token in [*ids_of(reference), EOS]:
        total += next_logprobs(model, ids)[token].item()
        ids.append(token)
    return total


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def words(ids):
    return [VOCABULARY[i] for i in ids if VOCABULARY[i] not in ("<pad>", "<eos>", "<unk>")]


def test_the_numbers_are_those_of_a_token_by_token_loop():
    model = policy()
    found = make_evaluator([{"func": letters, "weight": 0.5}, {"func": says_a, "weight": 2.0}])(model)
    logprobs = [[logprob(model, row["prompt"], r) for r in row["references"]] for row in ROWS if row["references"]]
    tokens = sum(len(r.split()) + 1 for row in ROWS for r in row["references"])
    assert found["nll_per_token"] == pytest.approx(-sum(map(sum, logprobs)) / tokens, rel=1e-5)
    assert found["expected_accuracy"] == pytest.approx(mean(sum(map(math.exp, row)) for row in logprobs), rel=1e-5)
    decoded = [decoded_greedily(model, row["prompt"]) for row in ROWS]
    assert found["greedy/letters"] == mean(len(words(ids)) for ids in decoded)
    assert found["greedy/says_a"] == mean("A" in words(ids) for ids in decoded)
    assert found["greedy/reward"] == pytest.approx(0.5 * found["greedy/letters"] + 2.0 * found["greedy/says_a"])
    assert found["greedy/length"] == mean(map(len, decoded))
    assert found["greedy/truncated"] == mean(ids[-1] != EOS for ids in decoded)


def test_what_is_sampled_is_what_the_seed_and_a_fixed_stream_say():
    model, tokenizer = policy(), word_tokenizer()
    evaluator = make_evaluator()
    groups = sample(
        model,
        build_prompts(ROWS, tokenizer),
        num_samples=2,
        max_new_tokens=NEW_TOKENS,
        strategy=Sample(),
        seed=3,
        stream=1,
        stop_ids=[EOS],
        tokenizer=tokenizer,
    )
    sampled = [rollout for group in groups for rollout in group]
    torch.manual_seed(0)
    first = evaluator(model)
    torch.manual_seed(1)
    assert evaluator(model) == first
    assert first["sample/letters"] == first["sample/reward"] == mean(len(r.text.split()) for r in sampled)
    assert first["sample/length"] == mean(len(r.completion_ids) for r in sampled)
    others = [make_evaluator(seed=seed)(model) for seed in (4, 5, 6)]
    assert any(other["sample/logprob"] != first["sample/logprob"] for other in others)
    assert all(other["greedy/logprob"] == first["greedy/logprob"] for other in others)


def test_corpus_metrics_and_measured_rewards_are_there_with_their_direction():
    evaluator = make_evaluator([letters], ["phoneme_accuracy", says_a], [row for row in ROWS if row["references"]])
    found = evaluator(policy())
    assert set(found) == set(evaluator.metrics)
    assert evaluator.eval_rewards == ("phoneme_accuracy", "says_a") and evaluator.best == "greedy/phoneme_accuracy"
    assert {"greedy/wer", "sample/wer", "greedy/per", "sample/per", "sample/phoneme_accuracy"} <= set(found)
    assert evaluator.metrics["greedy/wer"] is False and evaluator.metrics["greedy/length"] is None
    assert evaluator.metrics["sample/says_a"] is evaluator.metrics["expected_accuracy"] is True
    assert found["greedy/reward"] == found["greedy/letters"]  # what is only measured is in no total


def test_a_measured_reward_that_is_optimised_too_is_measured_once_and_another_of_its_name_is_told_apart(tmp_path):
    calls = tmp_path / "calls"

    def counted(completion: str) -> float:
        with calls.open("a") as file:
            file.write(".")
        return 1.0

    def letters_of_another_kind(completion: str) -> float:
        return -1.0

    same = make_evaluator([counted], [counted])
    assert same(policy())["greedy/counted"] == 1.0
    assert len(calls.read_text()) == len(ROWS) * (1 + 2)
    assert same.eval_rewards == () and same.best == "greedy/counted"
    other = make_evaluator([letters], [{"func": letters_of_another_kind, "name": "letters"}])
    found = other(policy())
    assert other.eval_rewards == ("letters-2",) and other.best == "greedy/letters-2"
    assert found["greedy/letters-2"] == -1.0 and found["greedy/letters"] > 0


def test_rewards_that_are_measured_together_keep_the_specs_that_find_them_again():
    other = {"func": "token_f1", "name": "exact_match"}
    together, _ = measured_together(load_rewards(["exact_match"]), load_rewards(["exact_match", other]))
    assert together.names == ["exact_match", "exact_match-2"]
    assert together.specs == ["exact_match", other]


def test_a_reward_called_reward_is_not_taken_for_the_total():
    def reward(completion: str) -> float:
        return 3.0

    found = make_evaluator([{"func": reward, "weight": 2.0}])(policy())
    assert (found["greedy/reward"], found["greedy/reward/reward"]) == (6.0, 3.0)


def test_without_references_there_is_no_likelihood_and_without_a_value_there_is_nan():
    def silent(completion: str) -> None:
        return None

    found = make_evaluator([silent], rows=[{"prompt": "a = "}, {"prompt": "b = "}])(policy())
    assert not {"nll_per_token", "expected_accuracy", "greedy/exact_match"} & set(found)
    assert math.isnan(found["greedy/silent"]) and math.isnan(found["sample/reward"])
    assert 1 <= found["greedy/length"] <= NEW_TOKENS


def random_states():
    return (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())


def test_it_leaves_no_trace_in_random_states_modes_and_weights():
    def gambler(completion: str) -> float:
        return random.random() + np.random.random() + torch.rand(()).item()

    model = policy(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a mode of its own, which must come back too
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    states = random_states()
    evaluator = make_evaluator([gambler])
    first = evaluator(model)
    assert random_states() == states
    assert [module.training for module in model.modules()] == modes and not all(modes) and any(modes)
    assert all(map(torch.equal, weights, model.parameters())) and all(p.grad is None for p in model.parameters())
    model.eval()
    second = evaluator(model)
    assert {k: v for k, v in first.items() if "logprob" in k or "nll" in k} == {
        k: v for k, v in second.items() if "logprob" in k or "nll" in k
    }


def falls_ill(completion: str, prompt: str) -> float:
    if prompt.startswith(("a", "c")):
        raise ValueError("unwell")
    return 1.0


def test_failures_of_a_measured_reward_are_as_its_spec_says():
    with pytest.raises(RewardError, match=r"(?s)'falls_ill' raised.*unwell"):
        make_evaluator([letters], [falls_ill])(policy())
    found = make_evaluator([letters], [{"func": falls_ill, "on_error": "abstain"}])(policy())
    assert found["greedy/falls_ill"] == found["sample/falls_ill"] == 1.0
    assert found["greedy/falls_ill/failed"] == found["sample/falls_ill/failed"] == 2 / 5
    assert "greedy/letters/failed" not in found
    found = make_evaluator([letters], [{"func": falls_ill, "on_error": "floor", "floor": -1.0}])(policy())
    assert found["greedy/falls_ill"] == pytest.approx((3 - 2) / 5)


def test_what_cannot_be_measured_is_refused_at_once():
    def asks(completion, colour):
        return 1.0

    with pytest.raises(RewardError, match="colour"):
        make_evaluator([letters], [asks])
    with pytest.raises(DataError, match="no validation rows"):
        ValidationEvaluator([], word_tokenizer(), load_rewards([letters]), max_new_tokens=3)


def test_two_processes_measure_each_row_once_and_have_the_same_numbers(tmp_path):
    run_ranks(2, lambda: measure_on_a_rank(tmp_path), tmp_path / "log")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["values"] == pytest.approx(make_evaluator()(policy()), rel=1e-5)
    assert "unwell" in ranks[0]["error"]  # though only rank 1 met it
    prompts = [(tmp_path / f"{rank}.prompts").read_text().split("\n")[:-1] for rank in (0, 1)]
    assert not set(prompts[0]) & set(prompts[1])
    assert sorted(prompts[0] + prompts[1]) == sorted(row["prompt"] for row in ROWS for _ in range(1 + 2))


def measure_on_a_rank(folder: Path) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index

    def kept(completion: str, prompt: str) -> float:
        with (folder / f"{rank}.prompts").open("a") as file:
            file.write(prompt + "\n")
        return 1.0

    def unwell_on_rank_one(completion: str) -> float:
        if rank == 1:
            raise ValueError("unwell")
        return 1.0

    values = make_evaluator()(policy())
    make_evaluator([kept])(policy())
    try:
        make_evaluator([unwell_on_rank_one])(policy())
    except RewardError as error:
        message = str(error)
    (folder / f"{rank}.json").write_text(json.dumps({"values": values, "error": message}))


def steps(key, values):
    return [{"step": i, key: value} for i, value in enumerate(values, 1)]


ZERO, CLIPPED = "frac_reward_zero_std", "completions/clipped_ratio"


@pytest.mark.parametrize(
    ("key", "limit", "named"), [(ZERO, 0.8, "--num_generations"), (CLIPPED, 0.9, "--max_completion_length")]
)
def test_a_share_that_stays_high_for_ten_logged_steps_is_warned_of(key, limit, named):
    (warning,) = learning_warnings(steps(key, [0.1, 0.2, *[limit + 0.01] * 10]))
    assert key in warning and named in warning
    assert learning_warnings(steps(key, [limit + 0.01] * 9)) == []  # too early to tell
    assert learning_warnings(steps(key, [*[1.0] * 9, limit])) == []  # not above it
    assert learning_warnings(steps(key, [*[1.0] * 5, 0.2, *[1.0] * 9])) == []
    assert learning_warnings(steps(key, [*[1.0] * 9, None])) == []
    between = [record for step in steps(key, [1.0] * 10) for record in (step, {"step": 1, "eval_greedy/wer": 0.5})]
    assert learning_warnings(between) == [learning_warnings(steps(key, [1.0] * 10))[0]]
    assert learning_warnings([]) == []


def test_one_batch_that_explains_itself_is_said_after_it_with_its_first_numbers():
    first = {"completions/clipped_ratio": 0.96, "frac_reward_zero_std": 1.0, "completions/max_length": 16.0, "step": 1}
    later = first | {"completions/clipped_ratio": 1.0, "step": 2}
    (warning,) = learning_warnings([first])
    assert warning.startswith("96% of the completions were cut at 16 tokens and no group differs in reward")
    assert "raise --max_completion_length" in warning
    assert learning_warnings([first, later, {"eval_greedy/reward": 1.0}]) == [warning]  # said once
    assert learning_warnings([first | {"frac_reward_zero_std": 0.9}]) == []
    assert learning_warnings([first | {"completions/clipped_ratio": 0.9}]) == []
    assert learning_warnings([{k: v for k, v in first.items() if k != "frac_reward_zero_std"}]) == []  # PPO


@pytest.mark.parametrize("nothing", [float("nan"), None])  # in the state, and in metrics.jsonl
def test_that_every_reward_abstained_is_said(nothing):
    records = [{"reward": 0.5}, {"reward": nothing}, {"reward": 0.5}]
    (warning,) = learning_warnings(records)
    assert warning.startswith("Every reward abstained on every completion of a batch")
    assert learning_warnings(records[::2]) == []


def test_a_reward_that_is_constant_for_twenty_steps_is_said():
    def record(mean=0.5, std=0.0):
        return {"reward": mean, "rewards/taste/mean": mean, "rewards/taste/std": std}

    (warning,) = learning_warnings([record(0.1)] + [record()] * 20)
    assert warning.startswith("The reward taste has been 0.5 on every completion for 20 logged steps")
    assert learning_warnings([record()] * 19) == []
    assert learning_warnings([record()] * 19 + [record(0.4)]) == []
    assert learning_warnings([record()] * 19 + [record(std=0.1)]) == []
    assert learning_warnings([record()] * 10 + [record(float("nan"), float("nan"))] + [record()] * 10)[1:] == []
    between = [one for _ in range(20) for one in (record(), {"eval_greedy/reward": 0.3})]
    assert learning_warnings(between) == [warning]


def evaluations(totals, measured, prefix="eval_", strategy="sample"):
    pairs = zip(totals, measured, strict=True)
    return [
        {f"{prefix}{strategy}/reward": a, f"{prefix}{strategy}/taste": b, "step": i} for i, (a, b) in enumerate(pairs)
    ]


@pytest.mark.parametrize("prefix", ["eval_", ""])
@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_a_measured_reward_that_falls_while_the_optimised_one_rises_is_warned_of(prefix, strategy):
    def warned(totals, measured, names=("taste",)):
        return learning_warnings(evaluations(totals, measured, prefix, strategy), names)

    (warning,) = warned([0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.8, 0.7])
    assert "taste" in warning and "optimised reward rose" in warning and strategy in warning
    assert warned([0.1, 0.2, 0.3], [0.9, 0.8, 0.7], names=()) == []  # nothing is only measured
    assert warned([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]) == []
    assert warned([0.3, 0.2, 0.1], [0.9, 0.8, 0.7]) == []
    assert warned([0.1, 0.2, 0.3], [0.9, 0.8, 0.8]) == []
    assert warned([0.1, 0.2], [0.9, 0.8]) == []
    assert warned([0.1, 0.2, float("nan")], [0.9, 0.8, 0.7]) == []
