"""Modes and oracles in an evaluation's results, against the enumeration of every completion and hand counts."""

import dataclasses
import itertools
import json
import warnings

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
from rlseq.evaluation.report import plots
from rlseq.evaluation.report.write import make_headline
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.statistics import COMPLETION, Source
from rlseq.evaluation.studies.modes import add_mode_statistics, mode_results
from rlseq.scoring import load_rewards

MODE = Source("mode")

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E"]},
    {"prompt": "h = ", "references": [""]},
    {"prompt": "b c = ", "references": ["B"]},
]
LONGEST = 3
SETTINGS = ContrastSettings(
    strategies=("greedy", "beam:width=2", "exact_map"), max_new_tokens=LONGEST, resamples=100, samples_per_row=2
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in ((8, "one"), (10, "two")):
        model = tiny_model("llama", seed=seed, initializer_range=0.3)
        model.lm_head.weight.data *= 2
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


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


def samples_of(out, model, strategy):
    lines = (out / "samples.jsonl").read_text().split("\n")[:-1]
    found = [s for s in map(json.loads, lines) if (s["model"], s["strategy"]) == (model, strategy)]
    return {s["prompt"]: s for s in found}


@pytest.mark.parametrize("name", ["one", "two"])
def test_modes_are_those_of_the_enumeration(measured, listed, name):
    results, out = measured
    block = results["models"][name]["strategies"]["exact_map"]["modes"]
    best = {row["prompt"]: max(listed[name, row["prompt"]].values()) for row in ROWS}
    found = samples_of(out, name, "exact_map")
    assert {prompt: s["logprob"] for prompt, s in found.items()} == pytest.approx(best, abs=1e-4)
    assert all(s["finish_reason"] == "stop" for s in found.values())
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
    assert block["quality"]["length"]["value"] == np.mean([s["length"] for s in found.values()])
    assert block["quality"]["repetition"]["value"] is None  # three tokens at most, and no 4-gram
    defined = [cell for metric, cell in block["quality"].items() if metric != "repetition"]
    for cell in (block["proven"], block["logprob"], block["empty"], *defined):
        low, high = cell["ci95"]
        assert low <= cell["value"] <= high


def test_searches_do_miss_modes_here(measured):
    blocks = [m["strategies"]["exact_map"]["modes"] for m in measured[0]["models"].values()]
    assert any(block["search_errors"]["greedy"]["value"] > 0 for block in blocks)
    assert any(block["is_mode"]["beam:width=2"]["value"] > 0 for block in blocks)


def test_statistics_of_modes_are_counted_row_by_row():
    mode, longer, other = said("", -1.0), said("A B", -0.5), said("C", -2.0)
    cut = said("A B C", -0.1, ended=False)
    exact = [[mode], [longer], [other], [said("C", -2.0)], []]
    greedy = [[mode], [said("A", -0.50001)], [said("B", -2.5)], [cut], [mode]]
    rows = [{} for _ in exact]
    add_mode_statistics(
        rows, "exact_map", {"greedy": greedy, "exact_map": exact}, [True, True, False, False], stop_ids=[EOS]
    )
    keys = [*map(MODE, ("searched", "proven", "logprob", "empty")), MODE("is", "greedy"), MODE("error", "greedy")]
    assert [[row.get(key) for key in keys] for row in rows] == [
        [1, 1, -1.0, 1, 1, 0],
        [1, 1, -0.5, 0, 0, 0],  # another completion, as likely up to rounding: no search error
        [1, 0, 0.0, 0, 0, 1],  # a likelier one is an error of greedy's though it is not proven to be the mode
        [1, 0, 0.0, 0, 0, 1],  # what was cut at the limit is no completion that ends
        [None] * 6,  # not searched
    ]
    block = mode_results(rows, {}, seed=0, resamples=50)
    assert (block["rows"], block["proven_rows"]) == (4, 2)
    # proven 2 of 4; of the proven: log-prob (−1 − 0.5) / 2, empty 1 of 2, greedy's 1 of 2; errors 2 of 4
    values = [block["proven"], block["logprob"], block["empty"], block["is_mode"]["greedy"]]
    assert [cell["value"] for cell in [*values, block["search_errors"]["greedy"]]] == [0.5, -0.75, 0.5, 0.5, 0.5]
    assert mode_results([{COMPLETION("samples"): 1.0}], {}, seed=0, resamples=50) is None


def test_an_empty_text_that_is_not_a_stop_alone_is_no_empty_mode():
    rows = [{}]
    best = dataclasses.replace(said("A"), text="")  # a special token that is not decoded
    add_mode_statistics(rows, "exact_map", {"exact_map": [[best]]}, [True], stop_ids=[EOS])
    assert rows[0][MODE("empty")] == 0


def proven_prompts(path, nodes):
    """The prompts whose mode is proven with so many nodes, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(path)
    settings = {"max_new_tokens": LONGEST, "stop_ids": [EOS], "max_nodes": nodes}
    return {row["prompt"] for row in ROWS if exact_map(model, ids_of(row["prompt"]), **settings).proven}


def test_models_are_compared_on_the_rows_proven_for_both(checkpoints, listed, tmp_path):
    strategy = "exact_map:max_nodes=10"
    proven = {name: proven_prompts(path, 10) for name, path in checkpoints.items()}
    both = proven["one"] & proven["two"]
    assert both and both not in proven.values()  # each model has a mode that is proven for it alone
    results = run(checkpoints, tmp_path, strategies=("greedy", strategy))
    for name, model in results["models"].items():
        assert model["strategies"][strategy]["modes"]["proven_rows"] == len(proven[name])
    comparisons = {c["metric"]: c for c in results["comparisons"] if c["strategy"] == strategy}
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
    assert comparisons["mode_empty"]["difference"] == pytest.approx(empty["two"] - empty["one"])
    assert all("rows" not in c for c in results["comparisons"] if c["strategy"] != strategy)


def test_exact_search_may_run_on_the_first_rows_alone(checkpoints, tmp_path):
    results = run(checkpoints, tmp_path, exact_map_rows=2)
    assert results["signature"]["settings"]["exact_map_rows"] == 2
    for name in checkpoints:
        assert results["models"][name]["strategies"]["exact_map"]["modes"]["rows"] == 2
        assert list(samples_of(tmp_path, name, "exact_map")) == [row["prompt"] for row in ROWS[:2]]
        assert len(samples_of(tmp_path, name, "greedy")) == 5
    (c,) = [c for c in results["comparisons"] if c["strategy"] == "exact_map" and c["metric"] == "length"]
    assert c["rows"] == 2


def test_a_search_that_proves_nothing_has_no_modes_and_still_finds_errors(checkpoints, tmp_path):
    strategy = "exact_map:max_nodes=1"
    rows = [ROWS[0], ROWS[4]]  # their modes take more than one node
    results = run({"one": checkpoints["one"]}, tmp_path, rows=rows, strategies=("greedy", strategy))
    block = results["models"]["one"]["strategies"][strategy]["modes"]
    nothing = {"value": None, "ci95": [None, None]}
    assert (block["rows"], block["proven_rows"], block["proven"]["value"]) == (2, 0, 0)
    assert block["logprob"] == block["empty"] == block["is_mode"]["greedy"] == block["quality"]["length"] == nothing
    greedy, found = (samples_of(tmp_path, "one", s) for s in ("greedy", strategy))
    missed = [s["finish_reason"] != "stop" or found[p]["logprob"] > s["logprob"] + 1e-3 for p, s in greedy.items()]
    assert block["search_errors"]["greedy"]["value"] == np.mean(missed) > 0


ORACLES = ("best_of:n=3,by=phoneme_accuracy", "greedy", "best_of:n=3", "mbr:n=3,utility=phoneme_accuracy")


@pytest.fixture(scope="module")
def judged(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    settings = dataclasses.replace(SETTINGS, strategies=(*ORACLES, "exact_map"))
    with load_rewards(["phoneme_accuracy"]) as suite:
        results = contrast_and_report(
            checkpoints, ROWS, suite, settings=settings, prompt_options={}, output_dir=out, title="Judged"
        )
    return results, out


def test_a_strategy_that_chooses_by_the_references_is_an_oracle_and_others_are_none(judged):
    results, _ = judged
    for model in results["models"].values():
        marked = [s for s, block in model["strategies"].items() if block.get("oracle")]
        assert marked == ["best_of:n=3,by=phoneme_accuracy"]
    (note,) = results["notes"]
    assert note.startswith("best_of:n=3,by=phoneme_accuracy is an oracle: it chooses") and "reads references" in note


def test_an_oracle_is_labelled_and_out_of_the_headline(judged, checkpoints):
    results, out = judged
    headline = make_headline(results)
    assert "under greedy" in headline.finding
    assert not any("by=phoneme_accuracy" in tile.where for tile in headline.tiles)
    assert {"greedy", "best_of:n=3"} <= {tile.where for tile in headline.tiles}
    alone = run({"one": checkpoints["one"]}, strategies=ORACLES)
    assert make_headline(alone).finding.startswith("Under greedy,")
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert 'by=phoneme_accuracy<span class="tag">oracle</span>' in page
    assert "best\\_of:n=3,by=phoneme\\_accuracy (oracle) |" in text
    assert "best_of:n=3<" in page and 'best_of:n=3<span class="tag">' not in page


def test_the_report_has_a_section_of_modes_with_definition_and_caveat(judged):
    results, out = judged
    block = results["models"]["two"]["strategies"]["exact_map"]["modes"]
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    section = text[text.index("## Modes") : text.index("## The exact chance")]
    assert "proven" in section and "Caveat" in section
    (line,) = [line for line in section.split("\n") if line.startswith("| two |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "5 of 5" and cells[1].startswith("100.0%")
    assert cells[2].startswith(f"{block['logprob']['value']:.3f}".replace("-", "−"))
    assert '<section id="modes">' in page and "Search errors of greedy" in page and "Caveat" in page
    assert "best_of:n=3 is the mode" in page
    assert "utility=phoneme_accuracy is the mode" not in page  # it does not look for the mode
    assert "exact_map, 5 rows with proven modes" in page  # the comparisons
    for shown in (text, page):
        assert "Share of proven modes that are a stop token alone." in shown


BAD = {
    "an oracle's claim": ({"strategies": ORACLES, "primary": "per:best_of:n=3,by=phoneme_accuracy"}, "an oracle: it"),
    "a claim against an oracle": (
        {"strategies": ORACLES, "primary": "per:greedy", "primary_against": "best_of:n=3,by=phoneme_accuracy"},
        "--primary_against names 'best_of:n=3,by=phoneme_accuracy', an oracle",
    ),
    "no such reward": ({"strategies": ("best_of:n=3,by=phoneme_acuracy",)}, "Did you mean 'phoneme_accuracy'?"),
    "no such utility": ({"strategies": ("mbr:n=3,utility=chrf",)}, "utility names no reward of this evaluation"),
    "one sample": ({"strategies": ("mbr:n=1,utility=letters",)}, "expected a whole number from 2"),
    "no rows to search": ({"exact_map_rows": 0}, "--exact_map_rows is 0; expected at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_evaluated_is_refused_before_a_model_loads(case, checkpoints, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model loaded"))
    changes, message = BAD[case]
    with pytest.raises(ConfigError) as error:
        run(checkpoints, **changes)
    assert message in str(error.value)
    with load_rewards(["phoneme_accuracy", letters]) as suite, pytest.raises(ConfigError) as early:
        check_settings(dataclasses.replace(SETTINGS, **changes), suite)  # and before a run that ends with it
    assert message in str(early.value)


def test_a_claim_may_rest_on_minimum_bayes_risk(checkpoints):
    primary = "per:mbr:n=3,utility=phoneme_accuracy"
    results = run(checkpoints, strategies=ORACLES, primary=primary)
    assert results["primary"]["strategy"] == "mbr:n=3,utility=phoneme_accuracy"
    assert make_headline(results).tiles[0].primary


def test_long_names_of_strategies_leave_room_for_the_plot():
    names = ["greedy", *(f"mbr:n={n},utility=phoneme_accuracy" for n in (4, 8, 16)), "sample:temperature=0.5"]
    cell = {"value": 0.5, "ci95": [0.4, 0.6]}
    points = {("base", name): (cell, cell) for name in names}
    labels = {"x_label": "x", "y_label": "y", "y_higher_is_better": True, "y_percent": True}
    figure = plots.plane(points, ["base"], [], **labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when it gives up on the layout
        plots.to_svg(figure)
    assert figure.axes[0].get_position().width > 0.6
