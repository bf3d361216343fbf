"""--cluster_column: intervals, p values and power are those of clusters, which are independent, and not of rows."""

import dataclasses
import json

import pytest
from tiny import tiny_model
from tiny_task import tiny_tokenizer

from rlseq.errors import ConfigError
from rlseq.evaluation.report.headline import make_headline
from rlseq.evaluation.results.compare import join
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.stats.power import describe_power
from rlseq.scoring import load_rewards

PROMPTS = ("a b", "a c", "b c", "c d a")
ROWS = [{"prompt": p, "references": [p[::-1]], "id": i, "doc": p[0]} for i, p in enumerate(PROMPTS)]
SETTINGS = ContrastSettings(strategies=("greedy", "sample"), samples_per_row=2, max_new_tokens=4, resamples=200)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in ("one", "two")}


def measured(models, rows=ROWS, output_dir=None, **changed):
    with load_rewards(["exact_match", "phoneme_accuracy"]) as suite:
        settings = dataclasses.replace(SETTINGS, **changed)
        return contrast(models, rows, suite, settings=settings, quiet=True, output_dir=output_dir)


def numbers(results):
    """Values, intervals, p and power, as text; without the word that says what they are of."""
    compared = []
    for c in results["comparisons"]:
        power = {key: value for key, value in (c["power"] or {}).items() if key != "of"}
        compared.append(c | {"power": power})
    return json.dumps([results["models"], compared, results["adjustment"]])


@pytest.fixture(scope="module")
def by_row(models):
    return measured(models)


def test_a_cluster_of_each_row_changes_no_bit(models, by_row):
    clustered = measured(models, cluster_column="id")
    assert clustered["clusters"] == {"column": "id", "clusters": 4}
    assert numbers(clustered) == numbers(by_row)


def test_rows_that_repeat_within_a_cluster_add_no_certainty(models):
    # Every row three times, under one document: sums are 3 times those of a row, and ratios of sums what they were. By
    # rows the intervals would be narrower by √3. Greedy, as repeated rows have samples of their own.
    rows = [row | {"doc": row["id"]} for row in ROWS]
    once = measured(models, rows, strategies=("greedy",))
    thrice = [row for row in rows for _ in range(3)]
    repeated, naive = (measured(models, thrice, strategies=("greedy",), cluster_column=c) for c in ("doc", None))
    assert repeated["rows"] == 12 and repeated["clusters"]["clusters"] == 4
    for a, b, by_rows in zip(once["comparisons"], repeated["comparisons"], naive["comparisons"], strict=True):
        assert b["difference"] == pytest.approx(a["difference"], abs=1e-9)
        assert b["ci95"] == pytest.approx(a["ci95"], abs=1e-9) and b["p_value"] == a["p_value"]
        if a["power"]:
            smallest = [c["power"]["detectable_difference"] for c in (a, b, by_rows)]
            assert smallest[1] == pytest.approx(smallest[0], rel=1e-6) and smallest[2] < 0.7 * smallest[1]


def test_the_report_and_the_joined_evaluation_know_the_clusters(models, by_row, tmp_path):
    results = measured(models, cluster_column="doc", output_dir=tmp_path / "all")
    assert results["clusters"] == {"column": "doc", "clusters": 3}
    assert "on the same 4 rows in 3 clusters (doc)" in make_headline(results).certainty
    assert any("the 3 clusters as independent, not the 4 rows" in note for note in results["notes"])
    of = {c["power"]["of"] for c in results["comparisons"] if c["power"]}
    assert of == {"clusters"}
    assert numbers(results) != numbers(by_row)
    measured({"one": models["one"]}, cluster_column="doc", output_dir=tmp_path / "one")
    measured({"two": models["two"]}, cluster_column="doc", output_dir=tmp_path / "two")
    joined = join([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "joined")
    assert joined["comparisons"] == results["comparisons"] and joined["clusters"] == results["clusters"]


@pytest.mark.parametrize(
    ("rows", "column", "said"),
    [
        (ROWS, "docs", "the data has no column 'docs' .--cluster_column.*Did you mean 'doc'"),
        ([*ROWS, {"prompt": "a", "references": ["a"]}], "doc", "1 of 5 rows have no value there, first row 4"),
        ([row | {"doc": "x"} for row in ROWS], "doc", "all 4 rows are one cluster"),
    ],
)
def test_rows_without_clusters_are_refused_before_a_model_is_loaded(rows, column, said):
    with pytest.raises(ConfigError, match=said):
        measured({"one": "/no/such/model"}, rows, cluster_column=column)


def test_power_beforehand_counts_clusters():
    said = describe_power(400, "clusters")
    assert said.startswith("400 clusters detect") and "every cluster changes" in said
