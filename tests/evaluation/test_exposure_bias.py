"""Exposure bias: entropies and chances by plain forwards, counts by hand from the samples."""

import dataclasses
import math
from collections import defaultdict

import pytest
import torch
from test_contrast import letters
from test_data import EOS, word_tokenizer
from tiny import tiny_model

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Source
from rlseq.evaluation.studies import study
from rlseq.evaluation.studies.exposure_bias import ExposureBias
from rlseq.evaluation.studies.study import Context
from rlseq.scoring import load_rewards

EXPOSURE = Source("exposure_bias")

ROWS = [
    {"prompt": "a b = ", "references": ["A B C", "A"]},
    {"prompt": "c = ", "references": ["C D"]},
    {"prompt": "d e f a = ", "references": ["D E F A B", "D E"]},
    {"prompt": "h = ", "references": []},
    {"prompt": "b c = ", "references": [""]},
]
LENGTHS = (1, 2)
SETTINGS = ContrastSettings(
    strategies=("greedy",), max_new_tokens=4, resamples=100, samples_per_row=40, studies=("exposure_bias",), seed=3
)
SETTINGS = dataclasses.replace(SETTINGS, prefix_lengths=LENGTHS)
PROMPTS = build_prompts(ROWS, word_tokenizer())
REFERENCES = [reference_ids(prompt, word_tokenizer(), [EOS]) for prompt in PROMPTS]


def toy(seed=8):
    """A model that often begins, and sometimes ends, as references do."""
    model = tiny_model("llama", seed=seed, initializer_range=0.2)
    bias = torch.zeros(23)
    bias[[EOS, *{token for found in REFERENCES for ids in found for token in ids}]] = 2.5
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits + bias)
    return model


def next_logprobs(model, prompt_ids, completion):
    """(T, V): by one plain forward, the distribution before each token of a completion."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *completion]]), use_cache=False).logits[0]
    return logits[len(prompt_ids) - 1 : -1].double().log_softmax(-1)


def measure(model, monkeypatch, rewards=(letters,), settings=SETTINGS):
    """The statistics, every sampled completion, and by call of the rewards what these were given."""
    sampled, scored = [], []
    original = study.sample

    def recorded(*args, **options):
        sampled.append(original(*args, **options))
        return sampled[-1]

    monkeypatch.setattr(study, "sample", recorded)
    with load_rewards(list(rewards)) as suite:
        score = suite.score
        monkeypatch.setattr(
            suite, "score", lambda rollouts, *rest: (scored.append(rollouts), score(rollouts, *rest))[1]
        )
        context = Context(
            model=model,
            tokenizer=word_tokenizer(),
            prompts=PROMPTS,
            references=REFERENCES,
            suite=suite,
            completions={},
            values={},
            settings=settings,
            stop_ids=[EOS],
            baseline=lambda: model,
        )
        rows = ExposureBias().measure(context)
    return rows, sampled, scored


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        model = toy()
        return (model, *measure(model, patch))


def test_entropies_are_those_of_plain_forwards_over_the_whole_vocabulary(measured):
    model, rows, (own, *_), _ = measured
    own = iter(own)
    for row, references in enumerate(REFERENCES):
        if not references:
            assert rows[row] == {EXPOSURE("no_reference"): 1.0}
            continue
        for side, sequences in (("reference", references), ("model", [r.completion_ids for r in next(own)])):
            by_position = defaultdict(list)
            for ids in sequences:
                table = next_logprobs(model, PROMPTS[row].prompt_ids, ids)
                for t, logprobs in enumerate(table):
                    by_position[t].append(-(logprobs.exp() * logprobs).sum().item())
            found = rows[row][EXPOSURE("entropy", side)]
            assert len(found) == max(map(len, sequences))
            assert found == pytest.approx([sum(v) / len(v) for v in by_position.values()], abs=1e-5)
        reference, own_side = (rows[row][EXPOSURE("entropy", side)] for side in ("reference", "model"))
        assert reference[0] == pytest.approx(own_side[0], abs=1e-5)  # the prompt alone


def content(ids):
    return [token for token in ids if token != EOS]


def pairs_of(own, length):
    """(row, reference, own sample) of each pair that is longer than k on both sides."""
    with_references = [row for row, references in enumerate(REFERENCES) if references]
    for row, group in zip(with_references, own, strict=True):
        for i, rollout in enumerate(group):
            reference = REFERENCES[row][i % len(REFERENCES[row])]
            if len(content(reference)) > length and len(content(rollout.completion_ids)) > length:
                yield row, reference, rollout.completion_ids


def test_every_side_is_what_its_name_says(measured):
    _, _, (own, *continued), scored = measured
    assert len(continued) == 2 * len(LENGTHS) and len(scored) == 4 * len(LENGTHS)
    equal = 0
    for place, length in enumerate(LENGTHS):
        pairs = list(pairs_of(own, length))
        gold_side, own_side, spliced, reference_side = scored[4 * place : 4 * place + 4]
        assert [r for (r,) in continued[2 * place]] == gold_side and [
            r for (r,) in continued[2 * place + 1]
        ] == own_side
        assert len(pairs) == len(gold_side) > 20
        for (row, reference, ids), g, o, s, r in zip(pairs, gold_side, own_side, spliced, reference_side, strict=True):
            assert g.completion_ids[:length] == reference[:length] and o.completion_ids[:length] == ids[:length]
            assert max(len(g.completion_ids), len(o.completion_ids)) <= SETTINGS.max_new_tokens
            begun = [x for x in (reference, *REFERENCES[row]) if x[:length] == ids[:length]]
            assert s.completion_ids == (begun[0] if begun else ids[:length] + reference[length:])
            assert r.completion_ids == reference and r.text.split() == word_tokenizer().decode(reference[:-1]).split()
            if reference[:length] == ids[:length]:
                assert g.completion_ids == o.completion_ids  # the same noise
                equal += 1
    assert equal > 0


def test_statistics_count_the_pairs_and_what_they_scored(measured):
    _, rows, (own, *_), scored = measured
    for place, length in enumerate(LENGTHS):
        expected = [defaultdict(float) for _ in ROWS]
        for n, (row, _, ids) in enumerate(pairs_of(own, length)):
            expected[row][EXPOSURE("pairs", length)] += 1
            expected[row][EXPOSURE("right", length)] += any(ids[:length] == r[:length] for r in REFERENCES[row])
            for side, rollouts in zip(
                ("reference", "model", "spliced", "whole_reference"), scored[4 * place :][:4], strict=True
            ):
                words = len(rollouts[n].text.split())
                expected[row][EXPOSURE("sum", length, side, "letters")] += words
                expected[row][EXPOSURE("count", length, side, "letters")] += words > 0
                if side in ("reference", "model"):
                    right = rollouts[n].completion_ids in REFERENCES[row]
                    expected[row][EXPOSURE("sum", length, side, "exact_match")] += right
                    expected[row][EXPOSURE("count", length, side, "exact_match")] += 1
        for mine, wanted in zip(rows, expected, strict=True):
            assert {key: value for key, value in mine.items() if key.params[:1] == (length,)} == wanted


def test_exact_match_after_a_gold_prefix_has_the_exact_chance(monkeypatch):
    """P(match | prefix) = Σ exp Σ_{t ≥ k} log p(y_t) over the references that begin so."""
    model, settings = toy(), dataclasses.replace(SETTINGS, samples_per_row=2000, prefix_lengths=(1,))
    rows, *_ = measure(model, monkeypatch, settings=settings)
    for row in (1, 2):
        chances = []
        for reference in REFERENCES[row]:
            chance = 0.0
            for other in REFERENCES[row]:
                if other[:1] == reference[:1] and len(other) <= settings.max_new_tokens:
                    table = next_logprobs(model, PROMPTS[row].prompt_ids, other)
                    chance += math.exp(sum(table[t, token].item() for t, token in enumerate(other) if t >= 1))
            chances.append(chance)
        exact, n = sum(chances) / len(chances), rows[row][EXPOSURE("pairs", 1)]
        assert 0.01 < exact < 0.9 and n > 500
        error = math.sqrt(exact * (1 - exact) / n)
        assert rows[row][EXPOSURE("sum", 1, "reference", "exact_match")] / n == pytest.approx(exact, abs=4 * error)


def test_differences_are_own_less_gold_and_what_is_beyond_the_prefix():
    def row(reference, own, spliced, pairs=2.0):
        sums = {"reference": reference, "model": own, "spliced": spliced, "whole_reference": pairs}
        entry = {EXPOSURE("entropy", "reference"): [1.0, 2.0], EXPOSURE("entropy", "model"): [1.0, 5.0, 4.0]}
        entry |= {EXPOSURE("pairs", 1): pairs, EXPOSURE("right", 1): 1.0}
        for side, value in sums.items():
            entry |= {EXPOSURE("sum", 1, side, "r"): value, EXPOSURE("count", 1, side, "r"): pairs}
        return entry

    settings = dataclasses.replace(SETTINGS, prefix_lengths=(1, 7))
    rows = [row(2.0, 1.0, 1.5), row(1.0, 1.0, 2.0), {EXPOSURE("no_reference"): 1.0}, {}]
    others = [row(2.0, 1.5, 1.5), row(1.0, 1.0, 2.0), {EXPOSURE("no_reference"): 1.0}, {}]
    block = ExposureBias().results({"m": rows, "n": others}, settings, {})
    assert (block["rows"], block["rows_without_references"]) == (2, 1)
    entropy = block["models"]["m"]["entropy"]
    assert entropy["difference"]["1"] == {"value": 3.0, "ci95": [3.0, 3.0], "rows": 2}
    assert list(entropy["reference"]) == ["0", "1"] and list(entropy["model"]) == ["0", "1", "2"]
    found = block["models"]["m"]["continued"]
    assert found["7"] == {"rows": 0, "pairs": 0, "metrics": {}}
    assert (found["1"]["rows"], found["1"]["pairs"], found["1"]["right"]["value"]) == (2, 4, 0.5)
    values = {side: cell["value"] for side, cell in found["1"]["metrics"]["r"].items()}
    # 3/4 and 2/4; the prefix alone 3.5/4 − 1 = −1/8; of −1/4 that leaves −1/8
    assert values == {"reference": 0.75, "model": 0.5, "difference": -0.25, "prefix_alone": -0.125, "beyond": -0.125}
    low, high = found["1"]["metrics"]["r"]["difference"]["ci95"]
    assert (low, high) == (-0.5, 0.0)  # both rows the first, or both the second
    (gap,) = [c for c in block["comparisons"] if (c["side"], c["prefix"]) == ("difference", "1")]
    assert (gap["a"], gap["b"], gap["metric"], gap["difference"]) == ("m", "n", "r", 0.125)  # −1/8 − (−1/4)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((0, 1), "holds 0; expected each to be at least 1"),
        ((), "empty"),
        ((2, 1, 2), "twice: 2 1 2"),
        ((-1,), "holds -1"),
    ],
)
def test_lengths_that_cannot_work_are_refused_before_a_model_loads(lengths, message):
    with load_rewards([letters]) as suite, pytest.raises(ConfigError, match=message):
        check_settings(dataclasses.replace(SETTINGS, prefix_lengths=lengths), suite)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in ((8, "one"), (10, "two")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


def test_the_report_has_a_section_with_figures(checkpoints, tmp_path):
    with load_rewards([letters]) as suite:
        settings = dataclasses.replace(SETTINGS, prefix_lengths=(1, 9))
        results = contrast_and_report(
            checkpoints, ROWS, suite, settings=settings, prompt_options={}, output_dir=tmp_path, title="t"
        )
    found = results["studies"]["exposure_bias"]["models"]["one"]["continued"]
    assert found["1"]["rows"] > 0 and found["9"]["rows"] == 0  # no completion is that long
    assert {p.stem for p in (tmp_path / "plots").glob("exposure-bias-*")} == {
        "exposure-bias-entropy",
        "exposure-bias-quality-0",
        "exposure-bias-quality-1",
    }
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert (
            "Exposure bias: model prefixes against reference prefixes" in text
            and "Does the gap differ between models?" in text
        )
        assert "1 rows without references are left out" in text


def test_without_references_the_section_says_that_it_is_skipped(checkpoints, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    with load_rewards([letters]) as suite:
        options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": tmp_path, "title": "t"}
        results = contrast_and_report({"one": checkpoints["one"]}, rows, suite, **options)
    assert results["studies"]["exposure_bias"] == {"rows": 0, "rows_without_references": 5}
    assert "Skipped: the data has no references" in (tmp_path / "report.md").read_text()


def test_more_lengths_and_smaller_batches_change_no_number(checkpoints):
    def run(**changes):
        with load_rewards([letters]) as suite:
            settings = dataclasses.replace(SETTINGS, **changes)
            results = contrast({"one": checkpoints["one"]}, ROWS, suite, settings=settings, quiet=True)
        return results["studies"]["exposure_bias"]["models"]["one"]["continued"]["2"]

    assert run() == run(prefix_lengths=(2, 3), eval_batch_size=1)
