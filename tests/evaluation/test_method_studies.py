"""What studies say of methods with several seeds, and what they give of a checkpoint against itself."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from test_contrast import letters
from test_data import word_tokenizer
from test_map import ROWS
from test_sharpening import SETTINGS, rows_of
from tiny import tiny_model

from rlseq.evaluation.run import contrast_and_report
from rlseq.evaluation.statistics import Statistic, rows_from_json
from rlseq.evaluation.stats.estimators import MeanOf
from rlseq.evaluation.stats.seeds import crossed_bootstrap_many, difference, resample_pairs
from rlseq.evaluation.studies.kl import KL
from rlseq.evaluation.studies.ranking import Ranking
from rlseq.evaluation.studies.sharpening import Sharpening
from rlseq.scoring import load_rewards

MANY = dataclasses.replace(SETTINGS, resamples=20_000)
PERMUTED = [(1, 2, 3, 4), (1, 3, 2, 4), (4, 2, 1, 3), (4, 3, 2, 1), (2, 1, 4, 3)] * 2  # rewards in order of log-prob


def students(values, cell, tolerance):
    """Where rows are all alike, the interval over seeds and rows is Student's over seeds."""
    values = np.asarray(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, values.mean(), values.std(ddof=1) / len(values) ** 0.5)
    assert cell["ci95"] == pytest.approx([low, high], abs=tolerance * (high - low))
    return values.mean()


def ranked(rewards, right=(0.0, 1.0, 0.0, 1.0)):
    """Eight equal rows of four completions in rising order of log-prob."""
    values = {'logprob["s"]': [-4.0, -3.0, -2.0, -1.0], 'reward["s", "r"]': rewards, 'right["s"]': right}
    return rows_from_json([{text: list(found) for text, found in values.items()}] * 8, "ranking")


def test_ranking_of_a_method_is_the_mean_over_seeds_with_students_interval():
    found = {"base": ranked((2, 1, 3, 4)), **{f"rl#{i}": ranked(p) for i, p in enumerate(PERMUTED)}}
    block = Ranking().results(found, MANY, {})
    rhos = [scipy.stats.spearmanr((1, 2, 3, 4), p).statistic for p in PERMUTED]  # 1, 0.8, −0.4, −1, 0.6
    cell = block["methods"]["rl"]["s"]["rewards"]["r"]["spearman_within"]
    assert cell["per_seed"] == pytest.approx(rhos)
    assert cell["value"] == pytest.approx(students(rhos, cell, 0.1))  # 1,000 resamples
    # By hand: of (1, 0) pairs of completions the right ones are above in 1 of 2 and in 2 of 2: AUROC 3 / 4.
    assert block["methods"]["rl"]["s"]["auroc"]["value"] == 0.75
    (of_method,) = [c for c in block["comparisons"] if c["b"] == "rl" and c["metric"] == "spearman_within"]
    assert (of_method["a"], of_method["claim"], of_method["seeds_a"], of_method["seeds_b"]) == ("base", "method", 1, 10)
    assert of_method["difference"] == pytest.approx(students(np.subtract(rhos, 0.8), of_method, 0.1))
    (single,) = [c for c in block["comparisons"] if c["b"] == "rl#2" and c["metric"] == "spearman_within"]
    assert single["difference"] == pytest.approx(-0.4 - 0.8) and single["ci95"] == pytest.approx([-1.2, -1.2])
    assert "claim" not in single


def test_differences_of_ranking_are_resampled_on_the_same_rows():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(12, 4))
    rows = [row for r in rewards for row in ranked(r)[:1]]
    other = [row for r in -rewards for row in ranked(r)[:1]]
    block = Ranking().results({"a": rows, "b": other, "again": rows}, SETTINGS, {})
    values = block["models"]["a"]["s"]["rewards"]["r"]["spearman_within"]
    for c in block["comparisons"]:
        if c["b"] == "again":
            assert (c["difference"], c["ci95"]) == (0, [0, 0])
        elif c["metric"] == "spearman_within":  # ρ of the negated rewards is −ρ in every resample
            low, high = values["ci95"]
            assert (c["difference"], c["ci95"]) == (-2 * values["value"], pytest.approx([-2 * high, -2 * low]))
    assert {(c["b"], c["metric"]) for c in block["comparisons"]} >= {("b", "spearman_within"), ("b", "auroc")}


def test_the_divergence_of_a_method_is_the_mean_over_seeds_with_students_interval():
    kls = np.random.default_rng(1).uniform(0.5, 2.0, 10)

    def rows(kl):
        sums = {"kl": 2 * kl, "plain": 2 * kl, "tokens": 6.0, "samples": 2.0, "one": 1.0}
        sums |= {f"{n}_{m}": kl for n in ("plain", "kl") for m in ("mean", "square")}
        keys = [(Statistic("kl", n, (d,)), value) for d in ("forward", "reverse") for n, value in sums.items()]
        return [dict(keys)] * 4

    base = [{Statistic("kl", "itself"): 1.0}] * 4
    found = {"base": base, **{f"rl#{i}": rows(kl) for i, kl in enumerate(kls)}, "x#1": base, "x#2": rows(1.0)}
    block = KL().results(found, MANY, {})
    assert set(block["methods"]) == {"rl"}  # a seed of x is the first model itself
    for name, scale in (("kl", 1), ("kl_per_token", 1 / 3)):
        cell = block["methods"]["rl"]["forward"][name]
        assert cell["per_seed"] == pytest.approx(kls * scale)
        assert cell["value"] == pytest.approx(students(kls * scale, cell, 0.05))


def test_the_gap_of_a_method_at_equal_entropy_is_the_mean_over_seeds_with_students_interval():
    base = [[(1, 0.8), (2, 0.6), (4, 0.2)]] * 6
    lifts = np.random.default_rng(2).normal(0.1, 0.1, 10)
    # every seed lies a constant above the base's line 1 − h / 5, at other entropies
    seeds = {f"rl#{i}": rows_of([[(h, 1 - h / 5 + lift) for h in (1.0, 1.5, 3.0)]] * 6) for i, lift in enumerate(lifts)}
    block = Sharpening().results({"base": rows_of(base), **seeds}, MANY, {})
    *single, of_method = block["gaps"]
    assert [gap["b"] for gap in single] == list(seeds) and not any("claim" in gap for gap in single)
    assert (of_method["a"], of_method["b"], of_method["claim"], of_method["seeds_b"]) == ("base", "rl", "method", 10)
    for cell in (of_method["mean"], of_method["residual"], of_method["by_temperature"]["0.5"]):
        assert cell["value"] == pytest.approx(students(lifts, cell, 0.05)) and cell["defined"] == 1
    assert of_method["range"] == [1, 3]
    # Cooled from 2 to 1.5 nats the base gains 0.1, whatever the seed.
    assert of_method["sharpening"]["value"] == pytest.approx(0.1)
    assert of_method["sharpening"]["ci95"] == pytest.approx([0.1, 0.1])
    # With two seeds of the base, all gaps are of methods; equal seeds of it add nothing.
    block = Sharpening().results({"base#1": rows_of(base), "base#2": rows_of(base), **seeds}, MANY, {})
    (gap,) = block["gaps"]
    assert (gap["a"], gap["b"], gap["seeds_a"], gap["seeds_b"]) == ("base", "rl", 2, 10)
    assert gap["residual"]["ci95"] == pytest.approx(of_method["residual"]["ci95"])


def test_a_gap_that_is_a_difference_of_seeds_is_resampled_as_one():
    rng = np.random.default_rng(3)
    a, b = ([np.full(5, value) for value in rng.normal(size=n)] for n in (3, 4))
    both = crossed_bootstrap_many({"a": ("a", a, MeanOf()), "b": ("b", b, MeanOf())}, seed=4, resamples=500)
    by_pair = np.array([[[y[0] - x[0] for y in b] for x in a]] * 500)  # (N, S_a, S_b)
    found = resample_pairs("a", "b", by_pair, seed=4)
    assert found == pytest.approx(both["b"].resampled - both["a"].resampled)
    assert list(np.quantile(found, [0.025, 0.975])) == pytest.approx(list(difference(both["a"], both["b"]).ci95))


def test_curves_have_no_gap_to_themselves_in_any_resample():
    rng = np.random.default_rng(5)
    points = np.stack([rng.choice([0.0, 0.7, 1.1, 2.3], (9, 3)), rng.normal(size=(9, 3))], -1)  # with equal entropies
    found = {name: rows_of(points) for name in ("a", "b")}
    (gap,) = Sharpening().results(found, dataclasses.replace(SETTINGS, resamples=2000), {})["gaps"]
    assert not {"sharpening", "residual"} & set(gap)
    for cell in (*gap["by_temperature"].values(), gap["mean"], gap["total"]):
        assert (cell["value"], cell["ci95"], cell["defined"]) == (0, [0, 0], 1)


def test_the_report_tells_of_methods_in_every_study(tmp_path):
    models = {}
    for seed, name in enumerate(("base", "rl#1", "rl#2")):
        models[name] = str(tmp_path / f"model{seed}")
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(models[name])
        word_tokenizer().save_pretrained(models[name])
    settings = dataclasses.replace(
        SETTINGS, strategies=("sample",), studies=("ranking", "kl", "sharpening"), max_new_tokens=3, resamples=50
    )
    with load_rewards([letters]) as suite:
        options = {"settings": settings, "prompt_options": {}, "output_dir": tmp_path / "out", "title": "t"}
        contrast_and_report(models, ROWS, suite, **options)
    studies = json.loads((tmp_path / "out" / "results.json").read_text())["studies"]
    for name in ("ranking", "kl"):
        assert set(studies[name]["methods"]) == {"rl"}
    assert [gap["b"] for gap in studies["sharpening"]["gaps"]][::2] == ["rl#1", "rl#2", "rl"]
    report = (tmp_path / "out" / "report.md").read_text()
    for anchor, said in (
        ("Does likelihood know quality?", ["| rl: mean of 2 seeds | sample |", "| rl − base | sample |"]),
        ("KL divergence to base", ["| rl: mean of 2 seeds | KL(rl ‖ base) |"]),
        ("How much of the gain is sharpening?", ["| rl: mean of 2 seeds |", "Of a method: the mean over its seeds"]),
    ):
        section = report.split(anchor)[1].split("\n## ")[0]
        assert all(text in section for text in said), anchor
    ranking = report.split("Does likelihood know quality?")[1].split("\n## ")[0]
    assert "rl#1 − base" not in ranking  # of single seeds in results.json alone
