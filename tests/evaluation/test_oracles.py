"""Oracles in an evaluation: strategies that choose by the answers, and what rests on them."""

import dataclasses
import warnings

import pytest
from test_contrast import letters
from test_map import ROWS, SETTINGS, run, saved
from transformers import AutoModelForCausalLM

from rlseq.errors import ConfigError
from rlseq.evaluation.report import plots
from rlseq.evaluation.report.write import make_headline
from rlseq.evaluation.run import check_settings, contrast_and_report
from rlseq.scoring import load_rewards

ORACLES = ("best_of:n=3,by=phoneme_accuracy", "greedy", "best_of:n=3", "mbr:n=3,utility=phoneme_accuracy")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def judged(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    settings = dataclasses.replace(SETTINGS, strategies=ORACLES, studies=())
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


BAD = {
    "an oracle's claim": ({"strategies": ORACLES, "primary": "per:best_of:n=3,by=phoneme_accuracy"}, "an oracle: it"),
    "a claim against an oracle": (
        {"strategies": ORACLES, "primary": "per:greedy", "primary_against": "best_of:n=3,by=phoneme_accuracy"},
        "--primary_against names 'best_of:n=3,by=phoneme_accuracy', an oracle",
    ),
    "no such reward": ({"strategies": ("best_of:n=3,by=phoneme_acuracy",)}, "Did you mean 'phoneme_accuracy'?"),
    "no such utility": ({"strategies": ("mbr:n=3,utility=chrf",)}, "utility names no reward of this evaluation"),
    "one sample": ({"strategies": ("mbr:n=1,utility=letters",)}, "expected a whole number from 2"),
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
