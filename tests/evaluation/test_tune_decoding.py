"""Settings tuned on rows of their own: the best is known by hand, and it is measured as if written so."""

import dataclasses
import json
import math

import pytest
from test_data import VOCABULARY, word_tokenizer
from tiny import tiny_model

from rlseq.cli.evaluate import evaluate
from rlseq.config.arguments import DataArguments
from rlseq.engine.strategies import BestOf, Sample, Sweep, parse_strategy
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.measure import checkpoint
from rlseq.evaluation.measure import decode as measure_decode
from rlseq.evaluation.results.compare import join
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast, contrast_and_report
from rlseq.evaluation.tune_decoding import joined_tuning
from rlseq.scoring import load_rewards

SWEEP = "sample:temperature=0.25/1.0/4.0"
COLD, PLAIN, HOT = "sample:temperature=0.25", "sample", "sample:temperature=4.0"
ROWS = [{"prompt": f"{a} {b} = ", "references": ["A"]} for a in "abcd" for b in "efgh"]
CHOICE = [{"prompt": f"{b} {a} = ", "references": ["A"]} for a in "abcd" for b in "efgh"] * 3
SETTINGS = ContrastSettings(
    strategies=("greedy", SWEEP), max_new_tokens=1, resamples=50, tune_split="validation", tune_rows=None
)


def likes_a(completion):
    return {"A": 1.0, "B": -1.0}.get(completion, 0.0)


def expected(logits, temperature):
    """P(A) − P(B) where every token but these has the logit 0."""
    weights = {token: math.exp(logits.get(token, 0.0) / temperature) for token in VOCABULARY}
    return (weights["A"] - weights["B"]) / sum(weights.values())


# By model the logits of two tokens: it has no others, whatever the prompt.
LOGITS = {"hot": {"B": 3.0}, "cold": {"A": 3.0}, "weak": {"A": 1.0}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, logits in LOGITS.items():
        model = tiny_model("gpt2", tie_word_embeddings=False)
        model.transformer.ln_f.weight.data.zero_()  # the last hidden state is then the bias, e_0
        model.transformer.ln_f.bias.data.zero_()[0] = 1.0
        model.lm_head.weight.data.zero_()
        for token, logit in logits.items():
            model.lm_head.weight.data[VOCABULARY.index(token), 0] = logit
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in LOGITS}


def measured(models, *, settings=SETTINGS, rows=ROWS, tuning_rows=CHOICE, output_dir=None):
    with load_rewards([likes_a]) as suite:
        options = {"settings": settings, "quiet": True, "output_dir": output_dir, "tuning_rows": tuning_rows}
        return contrast(models, rows, suite, **options)


def test_alternatives_make_a_sweep_of_every_combination():
    sweep = parse_strategy("sample: temperature=0.5/1, top_k=3")
    assert isinstance(sweep, Sweep) and sweep.is_stochastic
    assert sweep.spec == "sample:temperature=0.5/1.0,top_k=3"
    assert sweep.members == (Sample(0.5, 3), Sample(1.0, 3))
    both = parse_strategy("best_of:n=2/4,by=loud,temperature=1/2")
    assert both.members == tuple(BestOf(n, "loud", t) for n in (2, 4) for t in (1.0, 2.0)) and not both.is_stochastic
    assert parse_strategy(both.spec) == both
    assert parse_strategy("sample:temperature=1").members == (Sample(),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample:temperature=0.5/x", "temperature is 'x'; expected a number"),
        ("sample:temperature=0.5/0", "temperature is 0.0; expected a number above 0"),
        ("sample:temperature=0.5/0.5", "an alternative twice"),
        ("beam:width=2/2.5", "width is '2.5'; expected a whole number"),
    ],
)
def test_alternatives_that_cannot_work_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_strategy(text)


def test_each_model_gets_its_own_best_and_is_measured_as_if_that_were_written(models, tmp_path):
    pair = {"base": models["hot"], "rl": models["cold"]}
    for name, best in (("hot", 4.0), ("cold", 0.25)):  # by hand, which of them is the best
        assert max((0.25, 1.0, 4.0), key=lambda t: expected(LOGITS[name], t)) == best
    with load_rewards([likes_a]) as suite:
        options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": tmp_path, "tuning_rows": CHOICE}
        results = contrast_and_report(pair, ROWS, suite, **options)
    block = results["tuned"]
    assert (block["rows"], block["split"]) == (len(CHOICE), "validation")
    entry = block["strategies"][SWEEP]
    assert (entry["metric"], entry["higher_is_better"]) == ("likes_a", True)
    assert {name: m["strategy"] for name, m in entry["models"].items()} == {"base": HOT, "rl": COLD}
    # The values are those of an evaluation of the alternatives, on the tuning rows.
    plain = measured(pair, settings=dataclasses.replace(SETTINGS, strategies=(COLD, PLAIN, HOT)), rows=CHOICE)
    for name, model in pair.items():
        strategies = plain["models"][name]["strategies"]
        assert entry["models"][name]["values"] == {s: strategies[s]["likes_a"]["value"] for s in (COLD, PLAIN, HOT)}
        which = next(key for key, path in models.items() if path == model)
        for temperature, s in ((0.25, COLD), (1.0, PLAIN), (4.0, HOT)):  # 192 samples in [−1, 1]
            assert entry["models"][name]["values"][s] == pytest.approx(expected(LOGITS[which], temperature), abs=0.2)
    # What is evaluated is what the strategy alone gives, in its place of the list.
    for name, best in (("base", HOT), ("rl", COLD)):
        alone = measured({name: pair[name]}, settings=dataclasses.replace(SETTINGS, strategies=("greedy", best)))
        assert results["models"][name]["strategies"][SWEEP] == alone["models"][name]["strategies"][best]
    compared = {(c["strategy"], c["metric"]): c["difference"] for c in results["comparisons"]}
    values = [results["models"][name]["strategies"][SWEEP]["likes_a"]["value"] for name in pair]
    assert compared[SWEEP, "likes_a"] == pytest.approx(values[1] - values[0])
    assert results["spec"]["settings"]["tune_split"] == "validation"
    assert results["spec"]["tuning"]["rows"] == len(CHOICE)
    (note,) = [note for note in results["notes"] if "is tuned" in note]
    assert f"on {len(CHOICE)} rows of validation" in note and f"rl takes {COLD} (" in note
    report = (tmp_path / "report.md").read_text()
    assert f"{SWEEP} (tuned)" in report and note.replace("_", r"\_") in report


def test_seeds_of_a_method_share_what_is_best_in_their_mean(models):
    # by hand: weak alone prefers the low temperature, and the mean with hot the high one
    means = {t: (expected(LOGITS["hot"], t) + expected(LOGITS["weak"], t)) / 2 for t in (0.25, 1.0, 4.0)}
    assert max(means, key=means.get) == 4.0 and expected(LOGITS["weak"], 0.25) > 0.5
    results = measured({"base": models["weak"], "rl#1": models["hot"], "rl#2": models["weak"]})
    best = {name: m["strategy"] for name, m in results["tuned"]["strategies"][SWEEP]["models"].items()}
    assert best == {"base": COLD, "rl#1": HOT, "rl#2": HOT}


def test_the_primary_metric_of_the_sweep_decides_and_its_direction_counts(models):
    worse = dataclasses.replace(SETTINGS, primary=f"truncated:{SWEEP}")  # lower is better: fewest without a stop
    entry = measured({"base": models["cold"]}, settings=worse)["tuned"]["strategies"][SWEEP]
    assert (entry["metric"], entry["higher_is_better"]) == ("truncated", False)
    values = entry["models"]["base"]["values"]
    assert values[COLD] == 1.0 and values[HOT] < 1.0  # a stop has the chance 1 / (e^(3/T) + |V| − 1)
    assert entry["models"]["base"]["strategy"] == min(values, key=values.get) != COLD
    other = dataclasses.replace(SETTINGS, primary="truncated:greedy")
    assert measured({"base": models["cold"]}, settings=other)["tuned"]["strategies"][SWEEP]["metric"] == "likes_a"


def test_it_goes_on_from_what_is_measured_and_says_so(models, tmp_path, monkeypatch):
    pair = {"base": models["hot"], "rl": models["cold"]}
    undisturbed = measured(pair, output_dir=tmp_path / "undisturbed")
    calls = []
    decode = measure_decode.decode

    def stops(*arguments, strategy, **options):
        calls.append(strategy.spec)
        if len(calls) == 3 + 3 + 2:  # after both tunings and the first strategy evaluated
            raise KeyboardInterrupt
        return decode(*arguments, strategy=strategy, **options)

    monkeypatch.setattr(measure_decode, "decode", stops)
    with pytest.raises(KeyboardInterrupt):
        measured(pair, output_dir=tmp_path / "killed")
    assert calls == [COLD, PLAIN, HOT] * 2 + ["greedy", HOT]
    calls[:] = [None] * 100
    assert measured(pair, output_dir=tmp_path / "killed") == undisturbed
    assert calls[100:] == [HOT, "greedy", COLD]
    for file in ("results.json", "per_example.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_evaluations_are_joined_if_they_were_tuned_on_the_same_rows(models, tmp_path):
    measured({"base": models["hot"]}, output_dir=tmp_path / "a")
    measured({"rl": models["cold"]}, output_dir=tmp_path / "c")
    together = measured({"base": models["hot"], "rl": models["cold"]}, output_dir=tmp_path / "together")
    joined = join([str(tmp_path / "a"), str(tmp_path / "c")], tmp_path / "joined", reward_funcs=[likes_a])
    assert joined == together and "tuned" in joined
    measured({"rl": models["cold"]}, output_dir=tmp_path / "b", tuning_rows=CHOICE[:30])
    with pytest.raises(ConfigError, match=r"tuning\.rows is 48 in the first and 30 in the second"):
        join([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "joined")


def test_joined_seeds_that_would_be_tuned_otherwise_together_are_refused():
    def alone(values, best):
        models = {"rl": {"strategy": best, "values": values}}
        strategies = {SWEEP: {"metric": "likes_a", "higher_is_better": True, "models": models}}
        return {"rows": 2, "split": "validation", "strategies": strategies}

    one, two = alone({COLD: 0.2, HOT: 0.1}, COLD), alone({COLD: 0.1, HOT: 0.9}, HOT)
    block = joined_tuning({"base": (one, "rl"), "rl": (two, "rl")})  # two methods: each keeps its own
    assert {name: m["strategy"] for name, m in block["strategies"][SWEEP]["models"].items()} == {
        "base": COLD,
        "rl": HOT,
    }
    block = joined_tuning({"rl#1": (two, "rl"), "rl#2": (two, "rl")})
    assert {m["strategy"] for m in block["strategies"][SWEEP]["models"].values()} == {HOT}
    with pytest.raises(ConfigError, match=r"rl#1 was evaluated under sample:temperature=0.25.*together take"):
        joined_tuning({"rl#1": (one, "rl"), "rl#2": (two, "rl")})


def test_what_cannot_be_tuned_is_refused_before_a_model_loads(models, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("loaded"))
    with load_rewards([likes_a]) as suite:
        for changes, message in (
            ({"tune_split": None}, "no rows to tune on; give one value, or evaluate with `rlseq evaluate`"),
            ({"tune_rows": 0}, "--tune_rows is 0"),
            ({"primary": f"logprob:{SWEEP}"}, "neither better high nor low"),
        ):
            with pytest.raises(ConfigError, match=message):
                check_settings(dataclasses.replace(SETTINGS, **changes), suite)
    with pytest.raises(DataError, match="there are no rows to tune 'sample:temperature"):
        measured({"base": models["hot"]}, tuning_rows=[])
    with pytest.raises(DataError, match="1 of the 17 tuning prompts are evaluated too, for example 'a e = '"):
        measured({"base": models["hot"]}, tuning_rows=[*CHOICE, ROWS[0]])
    with pytest.raises(DataError, match="1 of the 17 tuning prompts are evaluated too, for example ' a  e = '"):
        measured({"base": models["hot"]}, tuning_rows=[*CHOICE, {**ROWS[0], "prompt": " a  e = "}])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ConfigError, match="on the split 'validation', which is the one evaluated"):
        evaluate(
            [f"base={models['hot']}"],
            DataArguments(dataset_name=str(tmp_path / "rows.jsonl")),
            ["phoneme_accuracy"],
            settings=SETTINGS,
            output_dir=str(tmp_path / "out"),
        )
