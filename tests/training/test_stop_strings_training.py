"""`stop_strings` in training: what is trained, logged and refused; and in every strategy of an evaluation."""

import json

import pytest
from tiny import EOS, tiny_model
from tiny_ppo import tiny_ppo
from tiny_task import ROWS, save_model, shares_letters, tiny_tokenizer, tiny_trainer

from rlseq.config.training import GRPOConfig, RejectionArguments
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import load_rewards
from rlseq.training.selection.rejection import sample_candidates

CAPITALS = list("ABCDEFGHI")
TOKENIZER = tiny_tokenizer()
STOPS = {TOKENIZER.vocab[letter] for letter in CAPITALS}


def seen(completion: str, finish_reason: str) -> float:
    """A reward that fails where it is shown the string."""
    assert not set(completion) & set(CAPITALS)
    return len(completion) + 100.0 * (finish_reason == "stop")


@pytest.mark.parametrize("make", [tiny_trainer, tiny_ppo])
def test_the_tokens_up_to_the_string_are_trained_and_the_reward_reads_the_text_before_it(tmp_path, make):
    trainer = make(tmp_path, rewards=(seen,), stop_strings=CAPITALS, max_steps=1, loss_type="dapo")
    trainer.train()
    found = trainer.batch.scored
    ended = 0
    for row, scored in enumerate(found):
        rollout = scored.rollout
        ids = rollout.completion_ids
        assert not {*ids[:-1]} & {*STOPS, EOS}  # nothing follows what ends it
        assert rollout.finish_reason == ("stop" if ids[-1] in {*STOPS, EOS} else "length")
        assert trainer.batch.trained.completion_ids[row] == ids
        assert trainer.batch.trained.mask[row].sum() == len(ids)
        ended += ids[-1] in STOPS
    assert ended > 3
    (logged,) = [line for line in trainer.state.log_history if "completions/clipped_ratio" in line]
    cut = [scored.rollout.finish_reason == "length" for scored in found]
    assert logged["completions/clipped_ratio"] == pytest.approx(sum(cut) / len(cut))


def test_completions_that_a_string_ended_are_not_masked_as_truncated(tmp_path):
    settings = {"stop_strings": CAPITALS, "mask_truncated_completions": True, "max_completion_length": 2}
    trainer = tiny_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    trained = [bool(mask.any()) for mask in trainer.batch.trained.mask]
    assert trained == [scored.rollout.finish_reason == "stop" for scored in trainer.batch.scored]
    assert {True, False} == set(trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rlseq_sampler": False}, "stop_strings are looked for by rlseq's sampler and by vLLM"),
        ({"use_transformers_continuous_batching": True}, "stop_strings are looked for by rlseq's sampler and by vLLM"),
        ({"tools": ["calc.py:add"]}, "stop_strings end a completion, which has turns with tools"),
        ({"generation_kwargs": {"stop": ["A"]}, "rlseq_sampler": False, "stop_strings": None}, "give --stop_strings"),
    ],
)
def test_generators_that_do_not_look_for_strings_are_refused(tmp_path, settings, message):
    given = {"stop_strings": ["A"], "per_device_train_batch_size": 8, "use_cpu": True, "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**(given | settings))


def test_references_with_a_stop_string_are_left_out_of_an_exact_objective(tmp_path):
    rows = [{"prompt": "a b = ", "references": ["A B", "C"]}] * 16
    settings = {"objective": "expected_accuracy", "rows": rows}
    assert len(tiny_trainer(tmp_path / "a", **settings).scorer.references_of(0)) == 2
    trainer = tiny_trainer(tmp_path / "b", stop_strings=["B"], **settings)
    assert trainer.scorer.references_of(0) == [(TOKENIZER.vocab["C"], EOS)]
    with pytest.raises(ConfigError, match="no prompt has one"):
        tiny_trainer(tmp_path / "c", stop_strings=["B", "C"], **settings)


def test_every_strategy_studies_and_training_s_evaluation_end_at_the_string(tmp_path):
    save_model(tmp_path / "model", initializer_range=0.3)
    strategies = ("greedy", "sample", "beam", "best_of:n=3", "mbr:n=3,utility=seen")
    settings = ContrastSettings(
        strategies=strategies,
        samples_per_row=4,
        max_new_tokens=6,
        stop_strings=tuple(CAPITALS),
        resamples=10,
        studies=("coverage", "sharpening", "kl"),
        coverage_samples=4,
    )
    rows = [row | {"references": []} for row in ROWS]
    with load_rewards([seen]) as suite:
        contrast({"m": tmp_path / "model"}, rows, suite, settings=settings, output_dir=tmp_path / "out", quiet=True)
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {record["strategy"] for record in records} == set(strategies)
    assert not any(set(record["completion"]) & set(CAPITALS) for record in records)
    assert all(record["values"]["seen"] is not None for record in records)  # `seen` fails where it meets a capital
    for strategy in strategies:
        short = [r for r in records if r["strategy"] == strategy and r["finish_reason"] == "stop" and r["length"] < 6]
        assert short
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["spec"]["settings"]["stop_strings"] == CAPITALS

    with load_rewards([seen]) as suite:
        prompts = build_prompts(rows, TOKENIZER)
        during = ValidationEvaluator(prompts, TOKENIZER, suite, max_new_tokens=6, stop_strings=CAPITALS)
        assert during(tiny_model("llama", initializer_range=0.3))["sample/reward"] > 0


def test_rejection_sampling_draws_up_to_the_string():
    prompts = build_prompts(ROWS, TOKENIZER)
    settings = {"num_samples": 4, "temperature": 1.0, "max_new_tokens": 6, "seed": 0, "stop_strings": CAPITALS}
    with load_rewards([seen]) as suite:
        records = sample_candidates(tiny_model("llama", initializer_range=0.1), prompts, suite, TOKENIZER, **settings)
    assert any(record["finish_reason"] == "stop" for record in records)
    assert all(record["values"]["seen"] is not None for record in records)
    with pytest.raises(ConfigError, match=r"stop_strings is .* no effect without --rejection_samples"):
        RejectionArguments(stop_strings=["A"])


def test_exact_search_is_refused_before_a_model_loads():
    settings = ContrastSettings(strategies=("greedy",), stop_strings=("A",), studies=("map",))
    with load_rewards([shares_letters]) as suite, pytest.raises(ConfigError, match=r"the study map .* leave out one"):
        contrast({"m": "no/model"}, ROWS, suite, settings=settings, quiet=True)


def test_a_string_that_cannot_be_met_is_refused_before_a_model_loads(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    settings = ContrastSettings(strategies=("greedy",), stop_strings=("<eos>",))
    with load_rewards([shares_letters]) as suite, pytest.raises(ConfigError, match="special token '<eos>'"):
        contrast({"m": tmp_path / "model"}, ROWS, suite, settings=settings, quiet=True)
    with pytest.raises(ConfigError, match="special token '<eos>'"):
        tiny_trainer(tmp_path, stop_strings=["<eos>"])
