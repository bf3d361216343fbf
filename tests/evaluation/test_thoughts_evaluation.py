"""Thoughts in evaluation: their length and end, and references behind them against a forward pass by hand."""

import json
import math

import pytest
import torch
from tiny import tiny_model
from tiny_rollouts import rollout
from tiny_task import save_model, write_rows
from tiny_thoughts import END, SPELLED, ids_of, thinking_tokenizer

from rlseq.cli.main import main
from rlseq.data.prompts import build_prompts
from rlseq.engine.thoughts import ThinkEnd
from rlseq.errors import ConfigError, ModelError, RewardError
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.evaluation.measure.thoughts import thought_rows
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import THOUGHT
from rlseq.scoring import load_rewards

TOKENIZER = thinking_tokenizer()
ROWS = [{"prompt": f"{a}{b}=", "references": [a, f"{b}{END}\n{a}1"]} for a in "1234" for b in "abcd"]

# completions, how long the thought is, whether it was closed, and where the answer starts
COMPLETIONS = {
    "a token of its own": (ids_of("a", END, "1", "<eos>"), 2, True, 2),
    "whitespace in the token that closes": (ids_of("a", *SPELLED[:3], ">\n", "1"), 5, True, 5),
    "text in the token that closes": (ids_of("a", *SPELLED[:3], ">a", "<eos>"), 5, True, None),
    "never closed": (ids_of("a", "b", "<", "/", "<eos>"), 5, False, None),
    "whitespace behind": (ids_of("a", END, "\n", " ", "2"), 2, True, 4),
    "text that begins with a space": (ids_of(END, " a", END), 1, True, 1),
    "no answer": (ids_of("a", END, "<eos>"), 2, True, 2),
    "nothing at all behind": (ids_of("a", *SPELLED), 5, True, 5),
    "spelled, with whitespace behind": (ids_of("b", "<", "/", "t", ">", "\n"), 5, True, 6),
}


@pytest.mark.parametrize("ids, length, closed, start", COMPLETIONS.values(), ids=COMPLETIONS)
def test_where_a_thought_ends_in_tokens(ids, length, closed, start):
    think_end = ThinkEnd(END, TOKENIZER)
    assert think_end.length(ids) == (length, closed)
    assert think_end.answer_start(ids) == start


def by_hand(model, context, answer):
    """log p(answer | context) by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *answer]])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    return sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_references_behind_sampled_thoughts_are_those_of_a_plain_forward(family):
    model = tiny_model(family)
    prompts = build_prompts([{"prompt": "ab=", "references": ["x"]}, {"prompt": "c=", "references": ["x"]}], TOKENIZER)
    references = [
        [ids_of("1", "2", "<eos>"), ids_of("c", END, "\n", "3", "<eos>"), ids_of("c", *SPELLED[:3], ">a", "<eos>")],
        [],
    ]
    answers = [ids_of("1", "2", "<eos>"), ids_of("3", "<eos>")]  # of the third the answer has no tokens of its own
    completions = [ids for ids, *_ in COMPLETIONS.values()] + [COMPLETIONS["never closed"][0], ids_of("a", END, "4")]
    group = [rollout(ids=ids, sample=i) for i, ids in enumerate(completions)]
    first, second = thought_rows(model, prompts, [group, group[:2]], references, ThinkEnd(END, TOKENIZER))

    starts = [start for *_, start in COMPLETIONS.values()] + [None, 2]
    thoughts = [ids[:start] for ids, start in zip(completions, starts, strict=True) if start is not None]
    assert (len(completions), len(thoughts)) == (11, 8)
    logprob = sum(
        by_hand(model, (*prompts[0].prompt_ids, *thought), answer) for thought in thoughts for answer in answers
    )
    assert first[THOUGHT("reference_logprob")] == pytest.approx(logprob, rel=1e-5)
    assert first[THOUGHT("reference_nll")] == -first[THOUGHT("reference_logprob")]
    assert first[THOUGHT("references")] == 16
    assert first[THOUGHT("reference_tokens")] == 8 * (3 + 2)
    assert (first[THOUGHT("forced")], first[THOUGHT("with_references")]) == (8, 11)
    assert (first[THOUGHT("samples")], first[THOUGHT("unclosed")]) == (11, 2)
    assert first[THOUGHT("length")] == sum(length for _, length, *_ in COMPLETIONS.values()) + 5 + 2
    assert second == {THOUGHT("samples"): 2, THOUGHT("length"): 7, THOUGHT("unclosed"): 0}


def answers(completion, thought, answer):
    assert completion.startswith(thought)
    return float(len(answer))


SETTINGS = {"samples_per_row": 4, "max_new_tokens": 10, "resamples": 20, "think_end": END}


def test_an_evaluation_reports_thoughts_beside_the_quality_of_the_answers(tmp_path):
    save_model(tmp_path / "model", tokenizer=TOKENIZER, initializer_range=0.3)
    strategies = ("greedy", "sample", "beam:width=2")
    settings = ContrastSettings(strategies=strategies, studies=("map",), map_max_nodes=20, study_rows=2, **SETTINGS)
    with load_rewards([answers]) as suite:
        found = contrast(
            {"m": tmp_path / "model"}, ROWS, suite, settings=settings, output_dir=tmp_path / "out", quiet=True
        )
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for strategy in strategies:
        block = found["models"]["m"]["strategies"][strategy]
        mine = [record for record in records if record["strategy"] == strategy]
        unclosed = sum(END not in record["completion"] for record in mine)
        assert block["thought_unclosed"]["value"] == pytest.approx(unclosed / len(mine))
        assert block["answers"]["value"] == pytest.approx(sum(r["values"]["answers"] for r in mine) / len(mine))
        assert 0 < block["thought_length"]["value"] <= block["length"]["value"]
        assert block["nll_per_token_after_thought"].get("of", len(mine)) == len(mine)
    block = found["models"]["m"]["strategies"]["sample"]
    left = block["sequence_logprob_after_thought"]
    assert 0 < left["completions"] < left["of"] == 4 * len(ROWS)
    assert left["value"] < 0 < block["nll_per_token_after_thought"]["value"]
    assert found["metrics"]["sequence_logprob_after_thought"]["higher_is_better"] is True
    assert found["metrics"]["nll_per_token_after_thought"]["higher_is_better"] is False
    assert found["metrics"]["thought_unclosed"]["fault"] is True
    assert found["spec"]["settings"]["think_end"] == END
    assert not {"thought_length", "thought_unclosed"} & set(found["studies"]["map"]["models"]["m"]["quality"])


def test_a_model_that_finds_all_tokens_as_likely_has_the_same_numbers_behind_any_thought():
    model = tiny_model("llama")
    prompts = build_prompts(ROWS, TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    groups = [[rollout(ids=ids_of(END, "1")), rollout(ids=ids_of(END, "2"), sample=1)] for _ in prompts]
    found = thought_rows(model, prompts, groups, [[ids_of("1", "<eos>")]] * len(prompts), ThinkEnd(END, TOKENIZER))
    for row in found:  # uniform over 23 tokens
        assert row[THOUGHT("reference_logprob")] / row[THOUGHT("references")] == pytest.approx(-2 * math.log(23))
        assert row[THOUGHT("reference_nll")] / row[THOUGHT("reference_tokens")] == pytest.approx(math.log(23))


def test_without_it_there_is_nothing_of_thoughts_and_rows_without_references_have_no_likelihood(tmp_path):
    save_model(tmp_path / "model", tokenizer=TOKENIZER, initializer_range=0.3)
    rows = [{"prompt": row["prompt"], "references": []} for row in ROWS]

    def length(completion):
        return float(len(completion))

    def metrics(rows, **more):
        settings = ContrastSettings(strategies=("sample",), **(SETTINGS | more))
        with load_rewards([length]) as suite:
            found = contrast({"m": tmp_path / "model"}, rows, suite, settings=settings, quiet=True)
        return {name for name in found["models"]["m"]["strategies"]["sample"] if "thought" in name}, found

    assert metrics(rows)[0] == {"thought_length", "thought_unclosed"}
    none, found = metrics(ROWS, think_end=None)
    assert none == set()
    assert "think_end" not in found["spec"]["settings"]


def test_the_evaluation_during_training_measures_them_too():
    prompts = build_prompts(ROWS, TOKENIZER)
    with load_rewards([answers]) as suite:
        during = ValidationEvaluator(prompts, TOKENIZER, suite, max_new_tokens=10, think_end=END)
        values = during(tiny_model("llama", initializer_range=0.3))
    assert set(values) == set(during.metrics)
    assert during.metrics["sample/nll_per_token_after_thought"] is False
    assert values["sample/nll_per_token_after_thought"] > 0
    assert 0 < values["sample/thought_unclosed"] < 1


def test_what_cannot_be_is_refused_before_a_model_loads(tmp_path):
    save_model(tmp_path / "model", "gpt2", tokenizer=TOKENIZER)  # 64 positions
    (tmp_path / "model" / "model.safetensors").unlink()

    def refused(error, message, rewards=(answers,), rows=ROWS, **more):
        settings = ContrastSettings(strategies=("greedy",), **(SETTINGS | more))
        with load_rewards(list(rewards)) as suite, pytest.raises(error, match=message):
            contrast({"m": tmp_path / "model"}, rows, suite, settings=settings, quiet=True)

    refused(ConfigError, "--think_end '<eos>' holds the special token", think_end="<eos>")
    refused(ConfigError, "holds one of the stop strings", stop_strings=("t",))
    refused(RewardError, "give --think_end", think_end=None)
    refused(RewardError, "columns: {answer: answer}", rows=[row | {"answer": "1"} for row in ROWS])
    long = [{"prompt": "a=", "references": ["1234" * 8]}]
    refused(ModelError, r"context.*completion 73 of 64|may exceed 64 tokens", rows=long, max_new_tokens=40)


def test_the_command_splits_says_what_it_costs_and_may_rest_its_claim_on_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    save_model(tmp_path / "model", tokenizer=TOKENIZER, initializer_range=0.3)
    write_rows(tmp_path / "data" / "validation.jsonl", ROWS)
    (tmp_path / "own.py").write_text("def own(answer):\n    return float(len(answer))\n")
    arguments = ["evaluate", "--models", f"a={tmp_path / 'model'}", f"b={tmp_path / 'model'}", "--dataset_name"]
    arguments += [f"{tmp_path / 'data'}", "--reward_funcs", f"{tmp_path / 'own.py'}:own", "--max_new_tokens", "10"]
    arguments += ["--strategies", "greedy", "sample", "--studies", "none", "--resamples", "20"]
    arguments += ["--output_dir", f"{tmp_path / 'out'}"]
    claim = ["--primary", "nll_per_token_after_thought:sample"]
    assert main([*arguments, *claim]) != 0
    assert "names no metric of this evaluation" in capsys.readouterr().err
    assert main([*arguments, *claim, "--think_end", END]) == 0
    said = capsys.readouterr().out
    (costs,) = [line.split() for line in said.splitlines() if "references behind thoughts" in line]
    assert costs[-1] == str(len(ROWS) * 2 * (1 + 4))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Reference log-prob after own thought" in report
    assert "Thoughts never closed" in report

    apart = [*arguments[:2], f"c={tmp_path / 'model'}", *arguments[4:-1], f"{tmp_path / 'other'}"]
    assert main([*apart, "--think_end", END, *claim]) == 0
    joined = ["evaluate", "--compare", f"{tmp_path / 'out'}", f"{tmp_path / 'other'}"]
    assert main([*joined, "--output_dir", f"{tmp_path / 'joined'}"]) == 0
    both = [json.loads((tmp_path / name / "results.json").read_text())["models"] for name in ("out", "joined")]
    assert both[0].items() <= both[1].items()
    assert both[1]["c"]["strategies"] == both[1]["a"]["strategies"]
