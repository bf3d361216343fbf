"""Every number of results.json against plain forwards and hand counts of the texts that were generated."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from rlseq.evaluation.report.write import make_headline
from rlseq.evaluation.run import ContrastSettings, contrast, contrast_and_report
from rlseq.scoring import Ratio, load_rewards, reward

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E F A", "D E", "D E F"]},
    {"prompt": "h = ", "references": [""]},
    {"prompt": "b c = ", "references": ["B", "B C"]},
]
SETTINGS = ContrastSettings(samples_per_row=3, max_new_tokens=5, resamples=200, strategies=("greedy", "sample", "beam"))

CLAIM = {"claim": "checkpoints", "seeds_a": 1, "seeds_b": 1}


def letters(completion: str) -> float | None:
    """Words in the completion; abstains on an empty one."""
    return float(len(completion.split())) or None


def says_a(completion: str) -> float:
    return float("A" in completion.split())


@reward(corpus={"shyness": Ratio("a", "b")})
def silent(completion: str) -> None:
    """Abstains from everything, and so leaves its corpus metric nothing to divide by."""
    return None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with load_rewards(["phoneme_accuracy", letters, says_a]) as suite:
        results = contrast(checkpoints, ROWS, suite, settings=SETTINGS, output_dir=out, quiet=True)
    return results, out


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def ids_of(text):
    return [VOCABULARY.index(word) for word in text.split()]


def logprobs(model, prompt, completion):
    """Log-prob of each token of a completion by one plain forward of one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    return [table[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def teacher_forced(path):
    """By row, the log-probs of each reference, stop included."""
    model = AutoModelForCausalLM.from_pretrained(path)
    return [
        [logprobs(model, ids_of(row["prompt"]), [*ids_of(text), EOS]) for text in row["references"]] for row in ROWS
    ]


def argmaxes(path):
    """The shares of reference tokens that are the argmax, and of rows with a reference that is so throughout."""
    model = AutoModelForCausalLM.from_pretrained(path)
    hits = []
    for row in ROWS:
        prompt, found = ids_of(row["prompt"]), []
        for ids in [[*ids_of(text), EOS] for text in row["references"]]:
            with torch.no_grad():
                best = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].argmax(-1)
            found.append([int(best[len(prompt) + t - 1]) == token for t, token in enumerate(ids)])
        hits.append(found)
    tokens = [hit for found in hits for reference in found for hit in reference]
    return {
        "token_accuracy": np.mean(tokens),
        "teacher_forced_exact_match": np.mean([any(map(all, found)) for found in hits]),
    }


def distance(a, b):
    """Levenshtein's, by its recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_the_results_have_the_shape_that_was_agreed(measured, checkpoints):
    results, out = measured
    assert json.loads((out / "results.json").read_text()) == results
    assert results["schema"] == 4
    assert {"versions", "seed", "settings", "data"} <= set(results["spec"])
    assert results["spec"]["data"]["rows"] == results["rows"] == 5
    assert list(results["models"]) == ["one", "two"]
    for name, model in results["models"].items():
        assert model["path"] == checkpoints[name]
        assert list(model["strategies"]) == ["greedy", "sample", "beam"]
        cells = [*model["likelihood"].items(), *(c for s in model["strategies"].values() for c in s.items())]
        flat = [c for key, cell in cells for c in (cell.values() if key == "exact_pass_at_k" else [cell])]
        for cell in flat:
            assert set(cell) - {"completions", "of"} == {"value", "ci95"}
            low, high = cell["ci95"]
            assert low <= high and all(map(math.isfinite, (cell["value"], low, high)))
    for comparison in results["comparisons"]:
        numbers = {"difference", "ci95", "p_value", "p_adjusted", "power"}
        assert set(comparison) == {"a", "b", "strategy", "metric", *numbers, *CLAIM}
        assert comparison["p_value"] <= comparison["p_adjusted"] <= 1
        assert {key: comparison[key] for key in CLAIM} == CLAIM
    metrics = {name: list(cells) for name, cells in results["models"]["one"]["strategies"].items()}
    assert metrics["sample"] == [*metrics["greedy"], "expected_accuracy", "unreachable", "unreachable_references"]
    assert metrics["beam"] == metrics["greedy"]
    likelihood = ["nll_per_token", "perplexity", "bits_per_byte", "sequence_logprob", "expected_accuracy"]
    likelihood += ["token_accuracy", "teacher_forced_exact_match", *(f"exact_pass_at_k.{2**i}" for i in range(9))]
    assert [(c["strategy"], c["metric"]) for c in results["comparisons"]] == [
        *((None, name) for name in likelihood),
        *((strategy, name) for strategy, names in metrics.items() for name in names),
    ]


@pytest.mark.parametrize("name", ["one", "two"])
def test_likelihoods_are_those_of_plain_forwards(measured, checkpoints, name):
    rows = teacher_forced(checkpoints[name])
    found = measured[0]["models"][name]["likelihood"]
    every = [reference for row in rows for reference in row]
    nats = -sum(map(sum, every))
    tokens = sum(map(len, every))
    size = sum(len(text) for row in ROWS for text in row["references"])  # ASCII: a byte a character
    p = [sum(math.exp(sum(reference)) for reference in row) for row in rows]
    assert tokens == sum(len(t.split()) + 1 for row in ROWS for t in row["references"])
    expected = {
        "nll_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
        "sequence_logprob": -nats / len(every),
        "expected_accuracy": sum(p) / len(p),
        **argmaxes(checkpoints[name]),
    }
    assert {key: found[key]["value"] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert set(found) == {*expected, "exact_pass_at_k"}
    assert {int(k): cell["value"] for k, cell in found["exact_pass_at_k"].items()} == pytest.approx(
        {k: sum(1 - (1 - p_i) ** k for p_i in p) / len(p) for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)}, rel=1e-5
    )


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_qualities_are_counted_from_the_completions(measured, checkpoints, name, strategy):
    results, out = measured
    samples = [s for s in lines(out / "samples.jsonl") if (s["model"], s["strategy"]) == (name, strategy)]
    assert len(samples) == 5 * (3 if strategy == "sample" else 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name])
    edits = words = wrong = exact = length = cut = closest = ngrams = repeated = 0
    accuracies, counts, with_a, own = [], [], [], []
    for s in samples:
        row = next(row for row in ROWS if row["prompt"] == s["prompt"])
        said = s["completion"].split()
        texts = [text.split() for text in row["references"]]
        nearest = min(texts, key=lambda text: (distance(said, text), -len(text)))
        errors = distance(said, nearest)
        edits, words, wrong = edits + errors, words + len(nearest), wrong + (errors > 0)
        accuracies.append(max(0, 1 - errors / len(nearest)) if nearest else float(errors == 0))
        counts += [len(said)] if said else []
        with_a.append("A" in said)
        length, cut = length + s["length"], cut + (s["finish_reason"] == "length")
        closest += sorted((abs(len(text) + 1 - s["length"]), len(text) + 1) for text in texts)[0][1]
        ngrams += max(0, s["length"] - 3)  # of at most 5 tokens, two 4-grams: equal only if all five tokens are
        repeated += s["length"] == 5 and len(set(said)) == 1 and len(said) == 5
        assert s["finish_reason"] == "stop" or s["length"] == 5
        own.append(s["logprob"])
        if "<" not in s["completion"] and "=" not in said and s["length"] == len(said) + (s["finish_reason"] == "stop"):
            ids = ids_of(s["completion"]) + [EOS] * (s["finish_reason"] == "stop")
            assert s["logprob"] == pytest.approx(sum(logprobs(model, ids_of(s["prompt"]), ids)), abs=1e-4)
            exact += said in texts and s["finish_reason"] == "stop"
    n = len(samples)
    expected = {
        "phoneme_accuracy": np.mean(accuracies),
        "letters": np.mean(counts),  # an abstention is no zero
        "says_a": np.mean(with_a),
        "per": edits / words,
        "wer": wrong / n,
        "exact_match": exact / n,
        "length": length / n,
        "truncated": cut / n,
        "logprob": np.mean(own),
        "logprob_per_token": np.sum(own) / length,
        "length_ratio": length / closest,
        "repetition": repeated / ngrams,
    }
    if strategy == "sample":  # the model's own distribution; every reference fits into 5 tokens
        likelihood = results["models"][name]["likelihood"]
        expected |= {"expected_accuracy": likelihood["expected_accuracy"]["value"], "unreachable": 0}
        expected |= {"unreachable_references": 0}
    found = results["models"][name]["strategies"][strategy]
    assert {key: cell["value"] for key, cell in found.items()} == pytest.approx(expected, abs=1e-12)


def test_every_row_and_completion_is_on_file_in_order(measured):
    _, out = measured
    for line, (model, row) in zip(
        lines(out / "per_example.jsonl"), itertools.product(("one", "two"), ROWS), strict=True
    ):
        assert (line["model"], line["prompt"], line["references"]) == (model, row["prompt"], row["references"])
        assert set(line["strategies"]) == {"greedy", "sample", "beam"}
    order = [(s["model"], s["strategy"], s["prompt"], s["sample"]) for s in lines(out / "samples.jsonl")]
    assert order == [
        (model, strategy, row["prompt"], sample)
        for model in ("one", "two")
        for strategy in ("greedy", "sample", "beam")
        for row in ROWS
        for sample in range(3 if strategy == "sample" else 1)
    ]


def test_comparisons_are_b_minus_a(measured):
    models = measured[0]["models"]

    def value(model, strategy, metric):
        part = models[model]["likelihood"] if strategy is None else models[model]["strategies"][strategy]
        for key in metric.split(".") if strategy is None else [metric]:
            part = part[key]
        return part["value"]

    moved = 0
    for c in measured[0]["comparisons"]:
        difference = value("two", c["strategy"], c["metric"]) - value("one", c["strategy"], c["metric"])
        assert c["difference"] == pytest.approx(difference, abs=1e-9)
        assert (c["a"], c["b"]) == ("one", "two") and 0 < c["p_value"] <= 1
        moved += difference != 0
    assert moved > 20
    assert measured[0]["adjustment"] == {"method": "holm", "comparisons": len(measured[0]["comparisons"])}


def test_power_is_that_of_the_differences_of_the_rows_on_file(measured):
    results, out = measured
    accuracy = {"one": [], "two": []}
    for row in lines(out / "per_example.jsonl"):
        accuracy[row["model"]].append(row["likelihood"]["expected_accuracy"])
    found = next(c for c in results["comparisons"] if (c["strategy"], c["metric"]) == (None, "expected_accuracy"))
    deviation = np.std(np.subtract(accuracy["two"], accuracy["one"]), ddof=1)
    assert found["power"]["unit"] == 0.01
    assert found["power"]["detectable_difference"] == pytest.approx(2.801585 * deviation / math.sqrt(5), rel=1e-6)
    assert found["power"]["rows_for_unit"] == math.ceil((2.801585 * deviation / 0.01) ** 2)


def quick(models, rewards=(letters,), rows=ROWS, options=None, **changes):
    settings = dataclasses.replace(SETTINGS, **{"resamples": 20} | changes)
    with load_rewards(list(rewards)) as suite:
        return contrast(models, rows, suite, settings=settings, prompt_options=options, quiet=True)


def test_the_same_checkpoint_under_two_names_differs_by_exactly_nothing(checkpoints):
    path = checkpoints["one"]
    results = quick({"a": path, "b": path}, ["phoneme_accuracy"])
    for c in results["comparisons"]:
        assert (c["difference"], c["ci95"], c["p_value"]) == (0, [0, 0], 1)
    assert results["models"]["a"] == results["models"]["b"]


def test_results_do_not_depend_on_how_many_rows_are_decoded_together(checkpoints):
    one, many = (quick(checkpoints, eval_batch_size=n) for n in (1, 256))
    assert one["spec"] == many["spec"]

    def values(node):
        if isinstance(node, dict):
            return [v for child in node.values() for v in values(child)]
        return [v for child in node for v in values(child)] if isinstance(node, list) else [node]

    for part in ("models", "comparisons"):
        for a, b in zip(values(one[part]), values(many[part]), strict=True):
            assert a == (pytest.approx(b, abs=2e-5, rel=2e-5) if isinstance(b, float) else b)


def test_the_expected_accuracy_is_what_many_ancestral_samples_find(checkpoints):
    results = quick(
        {"one": checkpoints["one"]}, rows=ROWS, strategies=("sample",), samples_per_row=4000, max_new_tokens=6
    )
    found = results["models"]["one"]
    p = [sum(math.exp(sum(reference)) for reference in row) for row in teacher_forced(checkpoints["one"])]
    standard_error = math.sqrt(sum(p_i * (1 - p_i) / 4000 for p_i in p)) / len(p)
    exact, share = (
        found["likelihood"]["expected_accuracy"]["value"],
        found["strategies"]["sample"]["exact_match"]["value"],
    )
    assert exact > 10 * standard_error  # else agreement would say nothing
    assert abs(share - exact) < 4 * standard_error


def test_without_references_the_likelihood_part_is_absent_and_a_note_says_so(checkpoints):
    results = quick(checkpoints, rows=[{"prompt": "a b = "}, {"prompt": "c = "}])
    assert all(model["likelihood"] == {} for model in results["models"].values())
    assert results["notes"] == ["The data has no references: the likelihood part is skipped."]
    assert {c["strategy"] for c in results["comparisons"]} == {"greedy", "sample", "beam"}
    assert "exact_match" not in results["models"]["one"]["strategies"]["greedy"]


def test_rows_without_references_are_left_out_of_the_likelihood_alone(checkpoints):
    one = {"one": checkpoints["one"]}
    some = quick(one, rows=[{"prompt": "g = ", "references": []}, *ROWS])
    assert some["notes"] == []
    for key in ("nll_per_token", "expected_accuracy"):
        value = quick(one)["models"]["one"]["likelihood"][key]["value"]
        assert some["models"]["one"]["likelihood"][key]["value"] == pytest.approx(value, rel=1e-6)


def test_a_completion_cut_before_its_stop_matches_no_reference(checkpoints):
    rows = [{"prompt": "a b = ", "references": [*"abcdefghABCDEFGH"]}]
    found = quick(
        {"one": checkpoints["one"]}, ["exact_match"], rows, max_new_tokens=1, strategies=("sample",), samples_per_row=50
    )["models"]["one"]["strategies"]["sample"]
    assert found["reward/exact_match"]["value"] > 0  # the text of a reference, but not all of its tokens
    assert found["exact_match"]["value"] == 0


def test_the_headline_without_a_claim_is_about_something_measured(checkpoints, tmp_path):
    results = quick(checkpoints, [silent, letters], strategies=("greedy",))
    assert make_headline(results).finding.partition(": ")[2].startswith("letters (reward) under greedy")


def test_the_primary_comparison_may_be_against_another_strategy_of_the_first_model(checkpoints):
    results = quick(checkpoints, ["phoneme_accuracy"], primary="wer:greedy", primary_against="sample")
    primary = {"metric": "wer", "strategy": "greedy", "a": "one", "b": "two", "strategy_a": "sample"}
    assert results["primary"] == primary
    (crossed,) = [c for c in results["comparisons"] if "strategy_a" in c]
    values = {name: model["strategies"] for name, model in results["models"].items()}
    expected = values["two"]["greedy"]["wer"]["value"] - values["one"]["sample"]["wer"]["value"]
    assert (crossed["strategy_a"], crossed["metric"]) == ("sample", "wer")
    assert crossed["difference"] == pytest.approx(expected)
    same = quick(checkpoints, ["phoneme_accuracy"], primary="wer:greedy", primary_against="greedy")
    assert "strategy_a" not in same["primary"]
    assert not [c for c in same["comparisons"] if "strategy_a" in c]


def test_the_report_is_written_beside_the_results(checkpoints, tmp_path, capsys):
    with load_rewards([letters]) as suite:
        settings = dataclasses.replace(SETTINGS, resamples=20, strategies=("greedy",))
        contrast_and_report(checkpoints, ROWS, suite, settings=settings, prompt_options={}, output_dir=tmp_path)
    assert {"results.json", "samples.jsonl", "per_example.jsonl", "report.html"} <= {p.name for p in tmp_path.iterdir()}
    assert "report.html" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "results.json").read_text())["models"]["one"]["strategies"]) == ["greedy"]
