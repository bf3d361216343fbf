"""Greedy decoding and teacher forcing agree where the model is sound, and an evaluation of one that is not fails."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from forks import run_ranks
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import tiny_model

from rlseq.data.prompts import build_prompts
from rlseq.engine.likelihood import TeacherForced
from rlseq.errors import ConsistencyError
from rlseq.evaluation.measure import checkpoint as module
from rlseq.evaluation.measure.checkpoint import measure
from rlseq.evaluation.measure.references import agreement, agreement_rows, check_agreement
from rlseq.evaluation.run import ContrastSettings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Source
from rlseq.scoring import load_rewards
from rlseq.types import Rollout

AGREEMENT = Source("agreement")

ROOT = Path(__file__).parents[2]
WORDS = ("a b", "c", "d e f a", "h", "b c", "g", "a a", "f e d c b", "c h", "e", "b", "g f")
LONGEST = 8
SETTINGS = ContrastSettings(strategies=("greedy",), samples_per_row=2, max_new_tokens=LONGEST, resamples=20)


def letters(completion: str) -> float:
    return float(len(completion.split()))


def next_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()


def own_path(model, prompt):
    """What the model finds likeliest step by step, all of it recomputed each time; without the stop."""
    ids = [VOCABULARY.index(word) for word in prompt.split()]
    start = len(ids)
    while len(ids) < start + LONGEST:
        logits = next_logits(model, ids)
        if logits.index(max(logits)) == EOS:
            break
        ids.append(logits.index(max(logits)))
    return " ".join(VOCABULARY[i] for i in ids[start:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that stops, and rows whose references it follows wholly, in part and not at all."""
    model = tiny_model("llama", seed=8, initializer_range=0.3)
    model.lm_head.weight.data *= 2
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    rows = []
    for i, words in enumerate(WORDS):
        path = own_path(model, f"{words} = ")
        references = [path, "A B C"] if i % 3 else [f"{path} A".strip(), "B"]
        rows.append({"prompt": f"{words} = ", "references": references})
    return folder, rows


def run(checkpoint, **changes):
    path, rows = checkpoint
    with load_rewards([letters]) as suite:
        return contrast({"one": path}, rows, suite, settings=dataclasses.replace(SETTINGS, **changes), quiet=True)


def test_greedy_decoding_follows_references_as_far_as_argmaxes_are_right(checkpoint, tmp_path):
    path, rows = checkpoint
    results = run(checkpoint)["models"]["one"]
    counts = results["greedy_and_teacher_forcing"]
    assert counts == {"rows": 12, "agree": 12, "near_ties": 0, "disagree": 0, "reproduced": counts["reproduced"]}
    assert 3 <= counts["reproduced"] <= 11  # else it says little
    assert results["strategies"]["greedy"]["exact_match"]["value"] == counts["reproduced"] / 12
    assert results["likelihood"]["teacher_forced_exact_match"]["value"] >= counts["reproduced"] / 12
    short = run(checkpoint, max_new_tokens=2)["models"]["one"]
    assert short["greedy_and_teacher_forcing"]["agree"] == 12  # cut, and still right as far as it goes
    assert short["strategies"]["greedy"]["exact_match"]["value"] < counts["reproduced"] / 12
    assert short["likelihood"] == results["likelihood"]
    assert "greedy_and_teacher_forcing" not in run(checkpoint, strategies=("sample",))["models"]["one"]
    with load_rewards([letters]) as suite:
        contrast_and_report(
            {"one": path}, rows, suite, settings=SETTINGS, prompt_options={}, output_dir=tmp_path, title="One"
        )
    sentence = "one: greedy and teacher forcing agree on 12 of 12 rows; greedy reproduces a reference on {}."
    for name in ("report.html", "report.md"):
        assert sentence.format(counts["reproduced"]) in (tmp_path / name).read_text().replace("\\_", "_")


def wrong_positions(inputs):
    if inputs["input_ids"].shape[1] == 1:
        inputs["position_ids"] = inputs["position_ids"] + 5


def blind_to_padding(inputs):
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])


def forgetful(inputs):
    if inputs["input_ids"].shape[1] == 1:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, :-1] = 0


def with_fault(model, fault):
    """The model, whose forward passes with a cache go wrong."""
    forward = model.forward

    @functools.wraps(forward)
    def faulty(**inputs):
        if inputs.get("past_key_values") is not None:
            fault(inputs)
        return forward(**inputs)

    model.forward = faulty
    return model


@pytest.mark.parametrize("fault", [wrong_positions, blind_to_padding, forgetful])
def test_a_model_that_generates_otherwise_than_it_is_scored_fails_the_evaluation(checkpoint, monkeypatch, fault):
    load = module.load_checkpoint
    monkeypatch.setattr(module, "load_checkpoint", lambda *names: with_fault(load(*names), fault))
    with pytest.raises(
        ConsistencyError, match=r"'one': greedy decoding and teacher forcing disagree on \d+ of 12"
    ) as e:
        run(checkpoint)
    keys = [prompt.key for prompt in build_prompts(checkpoint[1], word_tokenizer())]
    assert sum(key in str(e.value) for key in keys) in (2, 3)
    run(checkpoint, strategies=("sample",))  # nothing to compare with


def rollout_of(ids, reason="stop"):
    return Rollout("k", 0, ids, (True,) * len(ids), (0.0,) * len(ids), "", "", None, reason, "greedy")


@pytest.mark.parametrize(
    ("greedy", "reason", "right", "margins", "verdict"),
    [
        ((5, 6, 2), "stop", (1, 1, 1), (3, 1, 2), "agree"),
        ((5, 7, 2), "stop", (1, 0, 1), (3, -1, 2), "agree"),
        ((5, 7, 2), "stop", (1, 1, 1), (3, 1, 2), "disagree"),  # all argmaxes right, and not reproduced
        ((5, 6, 2), "stop", (1, 0, 1), (3, -1, 2), "disagree"),  # reproduced, though one is wrong
        ((5, 7, 2), "stop", (1, 1, 1), (3, 1e-5, 2), "near_ties"),
        ((5, 6, 2), "stop", (1, 0, 1), (3, -1e-5, 2), "near_ties"),
        ((5, 6, 2), "stop", (1, 0, 0), (3, -1e-5, -2), "near_ties"),  # what follows the first parting says nothing
        ((5, 6), "length", (1, 1, 1), (3, 1, 2), "agree"),  # cut
        ((5, 7), "length", (1, 1, 1), (3, 1, 2), "disagree"),
        ((5,), "stop", (1, 1, 1), (3, 1, 2), "disagree"),  # ended where teacher forcing continues
    ],
)
def test_partings_are_judged_by_the_margin_where_they_begin(greedy, reason, right, margins, verdict):
    forced = TeacherForced(torch.zeros(3), torch.tensor(right) > 0, torch.tensor(margins, dtype=torch.float64))
    rows = agreement_rows([[rollout_of(greedy, reason)], [rollout_of((5,))]], [[(5, 6, 2)], []], [[forced], []])
    counts = agreement(rows)
    assert {name for name in ("agree", "near_ties", "disagree") if counts[name]} == {verdict}
    assert (counts["rows"], counts["reproduced"], rows[1]) == (1, greedy == (5, 6, 2), {})
    assert agreement(rows[1:]) is None


def test_a_completion_that_a_stop_string_ended_has_followed_its_reference():
    forced = TeacherForced(torch.zeros(3), torch.ones(3) > 0, torch.ones(3, dtype=torch.float64))
    for ids, verdict in ((5, 6), "agree"), ((5, 7), "disagree"):
        rows = agreement_rows([[rollout_of(ids)]], [[(5, 6, 2)]], [[forced]], cut=[[True]])
        assert agreement(rows)[verdict] == 1


@pytest.mark.parametrize(("disagree", "of", "fails"), [(1, 5, False), (2, 5, True), (2, 2000, False), (3, 2000, True)])
def test_one_row_or_one_in_a_thousand_is_tolerated(disagree, of, fails):
    verdicts = ["disagree"] * disagree + ["agree"] * (of - disagree)
    rows = [{AGREEMENT("rows"): 1.0, AGREEMENT(verdict): 1.0} for verdict in verdicts]
    keys = [f"row {i}" for i in range(of)]
    if fails:
        with pytest.raises(ConsistencyError, match=r"for example row 0, row 1"):
            check_agreement("m", rows, keys)
    else:
        check_agreement("m", rows, keys)


def test_two_processes_fail_together_where_one_alone_would_not(checkpoint, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(checkpoint[1]))
    run_ranks(2, lambda: disagree_on_a_rank(checkpoint[0], tmp_path), tmp_path / "log")
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1] and "disagree on 2 of 4 rows" in messages[0]


def disagree_on_a_rank(path: str, folder: Path) -> None:
    """One disagreement a process: each is tolerated alone, the two of them are not."""
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    load = module.load_checkpoint
    module.load_checkpoint = lambda *names: with_fault(load(*names), wrong_positions)
    rows, tokenizer = json.loads((folder / "rows.json").read_text()), word_tokenizer()
    with load_rewards([letters]) as suite:
        found = measure(module.load_checkpoint("one", path), build_prompts(rows, tokenizer), tokenizer, suite, SETTINGS)
        greedy = found.strategies["greedy"]
        wrong, right = ([i for i, row in enumerate(greedy) if row[AGREEMENT(it)]] for it in ("disagree", "agree"))
        chosen = [rows[i] for i in (*wrong[:2], *right[:2])]  # processes take rows in turns
        with pytest.raises(ConsistencyError) as raised:
            contrast({"one": path}, chosen, suite, settings=SETTINGS, quiet=True)
    (folder / f"{rank}.txt").write_text(str(raised.value))


def test_the_note_is_among_the_results(checkpoint):
    path, rows = checkpoint
    solutions = [row | {"references": [f"{row['references'][0]} \\boxed A"]} for row in rows]
    assert any("(style)" in note for note in run((path, solutions))["notes"])
    assert run(checkpoint)["notes"] == []
