"""The report of a small contrast, read back as a reader or a browser would."""

import copy
import math
import re
from html.parser import HTMLParser

import pytest

from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.report.samples import marked_pieces, monte_carlo_pass_at_k, pair_samples
from rlseq.evaluation.report.write import make_headline, print_summary, write_report

HOSTILE = "<script>alert('x')</script> | **b** ![i](http://evil.example/x.png)"


def value(x, half=0.01):
    return {"value": x, "ci95": [x - half, x + half]}


def compared(metric, strategy, difference, ci95, p=0.01):
    return {
        "a": "base",
        "b": "rl",
        "strategy": strategy,
        "metric": metric,
        "difference": difference,
        "ci95": ci95,
        "p_value": p,
    }


def quality(wer, length):
    return {
        "accuracy_x": value(1 - wer / 4),
        "wer": value(wer),
        "exact_match": value(1 - wer),
        "length": value(length),
    }


def chance(p):
    return {"expected_accuracy": value(p), "unreachable": value(0.1), "unreachable_references": value(0.2)}


@pytest.fixture
def results():
    return {
        "schema": 1,
        "rows": 4,
        "spec": {"seed": 0, "settings": {"strategies": ["greedy", "sample"]}},
        "models": {
            "base": {
                "path": "runs/base",
                "likelihood": {
                    "nll_per_token": value(0.21),
                    "expected_accuracy": value(0.50),
                    "exact_pass_at_k": {"1": value(0.50), "2": value(0.7), "4": value(0.8)},
                },
                "strategies": {"greedy": quality(0.32, 7), "sample": quality(0.40, 7) | chance(0.50)},
            },
            "rl": {
                "path": "runs/rl",
                "likelihood": {
                    "nll_per_token": value(0.25),
                    "expected_accuracy": value(0.64),
                    "exact_pass_at_k": {"1": value(0.64), "2": value(0.75), "4": value(0.81)},
                },
                "strategies": {"greedy": quality(0.30, 7), "sample": quality(0.36, 7.2) | chance(0.64)},
            },
        },
        "comparisons": [
            compared("nll_per_token", None, 0.04, [0.03, 0.05]),
            compared("expected_accuracy", None, 0.14, [0.1, 0.18]),
            compared("length", "greedy", 0.0, [0.0, 0.0], 1.0),
            compared("wer", "greedy", -0.02, [-0.03, -0.01], 0.0004),
            compared("wer", "sample", -0.04, [-0.09, 0.01], 0.2),
        ],
        "metrics": {
            "accuracy_x": {"higher_is_better": True, "kind": "reward", "description": "", "percent": False},
            "wer": {
                "label": "WER",
                "higher_is_better": False,
                "kind": "corpus",
                "description": "share wrong",
                "percent": True,
            },
        },
        "primary": {"metric": "wer", "strategy": "greedy", "a": "base", "b": "rl"},
        "notes": ["A note & a half."],
    }


def sample(model, key, completion, total, strategy="greedy", number=0):
    return {
        "model": model,
        "strategy": strategy,
        "key": key,
        "prompt": f"prompt {key}",
        "references": ["K AE T"],
        "sample": number,
        "completion": completion,
        "values": {"accuracy_x": total},
        "total": total,
        "logprob": -1.0,
        "length": 3,
        "finish_reason": "stop",
    }


@pytest.fixture
def samples():
    return [
        sample("base", "r1", "K AE D", 0.5),
        sample("rl", "r1", "K AE T", 1.0),
        sample("base", "r2", "K AE T", 1.0),
        sample("rl", "r2", HOSTILE, 0.0),
        sample("base", "r3", "K AE T", 1.0),
        sample("rl", "r3", "K AE T", 1.0),
        sample("base", "r4", "", 0.0),
        sample("rl", "r4", "AE T", 0.7),
    ]


METRICS = [
    {"step": i, "reward": 0.5 + i / 100, "kl": 0.01 * i, "reference_nll": 0.2, "rewards/a/mean": 0.1}
    for i in range(1, 41)
] + [{"step": 40, "train_runtime": 3.0, "reward": float("nan")}]


class Page(HTMLParser):
    """Tags that stay open, ids, and text, as a strict reader finds them."""

    VOID = frozenset({"meta", "input", "br", "path", "use", "rect", "image", "line", "circle", "link"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.urls, self.words = [], set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, text in attrs:
            if name == "id":
                self.ids.append(text)
            if name in ("src", "href", "xlink:href") and not text.startswith("#"):
                self.urls.append(text)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(results, samples, tmp_path, **more):
    path = write_report(results, samples, tmp_path, **more)
    html = path.read_text(encoding="utf-8")
    return Page(html), html, (tmp_path / "report.md").read_text(encoding="utf-8")


def test_page_is_well_formed_alone_and_has_no_repeated_ids(results, samples, tmp_path):
    page, html, _ = report(results, samples, tmp_path, metrics=METRICS)
    assert page.open == []
    assert page.urls == []  # nothing is fetched: no script, image, font or style from elsewhere
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", html)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_completion_that_holds_markup_is_text(results, samples, tmp_path):
    page, html, markdown = report(results, samples, tmp_path, title="<b>T</b>")
    assert "script" not in page.tags and "img" not in page.tags and "b" not in page.tags
    assert "<script>" not in html
    assert "&lt;script&gt;" in html and "<script>" in page.text
    row = next(line for line in markdown.splitlines() if "alert" in line)
    assert "\\<script\\>" in row and "!\\[i\\](" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 6  # five cells: the completion's own bar is escaped


def test_model_name_that_holds_markup_is_text_in_figures_too(results, samples, tmp_path):
    renamed = copy.deepcopy(results)
    renamed["models"] = {"<i>a": results["models"]["base"], "b&c": results["models"]["rl"]}
    renamed["comparisons"], renamed["primary"] = [], None
    page, _, _ = report(renamed, samples, tmp_path)
    assert "i" not in page.tags and page.open == []
    assert "<i>a, exact" in page.text


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


def test_tables_hold_every_value_with_its_interval(results, samples, tmp_path):
    page, _, markdown = report(results, samples, tmp_path)
    assert "| sample | rl | 0.910 (0.900 to 0.920) | 36.0% (35.0 to 37.0) | 64.0% (63.0 to 65.0) |" in markdown
    assert "| base | 0.210 (0.200 to 0.220) | 50.0% (49.0 to 51.0) |" in markdown
    assert "| greedy | WER (primary) | base | rl | 32.0% | 30.0% | −2.00 pp | −3.00 to −1.00 |" in markdown
    assert "| base | 50.0% (49.0 to 51.0) | 70.0% (69.0 to 71.0) | 80.0% (79.0 to 81.0) |" in markdown
    for shown in (
        "36.0% 35.0 to 37.0",
        "settings.strategies greedy, sample",
        "share wrong",
        "A note & a half.",
    ):
        assert shown in page.text


def test_the_exact_chance_is_checked_against_the_samples_under_every_strategy_that_samples(results, samples, tmp_path):
    for model, p in (("base", 0.595), ("rl", 0.63)):
        results["models"][model]["strategies"]["sample:top_k=3"] = quality(0.40, 7) | chance(p)
    page, _, markdown = report(results, samples, tmp_path)
    # base: exact 0.50 lies outside 0.59..0.61; rl: exact 0.64 lies inside 0.63..0.65.
    never = "10.0% (9.0 to 11.0) | 20.0% (19.0 to 21.0) |"
    assert f"| sample | base | 50.0% (49.0 to 51.0) | 60.0% (59.0 to 61.0) | no | {never}" in markdown
    assert f"| sample | rl | 64.0% (63.0 to 65.0) | 64.0% (63.0 to 65.0) | yes | {never}" in markdown
    # truncated to three tokens: 0.595 lies within 0.59..0.61, 0.63 outside
    cut = markdown.replace("\\", "")
    assert f"| sample:top_k=3 | base | 59.5% (58.5 to 60.5) | 60.0% (59.0 to 61.0) | yes | {never}" in cut
    assert f"| sample:top_k=3 | rl | 63.0% (62.0 to 64.0) | 60.0% (59.0 to 61.0) | no | {never}" in cut
    assert "base 59.5% 58.5 to 60.5 60.0% 59.0 to 61.0 yes 10.0% 9.0 to 11.0 20.0% 19.0 to 21.0" in page.text
    # where the error of the sampling is known, it decides
    for model, agrees in (("base", True), ("rl", False)):
        gap = {"difference": 0.1, "standard_error": 0.05, "agrees": agrees}
        results["models"][model]["sampled_and_exact"] = {"sample": gap}
    again = report(results, samples, tmp_path)[2]
    assert f"| sample | base | 50.0% (49.0 to 51.0) | 60.0% (59.0 to 61.0) | yes | {never}" in again
    assert f"| sample | rl | 64.0% (63.0 to 65.0) | 64.0% (63.0 to 65.0) | no | {never}" in again


def test_missing_likelihood_is_said_visibly(results, samples, tmp_path):
    for model in results["models"].values():
        del model["likelihood"]
    results["comparisons"] = [c for c in results["comparisons"] if c["strategy"] is not None]
    page, _, markdown = report(results, samples, tmp_path)
    assert "Skipped: no references." in page.text and "Skipped: no references." in markdown
    assert "Likelihood was skipped: no references." in page.text
    assert not (tmp_path / "plots" / "plane.svg").exists()


def test_one_model_alone_has_a_report_without_comparisons(results, samples, tmp_path):
    del results["models"]["rl"]
    results["comparisons"], results["primary"] = [], None
    page, _, _ = report(results, [s for s in samples if s["model"] == "base"], tmp_path)
    assert "Under greedy, base has" in page.text and "Lowest scores" in page.text
    assert "Paired comparisons" not in page.text


def test_with_three_models_each_comparison_names_its_pair(results, samples, tmp_path):
    results["models"]["rl2"] = results["models"]["rl"]
    results["comparisons"] += [row | {"b": "rl2"} for row in results["comparisons"]]
    page, _, markdown = report(results, samples, tmp_path)
    assert page.text.count("rl2 − base") == 5 and page.text.count("rl − base") == 5
    assert "| greedy | WER | base | rl2 | 32.0% | 30.0% | −2.00 pp |" in markdown  # only b = rl is primary
    assert "base, rl, rl2" in page.text


def test_figures_and_curves_are_written_as_files(results, samples, tmp_path):
    report(results, samples, tmp_path, metrics=METRICS)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"plane.svg", "pass-at-k.svg", "training-0.svg", "training-1.svg", "training-2.svg"}
    assert plots.write_curves(METRICS, tmp_path / "curves.png") == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert plots.write_curves([{"step": 1, "epoch": 0.1}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_equal_results_give_equal_bytes(results, samples, tmp_path):
    first = report(results, samples, tmp_path / "a", metrics=METRICS)[1]
    assert report(results, samples, tmp_path / "b", metrics=METRICS)[1] == first


def test_colours_follow_the_page_and_stay_literal_on_disk(results, samples, tmp_path):
    _, html, _ = report(results, samples, tmp_path)
    assert "var(--series-1)" in html[html.index("<svg") :] and plots.SERIES[1] not in html[html.index("<svg") :]
    assert plots.SERIES[1] in (tmp_path / "plots" / "plane.svg").read_text()


def test_training_series_skip_what_is_absent_or_not_finite():
    series = plots.training_series(METRICS)
    assert [title.split(" (")[0] for title in series] == [
        "Reward",
        "NLL of references",
        "KL to the reference model",
    ]
    steps, rewards = series["Reward (mean over rollouts)"]
    assert steps == list(range(1, 41)) and not any(map(math.isnan, rewards))
    both = [row | {"rewards/b/mean": 0.3} for row in METRICS]
    assert {"Reward a", "Reward b"} <= set(plots.training_series(both))


def test_running_mean_keeps_a_straight_line():
    line = [2.0 * i for i in range(12)]
    assert plots.running_mean(line, 3) == pytest.approx(line)
    assert plots.running_mean([0, 3, 0, 3, 0], 1) == pytest.approx([0, 1, 2, 1, 0])


def test_gains_and_losses_are_ranked_and_counted(samples):
    side = pair_samples(samples, "base", "rl", "greedy")
    assert [(row.key, row.gain) for row in side.better] == [
        ("r4", pytest.approx(0.7)),
        ("r1", pytest.approx(0.5)),
    ]
    assert [row.key for row in side.worse] == ["r2"]
    assert side.counts == {"better": 2, "same": 1, "worse": 1, "changed": 3}
    assert side.changed == ()  # what stayed at its score stayed as it was
    assert {row.key for row in side.random} == {"r1", "r2", "r3", "r4"}
    assert side.score_name == "accuracy_x"
    assert pair_samples(samples, "base", "rl", "beam") is None


def test_rows_score_the_mean_over_their_samples_and_repeats_are_counted():
    samples = [
        sample("base", "r", "K AE T", 1.0, number=0),
        sample("base", "r", "K", 0.0, number=1),
        sample("base", "r", "K AE T", 1.0, number=2),
        sample("rl", "r", "K AE T", None, number=0) | {"values": {"accuracy_x": None}},
        sample("rl", "r", "K AE T", 1.0, number=1),
    ]
    row = pair_samples(samples, "base", "rl", "greedy").better[0]
    assert row.a.score == pytest.approx(2 / 3) and row.b.score == 1.0  # what abstained is not a zero
    assert [count for count, _ in row.a.completions] == [2, 1]


def test_rows_that_changed_at_an_equal_score_are_shown():
    samples = [sample("base", "r", "K", 0.0), sample("rl", "r", "K T", 0.0)]
    samples += [sample("base", "s", "AE", 1.0), sample("rl", "s", "AE", 1.0)]
    side = pair_samples(samples, "base", "rl", "greedy")
    assert [row.key for row in side.changed] == ["r"]
    assert side.counts == {"better": 0, "same": 2, "worse": 0, "changed": 1}


def test_pieces_mark_what_differs_from_the_closest_reference():
    references = ["K AE T S", "D AO G"]
    assert marked_pieces("K AE D S", references) == (("K AE ", "same"), ("D ", "wrong"), ("S", "same"))
    assert marked_pieces("D G", references) == (("D ", "same"), ("AO", "missing"), ("G", "same"))
    assert marked_pieces("quite another text", references) == (("quite another text", "same"),)
    assert marked_pieces("K AE T S", references) == (("K AE T S", "same"),)
    assert marked_pieces(" ", references) == ()


def test_monte_carlo_pass_at_k_follows_by_hand():
    # Two rows of two samples: one right of two, none right. pass@1 = (1/2 + 0) / 2, pass@2 = (1 + 0) / 2.
    samples = [
        sample("m", "r1", "K AE T", 1, "sample", 0),
        sample("m", "r1", "K", 0, "sample", 1),
        sample("m", "r2", "D", 0, "sample", 0),
        sample("m", "r2", "K AE T", 0, "sample", 1) | {"finish_reason": "length"},  # cut: not the reference
    ]
    assert monte_carlo_pass_at_k(samples, "sample", 2) == {"m": {1: 0.25, 2: 0.5}}
    assert monte_carlo_pass_at_k(samples, "sample", 3) == {}  # a part of the rows estimates something else


@pytest.mark.parametrize(
    ("x", "decimals", "signed", "text"),
    [
        (-0.5, 1, False, "−0.5"),
        (0.04, 1, True, "0.0"),
        (-0.04, 1, True, "0.0"),
        (1234.5, 1, True, "+1,234.5"),
        (math.nan, 2, False, "n/a"),
        (None, 2, True, "n/a"),
    ],
)
def test_numbers_have_true_minus_signs_and_no_signed_zeros(x, decimals, signed, text):
    assert tables.number(x, decimals, signed=signed) == text


def test_summary_in_the_terminal_names_models_values_and_the_finding(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    print_summary(results)
    out = capsys.readouterr().out
    assert "32.0%" in out and "base" in out and "Better: WER under greedy is 30.0% for rl" in out


@pytest.mark.parametrize("columns", [60, 80])
def test_the_summary_cuts_no_number_in_a_narrow_terminal(results, capsys, monkeypatch, columns):
    def numbers(width):
        monkeypatch.setenv("COLUMNS", str(width))
        print_summary(results)
        lines = capsys.readouterr().out.splitlines()
        return sorted(word for line in lines if line.startswith(("base ", "rl ")) for word in line.split()[2:])

    assert numbers(columns) == numbers(200) and len(numbers(200)) == 4 * 4


def test_names_in_the_summary_are_neither_markup_nor_acts_on_the_terminal(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    name = "[bold]r\u202el\x1b[2J"
    results["models"] = {{"rl": name}.get(model, model): entry for model, entry in results["models"].items()}
    for comparison in [*results["comparisons"], results["primary"]]:
        for side in ("a", "b"):
            comparison[side] = {"rl": name}.get(comparison[side], comparison[side])
    print_summary(results)
    out = capsys.readouterr().out
    assert out.count("[bold]r\\u202el\\u001b[2J") >= 3  # a row each, its likelihood, the finding
    assert not set(out) & set("\u202e\x1b")


@pytest.mark.parametrize("cut", [0.0, 0.02])
def test_the_summary_leaves_out_what_went_wrong_nowhere(results, capsys, monkeypatch, cut):
    monkeypatch.setenv("COLUMNS", "200")
    for model in results["models"].values():
        for cells in model["strategies"].values():
            cells["truncated"] = {"value": cut, "ci95": [cut, cut]}
    print_summary(results)
    assert ("Truncated" in capsys.readouterr().out) == bool(cut)
