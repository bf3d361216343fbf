"""Whether likelihood knows quality, in results.json, against scipy on the completions of samples.jsonl."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from test_contrast import letters
from test_map import ROWS, saved

from rlseq.errors import ConfigError
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.stats.association import auroc, spearman
from rlseq.evaluation.studies.table import STUDIES, studied_rows
from rlseq.scoring import load_rewards

SETTINGS = ContrastSettings(
    strategies=("greedy", "sample"), max_new_tokens=3, resamples=200, samples_per_row=12, studies=("ranking",)
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"))


def halves(completion, **columns):
    """A reward that abstains on empty completions."""
    return None if not completion.strip() else len(completion) % 3


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with load_rewards([letters, halves]) as suite:
        options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": out, "title": "t"}
        results = contrast_and_report(checkpoints, ROWS, suite, **options)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return results, samples, out


def completions(samples, model, strategy):
    """Completions by row, in the order of the rows."""
    by_row = {}
    for sample in samples:
        if (sample["model"], sample["strategy"]) == (model, strategy):
            by_row.setdefault(sample["key"], []).append(sample)
    return list(by_row.values())


def right(sample):
    return sample["finish_reason"] == "stop" and sample["completion"].strip() in sample["references"]


@pytest.mark.parametrize("model", ["one", "two"])
@pytest.mark.parametrize("reward", ["letters", "halves"])
def test_correlations_are_those_of_scipy(measured, model, reward):
    results, samples, _ = measured
    entry = results["studies"]["ranking"]["models"][model]["sample"]["rewards"][reward]
    within, means = [], []
    for row in completions(samples, model, "sample"):
        pairs = [(s["logprob"], s["values"][reward]) for s in row if s["values"][reward] is not None]
        if not pairs:  # it abstained on all of them
            continue
        x, y = map(np.array, zip(*pairs, strict=True))
        means.append((x.mean(), y.mean()))
        if len(set(x)) > 1 and len(set(y)) > 1:
            within.append(stats.spearmanr(x, y).statistic)
    assert within
    cell = entry["spearman_within"]
    assert cell["value"] == pytest.approx(np.mean(within))
    assert cell["rows"] == len(within)
    assert entry["spearman_across"]["value"] == pytest.approx(stats.spearmanr(*zip(*means, strict=True)).statistic)
    for cell in entry.values():
        low, high = cell["ci95"]
        assert -1 <= low <= cell["value"] <= high <= 1


@pytest.mark.parametrize("model", ["one", "two"])
def test_auroc_is_the_share_of_pairs_in_order(measured, model):
    results, samples, _ = measured
    entry = results["studies"]["ranking"]["models"][model]["sample"]
    rows = completions(samples, model, "sample")

    def share(group):
        found = [(s["logprob"], right(s)) for s in group]
        pairs = [(a > b) + (a == b) / 2 for a, good in found if good for b, bad in found if not bad]
        return np.mean(pairs) if pairs else np.nan

    assert any(right(s) for row in rows for s in row)
    assert entry["auroc"]["value"] == pytest.approx(share([s for row in rows for s in row]))
    by_row = [share(row) for row in rows]
    if np.isfinite(by_row).any():
        assert entry["auroc_within"]["value"] == pytest.approx(np.nanmean(by_row))
        assert entry["auroc_within"]["rows"] == np.isfinite(by_row).sum()
    else:
        assert "auroc_within" not in entry


def test_one_completion_a_row_has_nothing_within(measured):
    results, _, out = measured
    entry = results["studies"]["ranking"]["models"]["one"]["greedy"]
    assert all("spearman_within" not in cells for cells in entry["rewards"].values())
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert "Does likelihood know quality?" in text
        assert "Log-prob and letters" in text


def test_resamples_with_counts_are_resamples_of_the_pairs():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 30).astype(float)
    y = x + rng.integers(0, 6, 30)
    good = (rng.random(30) < 0.4).astype(float)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=20)
    for count, rho, area in zip(counts, spearman(x, y, counts), auroc(x, good, counts), strict=True):
        a, b, g = (np.repeat(values, count) for values in (x, y, good))
        assert rho == pytest.approx(stats.spearmanr(a, b).statistic)
        u = stats.mannwhitneyu(a[g == 1], a[g == 0]).statistic
        assert area == pytest.approx(u / (g.sum() * (1 - g).sum()))


def test_what_does_not_vary_has_no_correlation():
    assert np.isnan(spearman(np.ones(4), np.arange(4.0))).all()
    assert np.isnan(spearman(np.array([0.1, 0.2]), np.array([1.0, 2.0]), np.array([[2.0, 0.0]]))).all()
    assert np.isnan(auroc(np.arange(3.0), np.ones(3))).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studies": ("rankin",)}, "ranking"),
        ({"studies": ("ranking", "ranking")}, "twice"),
        ({"studies": ("ranking",), "study_rows": 0}, "study_rows"),
    ],
)
def test_studies_are_checked_before_a_model_loads(changes, message):
    settings = dataclasses.replace(SETTINGS, **changes)
    with load_rewards([letters]) as suite:
        with pytest.raises(ConfigError, match=message):
            check_settings(settings, suite)
        with pytest.raises(ConfigError, match=message):
            contrast({"no": "such/model"}, ROWS, suite, settings=settings, quiet=True)


def test_a_costly_study_runs_on_the_first_rows_of_the_data(monkeypatch):
    monkeypatch.setattr(type(STUDIES["ranking"]), "costly", True)
    settings = dataclasses.replace(SETTINGS, study_rows=3)
    assert [studied_rows("ranking", places, settings) for places in ([0, 2, 4], [1, 3], [])] == [2, 1, 0]
    assert studied_rows("ranking", [0, 2, 4], dataclasses.replace(settings, study_rows=None)) == 3
