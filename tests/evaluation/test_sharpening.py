"""Quality over entropy against the enumeration of every completion, and gaps against numpy's interpolation."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_contrast import letters
from test_data import word_tokenizer
from test_map import ROWS
from tiny import tiny_model
from toy import COMPLETIONS, LONGEST, PROMPT, REWARDS, STOP, table, toy_model

from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ConfigError
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast_and_report
from rlseq.evaluation.statistics import Statistic
from rlseq.evaluation.stats.bootstrap import resampled_counts
from rlseq.evaluation.stats.equal_entropy import Curve, mean_gap
from rlseq.evaluation.studies.sharpening import Sharpening
from rlseq.evaluation.studies.study import Context
from rlseq.scoring import load_rewards
from rlseq.types import Prompt

SETTINGS = ContrastSettings(
    strategies=("greedy",),
    max_new_tokens=LONGEST,
    samples_per_row=6,
    resamples=200,
    studies=("sharpening",),
    temperatures=(0.5, 1.0, 2.0),
)
PROMPTS = (PROMPT, (1, 0), (0, 0, 1))


def shy(completion_ids):
    """Abstains on completions of one token."""
    return float(completion_ids[0]) if len(completion_ids) > 1 else None


def measured(model, prompts, settings, rewards=(table, shy), references=None, done=None):
    with load_rewards(list(rewards)) as suite:
        given = {"tokenizer": None, "suite": suite, "completions": {}, "values": {}, "stop_ids": [STOP]}
        given |= {"references": references or [()] * len(prompts), "baseline": lambda: model, "settings": settings}
        progress = done.append if done is not None else lambda rows: None
        return Sharpening().measure(Context(model=model, prompts=prompts, progress=progress, **given))


def prompts_of(ids):
    return [Prompt(str(i), "", prompt_ids, {}) for i, prompt_ids in enumerate(ids)]


@torch.no_grad()
def exact(model, prompt_ids, temperature):
    """By completion its log-prob when every token is sampled from softmax(logits / T)."""
    found = {}
    for y in COMPLETIONS:
        ids = torch.tensor([[*prompt_ids, *y]])
        logprobs = (model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
        found[y] = logprobs.gather(1, torch.tensor(y)[:, None]).sum().item()
    return found


def test_a_row_holds_the_sums_over_its_samples():
    model, prompts, done = toy_model(1), prompts_of(PROMPTS), []
    references = [[(0, STOP), (STOP,)], [], [(1, 1)]]
    rows = measured(model, prompts, SETTINGS, references=references, done=done)
    assert sum(done) == len(prompts)
    options = {"num_samples": 6, "max_new_tokens": LONGEST, "seed": 0, "stop_ids": [STOP]}
    for temperature in SETTINGS.temperatures:
        name = f"sharpening/{temperature}"
        groups = sample(model, prompts, strategy=Sample(temperature=temperature), stream=name, **options)
        for row, prompt, group, right in zip(rows, prompts, groups, references, strict=True):
            sampled = [r.completion_ids for r in group]
            found = {(k.name, *k.params[1:]): v for k, v in row.items() if k.params[0] == str(temperature)}
            logprobs = exact(model, prompt.prompt_ids, temperature)
            expected = {("samples",): 6, ("entropy",): -sum(logprobs[y] for y in sampled)}
            expected |= {("truncated",): sum(y[-1] != STOP for y in sampled)}
            expected |= {("unique",): len(set(sampled)), ("top",): Counter(sampled).most_common(1)[0][1]}
            expected |= {("sum", "table"): sum(REWARDS[y] for y in sampled), ("count", "table"): 6}
            long = [y for y in sampled if len(y) > 1]
            expected |= {("sum", "shy"): sum(y[0] for y in long), ("count", "shy"): len(long)}
            if right:
                hits = sum(y in right for y in sampled)
                expected |= {("sum", "exact_match"): hits, ("count", "exact_match"): 6}
            assert found == pytest.approx(expected, abs=1e-4)


def test_the_samples_at_a_temperature_do_not_depend_on_which_others_are_measured():
    model, prompts = toy_model(1), prompts_of(PROMPTS)
    three = measured(model, prompts, SETTINGS)
    two = measured(model, prompts, dataclasses.replace(SETTINGS, temperatures=(2.0, 1.0)))
    for row, fewer in zip(three, two, strict=True):
        assert fewer == {key: value for key, value in row.items() if key.params[0] != "0.5"}


def test_one_sample_says_nothing_of_diversity():
    rows = measured(toy_model(1), prompts_of(PROMPTS), dataclasses.replace(SETTINGS, samples_per_row=1))
    block = Sharpening().results({"one": rows, "two": rows}, dataclasses.replace(SETTINGS, samples_per_row=1), {})
    assert set(block["models"]["one"]["1.0"]) == {"entropy", "truncated", "quality"}


@pytest.fixture(scope="module")
def sharpened():
    """A base, one that is it at half the temperature and nothing more, and one that is another model."""
    base, sharp, other = toy_model(7), toy_model(7), toy_model(1)
    for model, factor in ((base, 3), (sharp, 6), (other, 3)):
        model.lm_head.weight.data *= factor
    settings = dataclasses.replace(SETTINGS, samples_per_row=8, temperatures=(0.4, 0.5, 0.7, 1.0, 2.0))
    models = {"base": base, "sharp": sharp, "other": other}
    prompts = prompts_of([PROMPT] * 500)
    found = {name: measured(model, prompts, settings, rewards=[table]) for name, model in models.items()}
    return models, Sharpening().results(found, settings, {})


def test_entropy_and_quality_are_those_of_the_enumeration(sharpened):
    models, block = sharpened
    assert block["rows"] == 500 and block["rising"]
    for name, model in models.items():
        for temperature, point in block["models"][name].items():
            logprobs = exact(model, PROMPT, float(temperature))
            for cell, values in (
                (point["entropy"], {y: -value for y, value in logprobs.items()}),
                (point["quality"]["table"], REWARDS),
            ):
                mean = sum(math.exp(logprobs[y]) * values[y] for y in COMPLETIONS)
                variance = sum(math.exp(logprobs[y]) * (values[y] - mean) ** 2 for y in COMPLETIONS)
                error = math.sqrt(variance / 4000)
                assert abs(cell["value"] - mean) < 4 * error
                low, high = cell["ci95"]
                assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)


def exact_curve(model, temperatures):
    """Entropies and qualities at these temperatures, by enumeration, (2, K)."""
    found = [exact(model, PROMPT, temperature) for temperature in temperatures]
    entropies = [-sum(math.exp(v) * v for v in logprobs.values()) for logprobs in found]
    return np.array([entropies, [sum(math.exp(v) * REWARDS[y] for y, v in logprobs.items()) for logprobs in found]])


def mean_difference(base, other):
    """The mean of other less base over the entropies of both, with straight lines between points."""
    h = np.sort(np.concatenate([base[0], other[0]]))
    h = h[(h >= max(base[0][0], other[0][0])) & (h <= min(base[0][-1], other[0][-1]))]
    return np.trapezoid(np.interp(h, *other) - np.interp(h, *base), h) / (h[-1] - h[0])


def test_a_model_that_was_sharpened_alone_has_all_its_gain_from_sharpening(sharpened):
    models, block = sharpened
    sharp, other = block["gaps"]
    assert (sharp["a"], sharp["b"], other["b"]) == ("base", "sharp", "other")
    # at temperature 1 it is the base at 1/2, by construction
    means = [sum(math.exp(v) * REWARDS[y] for y, v in exact(models["base"], PROMPT, t).items()) for t in (1, 0.5)]
    gain = means[1] - means[0]
    for name in ("total", "sharpening"):
        low, high = sharp[name]["ci95"]
        assert low < gain < high
        assert abs(gain) > high - low  # else agreement would say nothing
    low, high = sharp["residual"]["ci95"]
    assert low < 0 < high
    # Over all entropies it is above 0: straight lines lie below a curve that bends downwards, and these two have their
    # points at different entropies.
    curves = [exact_curve(models[name], map(float, block["temperatures"])) for name in ("base", "sharp")]
    low, high = sharp["mean"]["ci95"]
    assert low < mean_difference(*curves) < high
    assert sharp["total"]["value"] == pytest.approx(sharp["sharpening"]["value"] + sharp["residual"]["value"])
    assert sharp["residual"] == sharp["by_temperature"]["1.0"]
    low, high = other["mean"]["ci95"]
    assert low > 0 or high < 0  # another model is on another curve


def rows_of(points, samples=4):
    """Rows of statistics from (R, K, 2) entropies and qualities a sample."""
    return [
        {
            Statistic("sharpening", name, (t, *quality_name)): value
            for t, (entropy, quality) in zip(("0.5", "1.0", "2.0"), row, strict=True)
            for (name, *quality_name), value in {
                ("samples",): samples,
                ("entropy",): entropy * samples,
                ("truncated",): 0.0,
                ("sum", "q"): quality * samples,
                ("count", "q"): samples,
            }.items()
        }
        for row in points
    ]


def results_of(base, other, **changes):
    found = {"base": rows_of(base), "other": rows_of(other)}
    return Sharpening().results(found, dataclasses.replace(SETTINGS, **changes), {})


def test_gaps_of_two_curves_by_hand():
    # base: (1, 0.8) (2, 0.6) (4, 0.2); other: (0, 1) (1.5, 0.9) (3, 0.5); one row
    block = results_of([[(1, 0.8), (2, 0.6), (4, 0.2)]], [[(0, 1.0), (1.5, 0.9), (3, 0.5)]])
    (gap,) = block["gaps"]
    values = {t: cell["value"] for t, cell in gap["by_temperature"].items()}
    assert math.isnan(values.pop("0.5"))  # entropy 0 is outside the base's
    assert values == pytest.approx({"1.0": 0.9 - 0.7, "2.0": 0.5 - 0.4})
    assert gap["total"]["value"] == pytest.approx(0.3)
    assert gap["sharpening"]["value"] == pytest.approx(0.1) and gap["residual"]["value"] == pytest.approx(0.2)
    assert gap["range"] == [1, 3]
    # other over [1, 1.5]: mean of 0.8667 and 0.9; over [1.5, 3]: 0.7. base over [1, 2]: 0.7; over [2, 3]: 0.5
    area = 0.5 * (1 - 0.1 / 1.5 + 0.9) / 2 + 1.5 * 0.7 - 0.7 - 0.5
    assert gap["mean"]["value"] == pytest.approx(area / 2)


def test_a_model_of_higher_entropy_has_no_gain_from_sharpening():
    block = results_of([[(1, 0.8), (2, 0.6), (4, 0.2)]], [[(1, 1.0), (3, 0.9), (4, 0.5)]])
    (gap,) = block["gaps"]
    assert not {"sharpening", "residual"} & set(gap)
    assert gap["by_temperature"]["1.0"]["value"] == pytest.approx(0.9 - 0.4)


def test_intervals_are_those_of_both_curves_recomputed_from_the_same_rows():
    rng = np.random.default_rng(0)
    rows = 25
    level = rng.normal(0, 0.4, (rows, 1))  # of the row: shared by models and temperatures
    noise = rng.normal(0, 0.3, (2, rows, 3))
    entropies = np.array([[1.0, 2.0, 3.5], [0.95, 1.5, 2.8]])[:, None] + level + noise
    qualities = np.array([[0.8, 0.6, 0.2], [0.9, 0.8, 0.4]])[:, None] + rng.normal(0, 0.2, (2, rows, 3)) - level / 4
    points = np.stack([entropies, qualities], -1)  # (2, R, 3, 2)
    (gap,) = results_of(*points, resamples=120)["gaps"]
    at_low, at_one, means, sharpening = [], [], [], []
    for counts in np.concatenate(list(resampled_counts(rows, seed=0, resamples=120))):
        resampled = np.repeat(points, counts.astype(int), axis=1).mean(1)  # (2, 3, 2)
        a, b = (curve[curve[:, 0].argsort()] for curve in resampled)

        def reached(x, a=a):
            return np.interp(x, *a.T, left=np.nan, right=np.nan)

        def difference(x, a=a, b=b):
            return np.interp(x, *b.T) - np.interp(x, *a.T)

        at_low.append(resampled[1, 0, 1] - reached(resampled[1, 0, 0]))
        at_one.append(resampled[1, 1, 1] - reached(resampled[1, 1, 0]))
        sharpening.append(reached(resampled[1, 1, 0]) - resampled[0, 1, 1])
        low, high = max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0])
        knots = [x for x in (*a[:, 0], *b[:, 0]) if low < x < high]
        means.append(quad(difference, low, high, points=knots)[0] / (high - low))
    for cell, values in (
        (gap["by_temperature"]["0.5"], at_low),
        (gap["by_temperature"]["1.0"], at_one),
        (gap["mean"], means),
        (gap["sharpening"], sharpening),
    ):
        defined = np.array(values)[np.isfinite(values)]
        assert cell["defined"] == len(defined) / 120
        if np.isfinite(cell["value"]):
            assert cell["ci95"] == pytest.approx(list(np.quantile(defined, [0.025, 0.975])), abs=1e-7)
        else:
            assert np.isnan(cell["ci95"]).all()
    assert 0 < gap["by_temperature"]["0.5"]["defined"] < 1  # the edge is in the range of some resamples only
    assert gap["by_temperature"]["1.0"]["defined"] == 1


def test_curves_are_joined_in_order_of_entropy_and_end_where_their_points_do():
    entropies, qualities = np.array([[3.0, 1.0, 2.0, 2.0]]), np.array([[0.0, 4.0, 1.0, 3.0]])
    curve = Curve.through(entropies, qualities)
    for x, expected in ((1, 4), (1.5, 2.5), (2.5, 1.5), (3, 0)):  # at 2 it steps from 1 to 3
        assert curve.at(np.array([float(x)])) == pytest.approx([expected])
    assert curve.area(np.array([2.5])) == pytest.approx([2.5 + 0.5 * 2.25])  # trapezoids of 1 and of 0.5
    assert np.isnan([*curve.at(np.array([0.9])), *curve.at(np.array([3.1])), *curve.area(np.array([3.1]))]).all()
    apart = Curve.through(entropies + 5, qualities)
    assert np.isnan(mean_gap(curve, apart)).all()
    assert mean_gap(curve, curve)[0] == 0
    line = [[(1, 0.8), (0.9, 0.6), (4, 0.2)]]
    assert not results_of(line, line)["rising"]


BAD = {
    "zero": ((0.0, 1.0), "holds 0; expected each to be a finite number above 0"),
    "not a number": ((math.nan, 1.0), "holds nan"),
    "twice": ((1.0, 1.0), "names one twice: 1 1"),
    "one": ((1.0,), "is 1; expected two or more with 1 among them"),
    "without 1": ((0.5, 0.7), "is 0.5 0.7; expected two or more with 1 among them"),
    "none": ((), "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_temperatures_that_cannot_work_are_refused_before_a_model_loads(case):
    temperatures, message = BAD[case]
    settings = dataclasses.replace(SETTINGS, temperatures=temperatures)
    with load_rewards([letters]) as suite, pytest.raises(ConfigError, match=f"--temperatures {message}"):
        check_settings(settings, suite)


def exact_match(completion):
    """A reward by the name of a metric."""
    return float(len(completion))


def test_the_report_shows_curves_gaps_and_diversity(tmp_path):
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("one", "two")}
    with load_rewards([letters, exact_match]) as suite:
        options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": tmp_path / "out", "title": "t"}
        contrast_and_report(models, ROWS, suite, **options)
    block = json.loads((tmp_path / "out" / "results.json").read_text())["studies"]["sharpening"]
    assert set(block["models"]["two"]["0.5"]["quality"]) == {"exact_match", "letters", "reward/exact_match"}
    assert {c["metric"] for c in block["comparisons"]} == {"entropy", "unique", "top", "truncated"}
    for c in block["comparisons"]:
        values = [block["models"][c[side]]["1.0"][c["metric"]]["value"] for side in "ab"]
        assert c["difference"] == pytest.approx(values[1] - values[0])
    for page in ("report.md", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "How much of the gain is sharpening?" in text and "Gap at equal entropy" in text
        assert "Diversity at T = 1" in text and "prefix" in text
    for name in ("letters", "exact-match", "reward-exact-match"):
        svg = (tmp_path / "out" / "plots" / f"sharpening-{name}.svg").read_text()
        assert all(f">{t}<" in svg for t in ("0.5", "1.0", "2.0"))
