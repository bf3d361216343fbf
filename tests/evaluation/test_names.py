# ruff: noqa: F401, F811 (a fixture is imported)
"""Names of numbers, and which completions a number is of."""

import dataclasses
import json
import math

import pytest
from test_contrast import ROWS, SETTINGS, checkpoints, quick
from test_during import make_evaluator, policy

from rlseq import load_rewards
from rlseq.errors import ConfigError, RewardError
from rlseq.evaluation.metrics import BUILT_IN
from rlseq.evaluation.names import Names
from rlseq.evaluation.report.plots import file_names
from rlseq.evaluation.report.tables import generated, metric, shown
from rlseq.evaluation.run import check_settings, contrast_and_report
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.studies.table import sections
from rlseq.scoring import CorpusMetric, Ratio, reward
from rlseq.scoring.corpus import of_completions, statistics_of, value_of


def named(name, value=3.0, **options):
    @reward(**options)
    def function(completion: str) -> float:
        return value

    return {"func": function, "name": name}


def one(results, strategy="greedy"):
    return results["models"]["one"]["strategies"][strategy]


@reward(corpus={"acc": Ratio("right", "n", higher_is_better=True)})
def acc(completion: str):
    return 0.25, {"right": 1, "n": 1}


@reward(corpus={"err": Ratio("wrong", "n")})
def first_only(completion: str, prompt: str):
    return (1.0, {"wrong": 1, "n": 2}) if prompt.startswith("a") else 0.0


def test_a_corpus_metric_with_the_name_of_its_reward_leaves_the_reward_its_mean(checkpoints):
    results = quick({"one": checkpoints["one"]}, [acc])
    assert one(results)["reward/acc"]["value"] == 0.25 and one(results)["corpus/acc"]["value"] == 1.0
    assert "acc" not in one(results)
    assert metric(results, "reward/acc").label == "acc (reward)" and metric(results, "corpus/acc").label == "acc"
    found = make_evaluator([acc])(policy())
    assert (found["greedy/reward/acc"], found["greedy/corpus/acc"]) == (0.25, 1.0)


@pytest.mark.parametrize("name", ["length", "perplexity", "oracle", "exact_pass_at_k.4"])
def test_no_number_of_the_evaluation_is_replaced_by_one_of_a_user(checkpoints, name):
    corpus = {name: Ratio("half", "n")}

    @reward(corpus=corpus)
    def function(completion: str):
        return 17.0, {"half": 1, "n": 2}

    plain = quick({"one": checkpoints["one"]}, [named("other")], strategies=("greedy",))
    results = quick({"one": checkpoints["one"]}, [{"func": function, "name": name}], strategies=("greedy",))
    assert one(results)[f"reward/{name}"]["value"] == 17.0 and one(results)[f"corpus/{name}"]["value"] == 0.5
    assert {k: v for k, v in one(results).items() if not k.endswith(f"/{name}")} == {
        k: v for k, v in one(plain).items() if k != "other"
    }
    assert {k: v for k, v in results["metrics"].items() if not k.endswith(f"/{name}")} == {
        k: v for k, v in plain["metrics"].items() if k != "other"
    }


def test_names_of_a_suite_are_all_different_whatever_its_rewards_are_called():
    specs = [
        named(n, corpus={m: Ratio("a", "b")}) for n, m in (("x", "reward/x"), ("reward/x", "x"), ("corpus/x", "y"))
    ]
    with load_rewards(specs) as suite:
        names = Names.of(suite)
    every = [*names.rewards.values(), *names.corpus.values()]
    assert len(set(every)) == len(every) == 6


def test_the_share_that_a_reward_failed_on_is_no_other_rewards_number():
    specs = [named("length"), named("length/failed", 0.5)]
    with pytest.raises(
        RewardError, match=r"'length/failed' has the name of a number of the reward 'length': .*failed on"
    ):
        load_rewards(specs)
    with pytest.raises(RewardError, match="the reward 'length/failed' has the name"):  # one is only measured
        make_evaluator([specs[1]], [specs[0]])
    corpus = {"wer": Ratio("a", "b"), "wer/present": Ratio("a", "b")}
    with pytest.raises(RewardError, match=r"the corpus metric 'wer/present' has the name of a number .*'wer'"):
        load_rewards([named("x", corpus=corpus)])
    with load_rewards([named("x/failed"), named("y", corpus={"x": Ratio("a", "b")})]) as suite:  # no reward x
        assert Names.of(suite).rewards["x/failed"] == "reward/x/failed"


def test_rewards_named_like_parts_of_the_sharpening_study_are_reported_as_rewards(checkpoints, tmp_path):
    names = ("plain", "entropy", "unique", "top")
    results = quick(checkpoints, [named(n, 100.0) for n in names], strategies=("sample",), studies=("sharpening",))
    for model in checkpoints:
        at_one = results["studies"]["sharpening"]["models"][model]["1.0"]
        assert {at_one["quality"][name]["value"] for name in names} == {100.0}
        assert 0 < at_one["entropy"]["value"] < 20 and at_one["unique"]["value"] <= 1
    totals = {gap["metric"]: gap["total"]["value"] for gap in results["studies"]["sharpening"]["gaps"]}
    assert {totals[name] for name in names} == {0.0}
    assert len(next(iter(sections(results))).figures) == len(names) + 1  # with exact match


def test_a_reward_with_the_name_of_a_metric_is_shown_as_a_reward_by_the_study_of_exposure_bias(checkpoints):
    results = quick(checkpoints, [named("exact_match", 100.0)], strategies=("greedy",), studies=("exposure_bias",))
    (section,) = sections(results)
    captions = [table.caption.removesuffix(" of completions begun by k forced tokens") for table in section.tables]
    assert {"exact_match (reward)", "Exact match"} <= set(captions)
    found = results["studies"]["exposure_bias"]["models"]["one"]["continued"]["1"]["metrics"]
    assert (
        found["reward/exact_match"]["reference"]["value"] == 100.0 and found["exact_match"]["reference"]["value"] <= 1
    )


def test_results_say_of_every_metric_all_that_a_report_shows_of_it(checkpoints):
    results = quick(checkpoints, [acc], strategies=("greedy", "sample"))
    for name, said in results["metrics"].items():
        if name in BUILT_IN:
            assert said == BUILT_IN[name].as_json()
    assert results["metrics"]["exact_pass_at_k.4"]["label"] == "Exact pass@4"
    renamed = {**results["metrics"]["length"], "label": "Tokens", "higher_is_better": False, "table": "quality"}
    changed = {**results, "metrics": {**results["metrics"], "length": renamed}}
    (_, good), (_, shape) = generated(changed)
    assert "Tokens" in [info.label for info in good] and "Length" not in [info.label for info in shape]


def test_figures_of_two_metrics_have_two_files():
    assert file_names("coverage", ["a_b", "a-b", "a b-difference"]) == [
        "coverage-a-b",
        "coverage-a-b-2",
        "coverage-a-b-difference-2",
    ]


def test_a_metric_is_called_what_it_says_itself_and_not_what_another_task_calls_that_name(checkpoints):
    @reward(corpus={"wer": Ratio("edits", "words", higher_is_better=True, description="words that are right")})
    def words(completion: str):
        return 1.0, {"edits": 1, "words": 1}

    said = metric(quick({"one": checkpoints["one"]}, [words]), "wer")
    assert (said.label, said.better, said.description) == ("wer", True, "words that are right")
    with load_rewards(["phoneme_accuracy"]) as suite:
        assert [suite.corpus[name].label for name in ("per", "wer")] == ["PER", "WER"]


def test_the_primary_comparison_takes_a_bare_name_where_one_number_has_it(checkpoints):
    results = quick(checkpoints, [{"func": acc, "name": "length"}], primary="reward/length:greedy")
    assert results["primary"]["metric"] == "reward/length"
    results = quick(checkpoints, [named("a")], primary="reward/a:greedy")
    assert results["primary"]["metric"] == "a" and any(c["metric"] == "a" for c in results["comparisons"])
    with load_rewards([named("own/a")]) as suite:
        assert Names.of(suite).find("own/a", ["length"], "primary") == "reward/own/a"
    with load_rewards([acc]) as suite, pytest.raises(ConfigError, match="may be reward/acc or corpus/acc"):
        check_settings(ContrastSettings(primary="acc:greedy"), suite)


def test_a_completion_without_details_is_no_zero_in_a_ratio_and_the_report_says_how_many_are(
    checkpoints, tmp_path, capsys
):
    settings = dataclasses.replace(SETTINGS, resamples=20, strategies=("greedy",))
    with load_rewards([first_only]) as suite:
        options = {"settings": settings, "prompt_options": {}, "output_dir": tmp_path}
        results = contrast_and_report({"one": checkpoints["one"]}, ROWS, suite, **options)
    rows = results["rows"]
    cell = one(results)["err"]
    assert cell["value"] == 0.5 and cell["of"] == rows and 0 < cell["completions"] < rows
    said = f"of {cell['completions']} of {rows} completions"
    assert said in shown(metric(results, "err"), cell) and any(said in note for note in results["notes"])
    assert f"err of one under greedy (of {cell['completions']} of {rows} completions)" in capsys.readouterr().out
    assert said in (tmp_path / "report.md").read_text() and said in (tmp_path / "report.html").read_text()
    found = make_evaluator([first_only])(policy())
    assert found["greedy/err"] == 0.5 and 0 < found["greedy/err/present"] < 1


def test_a_mean_with_abstentions_says_of_how_many_it_is(checkpoints):
    def shy(completion: str, prompt: str) -> float | None:
        return 2.0 if prompt.startswith("a") else None

    cell = one(quick({"one": checkpoints["one"]}, [shy]))["shy"]
    assert cell["value"] == 2.0 and 0 < cell["completions"] < cell["of"]


@pytest.mark.parametrize("bad", [None, "0", "x", math.nan, math.inf, [1, 2], 10**400])
def test_a_statistic_that_is_no_finite_number_is_an_error_that_names_reward_and_key(checkpoints, bad):
    @reward(corpus={"err": Ratio("wrong", "n")})
    def broken(completion: str):
        return 1.0, {"wrong": bad, "n": 1}

    with pytest.raises(RewardError, match=r"reward 'broken' gave .* as 'wrong' in its details"):
        quick({"one": checkpoints["one"]}, [broken], strategies=("greedy",))


def test_the_corpus_metric_of_some_completions_is_that_of_these_alone():
    metric = Ratio("wrong", "n", reward="r")
    details = [{"wrong": 1, "n": 2}, {}, {"wrong": 5}, {"wrong": True, "n": 2}]  # (1 + 1) / (2 + 2)
    assert of_completions("err", metric, details) == (0.5, 2)
    value, present = of_completions("err", metric, [{}, {}])
    assert math.isnan(value) and present == 0
    assert statistics_of("err", metric, {"wrong": 1}) is None


def test_a_corpus_metric_whose_function_fails_is_named():
    metric = CorpusMetric(("a",), lambda sums: 1 / 0, reward="r")
    with pytest.raises(RewardError, match="corpus metric 'm' of reward 'r' raised ZeroDivisionError"):
        value_of("m", metric, {"a": 1.0})


def test_reward_score_says_of_how_many_completions_a_corpus_metric_is(tmp_path, capsys, monkeypatch):
    from rlseq.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(
        "from rlseq.scoring import Ratio, reward\n"
        "@reward(corpus={'err': Ratio('wrong', 'n')})\n"
        "def r(completion):\n"
        "    return (1.0, {'wrong': 0, 'n': 1}) if completion == '7' else 0.0\n"
    )
    records = [{"prompt": str(i), "completion": "7" if i < 4 else "no idea"} for i in range(10)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["reward", "score", "r.py:r", "--rollouts", "rollouts.jsonl"]) == 0
    assert "err = 0 of 4 of 10 completions" in capsys.readouterr().out
