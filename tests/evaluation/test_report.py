"""The report of a small contrast, read back as a reader or a browser would."""

import copy
import math
import re
from html.parser import HTMLParser

import pytest
from tiny_report import METRICS, chance, quality

from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.report.write import print_summary, write_report


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
