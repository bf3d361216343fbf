"""Coverage, against every choice of k samples, every outcome of a small distribution, and enumerated probabilities."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy.special import comb
from test_contrast import ids_of, letters
from test_data import EOS, word_tokenizer
from test_map import saved
from toy import token_logprobs
from transformers import AutoModelForCausalLM

from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError, RlseqError
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Statistic
from rlseq.evaluation.stats.majority import win_chances
from rlseq.evaluation.studies import coverage
from rlseq.evaluation.studies.coverage import Sampled, row_statistics, sign_changes
from rlseq.evaluation.studies.coverage_report import in_words
from rlseq.evaluation.studies.table import STUDIES
from rlseq.scoring import load_rewards

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["", "A B C D E"]},  # the second is longer than the limit
    {"prompt": "d e f a = ", "references": []},
    {"prompt": "h = ", "references": ["D", ""]},
]
LONGEST, N, KS = 3, 8, (1, 2, 4, 8)
SETTINGS = ContrastSettings(
    strategies=("greedy",), max_new_tokens=LONGEST, resamples=200, studies=("coverage",), coverage_samples=N, seed=5
)


# the majority of k of n


def vote(texts):
    """The chance of each text to be the most frequent, ties shared."""
    counts = Counter(texts)
    first = [text for text, count in counts.items() if count == max(counts.values())]
    return {text: 1 / len(first) for text in first}


@pytest.mark.parametrize("votes", [(1,), (3,), (2, 1), (1, 1, 1, 1), (3, 2, 2, 1), (5, 3, 3, 1), (4, 4, 2, 2, 1)])
def test_majorities_are_those_of_every_choice(votes):
    ballots = [i for i, count in enumerate(votes) for _ in range(count)]
    for k in range(1, len(ballots) + 1):
        choices = list(itertools.combinations(ballots, k))
        wins = sum((Counter(vote(choice)) for choice in choices), Counter())
        expected = [wins[i] / len(choices) for i in range(len(votes))]
        assert win_chances(votes, k) == pytest.approx(expected, abs=1e-12)


def test_majorities_of_many_votes_are_probabilities():
    votes = np.array([90, 60, 40, 20, 10, *[3] * 6, *[1] * 18])  # 256
    for k in (1, 2):  # of two the vote is decided by one or, on a tie, by one at random
        assert win_chances(votes, k) == pytest.approx(votes / 256, abs=1e-12)
    for k in (64, 128, 255):
        chances = win_chances(votes, k)
        assert chances.sum() == pytest.approx(1, abs=1e-11)
        assert (chances > -1e-11).all() and chances[0] > 0.9
    assert win_chances((4, 4, 1), 9) == pytest.approx([0.5, 0.5, 0])


@pytest.mark.parametrize(("votes", "k"), [((2, 1), 0), ((2, 1), 4), ((2, 0), 1)])
def test_what_is_no_vote_is_refused(votes, k):
    with pytest.raises(RlseqError, match="win_chances got"):
        win_chances(votes, k)


# the statistics of a row


def worth(choice):
    """Of (text, right, value) samples, or None for no value: any right; best; whether there is one; the majority's."""
    values = [value for _, _, value in choice if value is not None]
    majority = Counter()
    for text, chance in vote([text for text, _, _ in choice]).items():
        mine = [(right, value) for t, right, value in choice if t == text]
        present = [value for _, value in mine if value is not None]
        majority["right"] += chance * sum(right for right, _ in mine) / len(mine)
        majority["sum"] += chance * sum(present) / len(mine)
        majority["count"] += chance * len(present) / len(mine)
    return {
        "pass": any(right for _, right, _ in choice),
        "best": max(values, default=0.0),
        "best_count": bool(values),
        "majority_right": majority["right"],
        "majority": majority["sum"],
        "majority_count": majority["count"],
    }


def key_of(name, k):
    of_reward = name in ("best", "best_count", "majority", "majority_count")
    return Statistic("coverage", name, (k, "r") if of_reward else (k,))


def statistics_of(samples, p=0.25):
    values = np.array([np.nan if value is None else value for _, _, value in samples])
    return row_statistics(Sampled([t for t, _, _ in samples], {"r": values}, [r for _, r, _ in samples], p))


A_ROW = [
    ("x", True, 1.0),
    ("y", False, -2.0),
    ("x", False, None),  # the text of the first under other tokens, on which the reward abstains
    ("z", False, None),
    ("y", False, -2.0),
    ("w", True, -0.5),
    ("z", False, None),
    ("x", True, 1.5),
]


@pytest.mark.parametrize("samples", [A_ROW, A_ROW[:6], [("z", False, None)] * 4], ids=["eight", "six", "no value"])
def test_statistics_are_means_over_every_choice(samples):
    found = statistics_of(samples)
    ks = [k for k in KS if k <= len(samples)]
    assert {key.params[0] for key in found if key.name == "best"} == set(ks)
    for k in ks:
        choices = [worth(choice) for choice in itertools.combinations(samples, k)]
        for name in choices[0]:
            expected = np.mean([choice[name] for choice in choices])
            assert found[key_of(name, k)] == pytest.approx(expected, abs=1e-12), (name, k)


SPACE = {("x", True, 1.0): 0.5, ("y", False, -0.5): 0.3, ("z", False, None): 0.2}


def outcomes(k):
    """Every k independent samples, with their chance."""
    for sampled in itertools.product(SPACE, repeat=k):
        yield sampled, math.prod(SPACE[outcome] for outcome in sampled)


def test_estimates_are_unbiased_and_their_variance_is_known():
    n, p = 4, 0.5
    every = [(statistics_of(sampled, p), chance) for sampled, chance in outcomes(n)]
    for k in (1, 2, 4):
        for name in worth(next(iter(outcomes(1)))[0]):
            estimated = sum(chance * found[key_of(name, k)] for found, chance in every)
            truth = sum(chance * worth(sampled)[name] for sampled, chance in outcomes(k))
            assert estimated == pytest.approx(truth, abs=1e-12), (name, k)
        exact = 1 - (1 - p) ** k
        spread = sum(chance * (found[key_of("pass", k)] - exact) ** 2 for found, chance in every)
        assert every[0][0][key_of("exact", k)] == pytest.approx(exact, abs=1e-12)
        assert every[0][0][key_of("variance", k)] == pytest.approx(spread, abs=1e-12)
    assert every[0][0][key_of("exact", 256)] == 1 - 0.5**256


# a whole evaluation


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"))


def run(models, rows=ROWS, rewards=(letters,), **changes):
    with load_rewards(list(rewards)) as suite:
        return contrast(models, rows, suite, settings=dataclasses.replace(SETTINGS, **changes), quiet=True)


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": out, "title": "t"}
    with load_rewards([letters]) as suite:
        contrast_and_report(checkpoints, ROWS, suite, **options)
    return json.loads((out / "results.json").read_text()), out


def samples_of(path):
    """Of each row the (text, right, value) of its samples, sampled without the study."""
    tokenizer = word_tokenizer()
    model, prompts = AutoModelForCausalLM.from_pretrained(path), build_prompts(ROWS, tokenizer)
    settings = {"num_samples": N, "max_new_tokens": LONGEST, "strategy": Sample(), "seed": 5, "stream": "coverage"}
    groups = sample(model, prompts, stop_ids=[EOS], tokenizer=tokenizer, **settings)
    for row, group in zip(ROWS, groups, strict=True):
        right = [(*ids_of(reference), EOS) for reference in row["references"]]
        yield row, [(r.text.strip(), r.completion_ids in right, letters(r.text)) for r in group]


@pytest.mark.parametrize("name", ["one", "two"])
def test_curves_are_means_over_every_choice_of_the_samples(measured, checkpoints, name):
    block = measured[0]["studies"]["coverage"]
    rows = list(samples_of(checkpoints[name]))
    assert any(right for _, group in rows for _, right, _ in group)
    assert any(value is None for _, group in rows for _, _, value in group)
    assert (block["samples"], block["rows"]) == (N, 4)
    found = block["models"][name]
    for k in KS:
        means = []
        for row, group in rows:
            choices = [worth(choice) for choice in itertools.combinations(group, k)]
            means.append(
                {key: np.mean([c[key] for c in choices]) for key in choices[0]} | {"judged": row["references"]}
            )
        judged = [m for m in means if m["judged"]]
        expected = {
            "pass_at_k": np.mean([m["pass"] for m in judged]),
            "majority.exact_match": np.mean([m["majority_right"] for m in judged]),
            "best_of_k.letters": sum(m["best"] for m in means) / sum(m["best_count"] for m in means),
            "majority.letters": sum(m["majority"] for m in means) / sum(m["majority_count"] for m in means),
        }
        for curve, value in expected.items():
            cell = found[curve][str(k)]
            assert cell["value"] == pytest.approx(value, abs=1e-12), (curve, k)
            low, high = cell["ci95"]
            assert low - 1e-12 <= cell["value"] <= high + 1e-12


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_exact_curve_is_that_of_enumerated_probabilities(measured, checkpoints, name):
    block = measured[0]["studies"]["coverage"]
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name])
    chances = []
    for row in ROWS:
        fitting = [(*ids_of(r), EOS) for r in row["references"] if len(r.split()) < LONGEST]
        logprobs = [token_logprobs(model, ids_of(row["prompt"]), ids).double().sum().item() for ids in fitting]
        chances += [sum(map(math.exp, logprobs))] if fitting else []
    curve = block["models"][name]["exact_pass_at_k"]
    assert list(curve) == [str(2**i) for i in range(9)]
    for k, cell in curve.items():
        assert cell["value"] == pytest.approx(np.mean([1 - (1 - p) ** int(k) for p in chances]), rel=1e-5)
    agreement = block["agreement"][name]
    for k in KS:
        sampled, exact = (block["models"][name][c][str(k)]["value"] for c in ("pass_at_k", "exact_pass_at_k"))
        assert agreement["differences"][str(k)]["difference"] == pytest.approx(sampled - exact)
        variances = [  # by the definition of the estimator: c right ones of N, and choices of k without one
            sum(
                comb(N, c) * p**c * (1 - p) ** (N - c) * (1 - comb(N - c, k) / comb(N, k) - 1 + (1 - p) ** k) ** 2
                for c in range(N + 1)
            )
            for p in chances
        ]
        error = math.sqrt(sum(variances)) / len(chances)
        assert agreement["differences"][str(k)]["standard_error"] == pytest.approx(error, rel=1e-4)
    assert agreement["agrees"]


def test_differences_are_b_less_a_and_of_equal_models_0(measured, checkpoints):
    block = measured[0]["studies"]["coverage"]
    one, two = block["models"].values()
    assert {c["curve"] for c in block["comparisons"]} == set(one)
    for c in block["comparisons"]:
        assert (c["a"], c["b"]) == ("one", "two")
        for k, d in c["differences"].items():
            assert d["difference"] == pytest.approx(two[c["curve"]][k]["value"] - one[c["curve"]][k]["value"])
            low, high = d["ci95"]
            assert low <= high
        assert c["sign_changes"] == sign_changes(c["differences"])
    twice = run({"x": checkpoints["one"], "y": checkpoints["one"]})["studies"]["coverage"]
    assert twice["models"]["x"] == twice["models"]["y"] == one
    for c in twice["comparisons"]:
        assert all(d == {"difference": 0, "ci95": [0, 0]} for d in c["differences"].values())
        assert c["sign_changes"] == []


def test_what_is_held_at_once_changes_no_number(measured, checkpoints, monkeypatch):
    monkeypatch.setattr(coverage, "_HELD_TOKENS", 1)
    again = run({"one": checkpoints["one"]}, eval_batch_size=2)["studies"]["coverage"]["models"]["one"]
    for curve, cells in measured[0]["studies"]["coverage"]["models"]["one"].items():
        for k, cell in cells.items():
            assert again[curve][k]["value"] == pytest.approx(cell["value"], rel=1e-5)


def test_the_study_runs_on_the_first_rows_and_to_the_largest_power_of_two(checkpoints):
    block = run(checkpoints, study_rows=1, coverage_samples=6)["studies"]["coverage"]
    assert block["rows"] == 1
    assert list(block["models"]["one"]["pass_at_k"]) == ["1", "2", "4"]
    assert block["models"]["one"]["exact_pass_at_k"]["8"]["value"] > 0


def never(completion):
    """A reward that always abstains."""


def test_without_references_there_is_no_success_and_without_values_no_reward(checkpoints, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    with load_rewards([letters, never]) as suite:
        options = {"prompt_options": {}, "output_dir": tmp_path, "title": "t"}
        results = contrast_and_report({"one": checkpoints["one"]}, rows, suite, settings=SETTINGS, **options)
    block = results["studies"]["coverage"]
    assert set(block["models"]["one"]) == {
        f"{kind}.{reward}" for kind in ("best_of_k", "majority") for reward in ("letters", "never")
    }
    assert block["agreement"] == {} and block["comparisons"] == []
    assert block["models"]["one"]["best_of_k.never"]["4"] == {"value": None, "ci95": [None, None]}
    text = (tmp_path / "report.md").read_text()
    section = text[text.index("## Coverage") :]
    assert "best of k | n/a | n/a" in section and "differences" not in section


def test_the_report_shows_curves_differences_and_the_check(measured):
    results, out = measured
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    section = text[text.index("## Coverage: what k samples hold") :]
    value = results["studies"]["coverage"]["models"]["two"]["pass_at_k"]["8"]["value"]
    line = next(line for line in section.split("\n") if line.startswith("| two | at least one right |"))
    assert f"| {100 * value:.1f}% (" in line
    assert "| two − one | at least one right, exact |" in section and "Sampled − exact" in section
    assert "Caveat: at least one right and best of k know the answer" in section
    figures = ("coverage-exact-match", "coverage-exact-match-difference", "coverage-letters-difference")
    assert all((out / "plots" / f"{name}.svg").is_file() for name in figures)
    assert '<section id="coverage-sampled">' in page and "Exact match: difference to one" in page


def test_a_fault_of_sampling_is_told_from_chance():
    rows = [row_statistics(Sampled(["x"] * 8, {}, [True] * 6 + [False] * 2, p)) for p in [0.75] * 50]
    block = STUDIES["coverage"].results({"m": rows}, SETTINGS, {})
    assert block["agreement"]["m"]["agrees"]
    faulty = [row_statistics(Sampled(["x"] * 8, {}, [True] * 6 + [False] * 2, 0.6)) for _ in range(50)]
    # 0.15 at k = 1, where √(0.6 · 0.4 / 8 / 50) = 0.0245
    found = STUDIES["coverage"].results({"m": faulty}, SETTINGS, {})["agreement"]["m"]
    assert not found["agrees"]
    assert found["differences"]["1"] == pytest.approx({"difference": 0.15, "standard_error": 0.024495}, rel=1e-4)


def test_signs_are_told_in_words():
    def of(*triples):
        found = {str(2**i): {"difference": d, "ci95": [low, high]} for i, (d, low, high) in enumerate(triples)}
        return {"differences": found, "sign_changes": sign_changes(found)}

    crossing = of((0.2, 0.1, 0.3), (0.1, -0.1, 0.2), (0.0, -0.1, 0.1), (-0.1, -0.2, 0.1), (-0.2, -0.3, -0.1))
    assert crossing["sign_changes"] == [[2, 8]]  # at k = 4 there is no sign
    assert in_words(crossing) == (
        "above 0, interval included, at k = 1; below 0, interval included, at k = 16; changes sign between k = 2 and 8"
    )
    assert in_words(of((math.nan, None, None), (0.1, 0.0, 0.2))) == "no interval is clear of 0; changes sign nowhere"


@pytest.mark.parametrize("samples", [1, 257])
def test_numbers_of_samples_that_cannot_work_are_refused_before_a_model_loads(samples):
    settings = dataclasses.replace(SETTINGS, coverage_samples=samples)
    with load_rewards([letters]) as suite, pytest.raises(ConfigError, match=f"is {samples}; expected 2 to 256"):
        check_settings(settings, suite)
