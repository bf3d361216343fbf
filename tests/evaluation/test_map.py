"""MAP analysis, against the enumeration of every completion and hand counts."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from test_contrast import ids_of, letters
from test_data import EOS, VOCABULARY, word_tokenizer
from test_decode import said
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from rlseq.engine.exact_map import exact_map
from rlseq.errors import ConfigError
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Source
from rlseq.evaluation.studies import map as module
from rlseq.evaluation.studies.map import MAP, Searched, map_results
from rlseq.scoring import load_rewards

OF_MAP = Source("map")

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E"]},
    {"prompt": "h = ", "references": [""]},
    {"prompt": "b c = ", "references": ["B"]},
]
LONGEST = 3
SETTINGS = ContrastSettings(
    strategies=("greedy", "beam:width=2"), max_new_tokens=LONGEST, resamples=100, samples_per_row=2, studies=("map",)
)


def saved(folder):
    """Two models, by name their paths."""
    for seed, name in ((8, "one"), (10, "two")):
        model = tiny_model("llama", seed=seed, initializer_range=0.3)
        model.lm_head.weight.data *= 2
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"))


def run(models, out=None, rewards=("phoneme_accuracy", letters), rows=ROWS, **changes):
    with load_rewards(list(rewards)) as suite:
        settings = dataclasses.replace(SETTINGS, **changes)
        return contrast(models, rows, suite, settings=settings, output_dir=out, quiet=True)


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return run(checkpoints, out), out


@pytest.fixture(scope="module")
def listed(checkpoints):
    """By model and prompt: every completion that ends in time, and its log-prob by plain forwards."""
    found = {}
    others = [token for token in range(len(VOCABULARY)) if token != EOS]
    for name, path in checkpoints.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        for row in ROWS:
            prompt, table = ids_of(row["prompt"]), {}
            for length in range(LONGEST):
                completions = [(*start, EOS) for start in itertools.product(others, repeat=length)]
                ids = torch.tensor([[*prompt, *completion] for completion in completions])
                with torch.no_grad():
                    logprobs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
                taken = logprobs[:, len(prompt) - 1 : -1].gather(-1, ids[:, len(prompt) :, None])[..., 0].sum(-1)
                table |= dict(zip(completions, taken.tolist(), strict=True))
            found[name, row["prompt"]] = table
    return found


def modes_of(out, model):
    """By prompt key what the study keeps of the row."""
    lines = (out / "studies.jsonl").read_text().split("\n")[:-1]
    prompts = [row["prompt"] for row in ROWS]
    found = [s["studies"]["map"] for s in map(json.loads, lines) if s["model"] == model]
    return {prompt: row for prompt, row in zip(prompts, found, strict=False) if row}


def samples_of(out, model, strategy):
    lines = (out / "samples.jsonl").read_text().split("\n")[:-1]
    found = [s for s in map(json.loads, lines) if (s["model"], s["strategy"]) == (model, strategy)]
    return {s["prompt"]: s for s in found}


@pytest.mark.parametrize("name", ["one", "two"])
def test_modes_are_those_of_the_enumeration(measured, listed, name):
    results, out = measured
    block = results["studies"]["map"]["models"][name]
    best = {row["prompt"]: max(listed[name, row["prompt"]].values()) for row in ROWS}
    found = modes_of(out, name)
    assert {prompt: row["logprob"] for prompt, row in found.items()} == pytest.approx(best, abs=1e-4)
    assert all(row["completion/truncated"] == 0 for row in found.values())
    assert (block["rows"], block["proven_rows"], block["proven"]["value"]) == (5, 5, 1)
    assert block["logprob"]["value"] == pytest.approx(np.mean(list(best.values())), abs=1e-4)
    empty = [listed[name, prompt][(EOS,)] == value for prompt, value in best.items()]
    assert block["empty"]["value"] == np.mean(empty)
    for strategy in ("greedy", "beam:width=2"):
        given = samples_of(out, name, strategy)
        missed = [s["finish_reason"] != "stop" or s["logprob"] < best[prompt] - 1e-3 for prompt, s in given.items()]
        assert block["search_errors"][strategy]["value"] == np.mean(missed)
        assert block["is_mode"][strategy]["value"] == 1 - np.mean(missed)  # no ties here
    counts = [len(s["completion"].split()) for s in found.values()]
    assert block["quality"]["letters"]["value"] == pytest.approx(np.mean([n for n in counts if n]))
    assert block["quality"]["length"]["value"] == np.mean([row["completion/length"] for row in found.values()])
    assert block["quality"]["repetition"]["value"] is None  # three tokens at most, and no 4-gram
    defined = [cell for metric, cell in block["quality"].items() if metric != "repetition"]
    for cell in (block["proven"], block["logprob"], block["empty"], *defined):
        low, high = cell["ci95"]
        assert low <= cell["value"] <= high


def test_searches_do_miss_modes_here(measured):
    blocks = measured[0]["studies"]["map"]["models"].values()
    assert any(block["search_errors"]["greedy"]["value"] > 0 for block in blocks)
    assert any(block["is_mode"]["beam:width=2"]["value"] > 0 for block in blocks)


def test_statistics_of_modes_are_counted_row_by_row():
    mode, longer, other = said("", -1.0), said("A B", -0.5), said("C", -2.0)
    cut = said("A B C", -0.1, ended=False)
    exact = [mode, longer, other, said("C", -2.0)]
    greedy = [mode, said("A", -0.50001), said("B", -2.5), cut]
    proofs = [True, True, False, False]
    records = [
        Searched(best, proven, best is mode, {"greedy": other}, {})
        for best, proven, other in zip(exact, proofs, greedy, strict=True)
    ]
    rows = MAP().statistics(records)
    keys = [*map(OF_MAP, ("searched", "proven", "logprob", "empty")), OF_MAP("is", "greedy"), OF_MAP("error", "greedy")]
    assert [[row.get(key) for key in keys] for row in rows] == [
        [1, 1, -1.0, 1, 1, 0],
        [1, 1, -0.5, 0, 0, 0],  # another completion, as likely up to rounding: no search error
        [1, 0, 0.0, 0, 0, 1],  # a likelier one is an error of greedy's though it is not proven to be the mode
        [1, 0, 0.0, 0, 0, 1],  # what was cut at the limit is no completion that ends
    ]
    block = map_results(rows, {}, SETTINGS)
    assert (block["rows"], block["proven_rows"]) == (4, 2)
    # proven 2 of 4; of the proven: log-prob (−1 − 0.5) / 2, empty 1 of 2, greedy's 1 of 2; errors 2 of 4
    values = [block["proven"], block["logprob"], block["empty"], block["is_mode"]["greedy"]]
    assert [cell["value"] for cell in [*values, block["search_errors"]["greedy"]]] == [0.5, -0.75, 0.5, 0.5, 0.5]
    assert MAP().results({"m": [{}, {}]}, SETTINGS, {}) is None  # no row was searched


@pytest.mark.parametrize(("words", "empty"), [("", 1), ("A", 0)])
def test_an_empty_mode_is_a_stop_alone_and_not_an_empty_text(checkpoints, monkeypatch, words, empty):
    best = dataclasses.replace(said(words), text="")  # A might be a special token, which is not decoded
    monkeypatch.setattr(module, "exact_map_prompts", lambda model, prompts, **_: ([best] * 5, [True] * 5))
    results = run({"one": checkpoints["one"]})
    assert results["studies"]["map"]["models"]["one"]["empty"]["value"] == empty


def proven_prompts(path, nodes):
    """The prompts whose mode is proven within `max_nodes` nodes, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(path)
    settings = {"max_new_tokens": LONGEST, "stop_ids": [EOS], "max_nodes": nodes}
    return {row["prompt"] for row in ROWS if exact_map(model, ids_of(row["prompt"]), **settings).proven}


def test_models_are_compared_on_the_rows_proven_for_both(checkpoints, listed, tmp_path):
    proven = {name: proven_prompts(path, 10) for name, path in checkpoints.items()}
    both = proven["one"] & proven["two"]
    assert both and both not in proven.values()  # each model has a mode that is proven for it alone
    results = run(checkpoints, tmp_path, strategies=("greedy",), map_max_nodes=10)
    block = results["studies"]["map"]
    for name, entry in block["models"].items():
        assert entry["proven_rows"] == len(proven[name])
    comparisons = {c["metric"]: c for c in block["comparisons"]}
    means = {
        name: np.mean([max(listed[name, prompt].values()) for prompt in both]) for name in checkpoints
    }  # of the modes
    c = comparisons["logprob"]
    assert c["rows"] == len(both)
    assert (c["value_a"], c["value_b"]) == pytest.approx((means["one"], means["two"]), abs=1e-4)
    assert c["difference"] == pytest.approx(means["two"] - means["one"], abs=1e-4)
    empty = {
        name: np.mean([max(table := listed[name, prompt], key=table.get) == (EOS,) for prompt in both])
        for name in checkpoints
    }
    assert comparisons["empty"]["difference"] == pytest.approx(empty["two"] - empty["one"])
    assert all("rows" not in c for c in results["comparisons"])


def test_exact_search_may_run_on_the_first_rows_alone(checkpoints, tmp_path):
    results = run(checkpoints, tmp_path, map_rows=2)
    assert results["spec"]["settings"]["map_rows"] == 2
    block = results["studies"]["map"]
    for name in checkpoints:
        assert block["models"][name]["rows"] == 2
        assert list(modes_of(tmp_path, name)) == [row["prompt"] for row in ROWS[:2]]
        assert len(samples_of(tmp_path, name, "greedy")) == 5
    (c,) = [c for c in block["comparisons"] if c["metric"] == "length"]
    assert c["rows"] == 2
    results = run(checkpoints, study_rows=3)
    assert {entry["rows"] for entry in results["studies"]["map"]["models"].values()} == {3}


def test_a_search_that_proves_nothing_has_no_modes_and_still_finds_errors(checkpoints, tmp_path):
    rows = [ROWS[0], ROWS[4]]  # their modes take more than one node
    results = run({"one": checkpoints["one"]}, tmp_path, rows=rows, strategies=("greedy",), map_max_nodes=1)
    block = results["studies"]["map"]["models"]["one"]
    nothing = {"value": None, "ci95": [None, None]}
    assert (block["rows"], block["proven_rows"], block["proven"]["value"]) == (2, 0, 0)
    assert block["logprob"] == block["empty"] == block["is_mode"]["greedy"] == block["quality"]["length"] == nothing
    lines = (tmp_path / "studies.jsonl").read_text().split("\n")[:-1]
    found = [json.loads(line)["studies"]["map"]["completion/logprob"] for line in lines]
    greedy = samples_of(tmp_path, "one", "greedy").values()
    missed = [s["finish_reason"] != "stop" or x > s["logprob"] + 1e-3 for x, s in zip(found, greedy, strict=True)]
    assert block["search_errors"]["greedy"]["value"] == np.mean(missed) > 0


@pytest.mark.parametrize("name", ["map_rows", "map_max_nodes"])
def test_a_budget_that_searches_nothing_is_refused_before_a_model_loads(name):
    settings = dataclasses.replace(SETTINGS, **{name: 0})
    with load_rewards(["phoneme_accuracy"]) as suite, pytest.raises(ConfigError, match=f"--{name} is 0; expected at"):
        check_settings(settings, suite)


def test_the_report_has_a_section_with_definition_and_caveat(checkpoints, tmp_path):
    strategies = ("greedy", "best_of:n=3", "mbr:n=3,utility=phoneme_accuracy")
    settings = dataclasses.replace(SETTINGS, strategies=strategies)
    with load_rewards(["phoneme_accuracy"]) as suite:
        results = contrast_and_report(
            checkpoints, ROWS, suite, settings=settings, prompt_options={}, output_dir=tmp_path
        )
    block = results["studies"]["map"]["models"]["two"]
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    section = text[text.index("## MAP analysis") : text.index("## Samples")]
    assert "proven" in section and "Caveat" in section
    first, *_ = [line for line in section.split("\n") if line.startswith("| two |")]
    cells = [cell.strip() for cell in first.split("|")[2:-1]]
    assert cells[0] == "5 of 5" and cells[1].startswith("100.0%")
    assert cells[2].startswith(f"{block['logprob']['value']:.3f}".replace("-", "−"))
    assert '<section id="map">' in page and "Search errors of greedy" in page and "Caveat" in page
    assert "best_of:n=3 is the mode" in page
    assert "utility=phoneme_accuracy is the mode" not in page  # it does not look for the mode
    assert "| two − one | Log-prob of the mode | 5 |" in section
