"""The report's headline: what changed, how sure that is, and what it cost."""

import pytest
from test_report import report
from tiny_report import compared, value

from rlseq.evaluation.report import tables
from rlseq.evaluation.report.write import make_headline


def test_headline_says_what_changed_how_sure_and_what_it_cost(results, samples, tmp_path):
    headline = make_headline(results)
    assert headline.finding == "Better: WER under greedy is 30.0% for rl, against 32.0% for base."
    assert headline.certainty == ("Difference −2.00 pp, 95% interval −3.00 to −1.00, p < 0.001, on the same 4 rows.")
    assert headline.cost.startswith("The references became less likely: NLL per token 0.210 → 0.250 nats")
    assert headline.cost.endswith("rose: 50.0% → 64.0%.")
    page, _, markdown = report(results, samples, tmp_path)
    for sentence in (headline.finding, headline.certainty, headline.cost):
        assert sentence in page.text
    assert headline.finding in markdown


def test_headline_says_what_its_rows_could_have_detected(results, samples, tmp_path):
    power = {"detectable_difference": 0.0142, "unit": 0.01, "rows_for_unit": 4033}
    results["comparisons"][3]["power"] = power  # of the primary one
    said = "With 80% power these rows detect a difference of 1.42 pp (two-sided, 5%); one percentage point takes "
    said += "4,033 rows."
    page, _, markdown = report(results, samples, tmp_path)
    assert make_headline(results).certainty.endswith(f"the same 4 rows. {said}")
    assert said in page.text and said.split("(")[0] in markdown
    results["primary"] = None
    results["comparisons"][0]["power"] = power
    results["comparisons"][3]["power"] = None
    results["comparisons"] = results["comparisons"][:1]
    assert make_headline(results).certainty.endswith(
        "detect a difference of 0.014 (two-sided, 5%); a difference of 0.01 takes 4,033 rows."
    )


def test_secondary_comparisons_show_their_adjusted_p_and_their_number(results, samples, tmp_path):
    for comparison, p in zip(results["comparisons"], (0.004, 0.03, 1.0, None, 0.213), strict=True):
        comparison["p_adjusted"] = p
    results["adjustment"] = {"method": "holm", "comparisons": 4}
    page, _, markdown = report(results, samples, tmp_path)
    for text in (page.text, markdown):
        assert "There are 4 secondary comparisons" in text and "it is below 0.05 for 2." in text.replace("\\", "")
    cells = [[cell.strip() for cell in line.split("|")] for line in markdown.split("\n") if line.startswith("| ")]
    header = next(row for row in cells if "p (Holm)" in row)
    shown = {(row[1], row[2]): row[header.index("p (Holm)")] for row in cells if len(row) == len(header)}
    assert shown["greedy", "WER (primary)"] == "n/a" and shown["sample", "WER"] == "0.213"


def test_headline_says_what_it_cost_in_coverage_and_diversity(results, samples, tmp_path):
    results["comparisons"] += [
        compared("exact_pass_at_k.1", None, 0.14, [0.1, 0.18]),
        compared("exact_pass_at_k.4", None, 0.01, [-0.01, 0.03]),
        compared("logprob", "sample", 0.3, [0.2, 0.4]),
        compared("logprob_per_token", "sample", 0.06, [0.05, 0.07]),
    ]
    for model, entropy in (("base", 0.9), ("rl", 0.6)):
        block = results["models"][model]["strategies"]["sample"]
        block |= {"logprob": value(-entropy), "logprob_per_token": value(-entropy / 5)}
    cost = make_headline(results).cost
    assert "Coverage did not clearly change: 4 samples hold a reference in 80.0% → 81.0% of rows" in cost
    said = "the entropy of a token is 0.180 → 0.120 nats, that of a completion 0.900 → 0.600 nats."
    assert f"Samples are less varied: {said}" in cost
    results["comparisons"][-3]["ci95"] = [0.005, 0.03]
    results["comparisons"][-1] |= {"difference": -0.3, "ci95": [-0.4, -0.2]}
    cost = make_headline(results).cost
    assert "Coverage rose" in cost and "more varied" in cost


def test_headline_says_how_much_of_the_gain_a_lower_temperature_gives(results):
    gap = {"a": "base", "b": "rl", "metric": "exact_match"}
    gap |= {"total": value(0.05), "sharpening": value(0.04), "residual": {"value": 0.01, "ci95": [-0.02, 0.04]}}
    results["studies"] = {"sharpening": {"gaps": [{**gap, "b": "other"}, gap]}}
    assert make_headline(results).source == (
        "In plain sampling exact match gains +5.00 pp: +4.00 pp of it base gains, too, at a lower temperature of equal "
        "entropy; the residual is +1.00 pp (95% interval −2.00 to +4.00)."
    )
    nothing = {"value": None, "ci95": [None, None]}
    gap |= {"sharpening": nothing, "residual": nothing}  # cooled as far as was tried, base stays the more varied
    assert make_headline(results).source == (
        "In plain sampling exact match differs by +5.00 pp: how much of it a lower temperature gives base is not "
        "known, as none of those studied makes its samples as little varied as those of rl."
    )
    gap |= {"total": value(-0.02), "sharpening": value(0.01), "residual": {"value": -0.03, "ci95": [-0.04, -0.02]}}
    assert make_headline(results).source == (
        "In plain sampling exact match differs by −2.00 pp, and a lower temperature of equal entropy gives base "
        "+1.00 pp; the residual is −3.00 pp (95% interval −4.00 to −2.00)."
    )
    del gap["residual"]
    assert make_headline(results).source == ""


def test_headline_does_not_claim_what_the_interval_does_not_show(results):
    results["primary"]["strategy"] = "sample"
    headline = make_headline(results)
    assert headline.finding.startswith("No clear difference: WER under sample")
    assert "the interval holds zero" in headline.certainty and "p = 0.200" in headline.certainty


def test_an_interval_that_p_does_not_bear_out_is_no_finding(results):
    # one row that is better: every resample is that row, and so is every swap but for its sign
    results["comparisons"][3] |= {"difference": -1.0, "ci95": [-1.0, -1.0], "p_value": 1.0}
    headline = make_headline(results)
    assert headline.verdict == "unclear" and headline.finding.startswith("No clear difference: ")
    assert "p = 1.000" in headline.certainty and "holds zero" not in headline.certainty
    assert headline.certainty.endswith("the interval excludes zero, but p is not below 0.05.")


def test_references_are_more_likely_too_only_beside_a_gain(results):
    results["comparisons"][0] |= {"difference": -0.04, "ci95": [-0.05, -0.03]}
    assert make_headline(results).cost.startswith("The references became more likely too: ")
    results["comparisons"][3] |= {"difference": 0.02, "ci95": [0.01, 0.03]}
    assert make_headline(results).cost.startswith("The references became more likely: ")


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (0.0001, 0.0002, "rose: 0.01% → 0.02%."),
        (0.00010002, 0.00010009, "rose: 0.01000% → 0.01001%."),
        (1e-30, 1e-20, "rose by less than is shown: 0.0% → 0.0%."),
    ],
)
def test_headline_shows_the_digits_in_which_a_difference_lies_or_says_that_it_does_not(results, a, b, said):
    for model, x in (("base", a), ("rl", b)):
        results["models"][model]["likelihood"]["expected_accuracy"] = value(x)
    results["comparisons"][1] |= {"difference": b - a, "ci95": [(b - a) / 2, 2 * (b - a)]}
    assert make_headline(results).cost.endswith(said)
    results["comparisons"][1]["ci95"] = [-1.0, 1.0]  # nothing is claimed: nothing needs to be seen
    assert make_headline(results).cost.endswith("did not clearly change: 0.0% → 0.0%.")


def test_headline_says_of_the_finding_too_that_it_is_less_than_shown(results):
    for model, x in (("base", 0.3), ("rl", 0.3 - 1e-9)):
        results["models"][model]["strategies"]["greedy"]["wer"] = value(x)
    results["comparisons"][3] |= {"difference": -1e-9, "ci95": [-2e-9, -5e-10]}
    assert make_headline(results).finding.startswith("Better by less than is shown: WER under greedy is 30.0% for rl,")


def test_worse_is_called_worse(results):
    results["comparisons"][3] |= {"difference": 0.02, "ci95": [0.01, 0.03]}
    assert make_headline(results).finding.startswith("Worse: ")


def test_without_a_primary_everything_is_exploratory_and_the_headline_gives_no_p(results, samples, tmp_path):
    results["primary"] = None
    headline = make_headline(results)
    assert "exploratory" in headline.certainty and "p =" not in headline.certainty and "p <" not in headline.certainty
    _, _, markdown = report(results, samples, tmp_path)
    assert "No comparison was declared primary" in markdown and "(primary)" not in markdown


def test_primary_against_another_strategy_of_the_base_reads_both_values(results):
    results["comparisons"].append(compared("wer", "greedy", -0.1, [-0.2, -0.05]) | {"strategy_a": "sample"})
    results["primary"]["strategy_a"] = "sample"
    first = tables.comparisons(results)[0]
    assert (first.where, first.value_a, first.value_b) == ("sample → greedy", "40.0%", "30.0%")
    assert [c.primary for c in tables.comparisons(results)].count(True) == 1


def test_verdict_is_text_and_sign_not_colour_alone(results):
    by_place = {(c.metric.name, c.strategy): (c.mark, c.verdict) for c in tables.comparisons(results)}
    assert by_place == {
        ("wer", "greedy"): ("▲", "better"),
        ("wer", "sample"): ("·", "unclear"),
        ("nll_per_token", None): ("▼", "worse"),
        ("expected_accuracy", None): ("▲", "better"),
        ("length", "greedy"): ("=", "equal"),
    }
