"""Linear heads on hidden states: against scipy, count tables, plain forwards, and sequences known by heart."""

import collections
import dataclasses
import types

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from test_contrast import letters
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import tiny_model

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.errors import ModelError
from rlseq.evaluation.run import ContrastSettings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Source
from rlseq.evaluation.stats.heads import PENALTIES, chosen_head, fit_head
from rlseq.evaluation.studies import lookahead as module
from rlseq.evaluation.studies.lookahead import Lookahead
from rlseq.evaluation.studies.study import Context
from rlseq.scoring import load_rewards

LOOKAHEAD = Source("lookahead")

SETTINGS = ContrastSettings(strategies=("greedy",), max_new_tokens=2, resamples=100, studies=("lookahead",))
WORDS = "ABCDEFG"


def cycles(count=24, length=6):
    """References that go on as the alphabet does, round and round, from a letter that the prompt does not tell."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        start = int(rng.integers(7))
        answer = " ".join(WORDS[(start + t) % 7] for t in range(length))
        rows.append({"prompt": " ".join(rng.choice(list("abcdefgh"), 4)) + " = ", "references": [answer]})
    return rows


def statistics(rows, model=None, settings=SETTINGS):
    prompts = build_prompts(rows, word_tokenizer())
    model = model or tiny_model("llama")
    context = Context(
        model=model,
        tokenizer=word_tokenizer(),
        prompts=prompts,
        references=[reference_ids(prompt, word_tokenizer(), [EOS]) for prompt in prompts],
        suite=None,
        completions={},
        values={},
        settings=settings,
        stop_ids=[EOS],
        baseline=lambda: model,
    )
    return Lookahead().measure(context), context


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("llama", seed=4, initializer_range=0.3)
    return (model, *statistics(cycles(), model))


def scipy_head(features, targets, classes, penalty):
    """The same minimum by another implementation: numpy and scipy, gradient by hand."""
    n, size = features.shape

    def objective(flat):
        weights = flat.reshape(size, classes)
        logprobs = log_softmax(features @ weights, axis=1)
        off = np.exp(logprobs)
        off[np.arange(n), targets] -= 1
        value = -logprobs[np.arange(n), targets].mean() + penalty / 2 * (weights**2).sum()
        return value, (features.T @ off / n + penalty * weights).ravel()

    found = minimize(
        objective, np.zeros(size * classes), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 0}
    )
    return found.x.reshape(size, classes)


@pytest.mark.parametrize("penalty", [0.3, 0.003])
def test_a_head_is_the_minimum_that_scipy_finds(penalty):
    rng = np.random.default_rng(1)
    features, targets = rng.normal(size=(60, 5)), rng.integers(4, size=60)
    start = torch.from_numpy(rng.normal(size=(5, 4)))
    found = fit_head(torch.from_numpy(features), torch.from_numpy(targets), penalty, start)
    assert np.abs(found.numpy() - scipy_head(features, targets, 4, penalty)).max() < 1e-3
    places = rng.integers(5, size=60)
    one_hot = fit_head(torch.from_numpy(places), torch.from_numpy(targets), penalty, start)
    assert np.abs(one_hot.numpy() - scipy_head(np.eye(5)[places], targets, 4, penalty)).max() < 1e-3


def test_a_head_on_a_token_alone_is_the_table_of_counts():
    counts = np.array([[6, 3, 1], [1, 1, 8]])
    places = np.repeat([0, 1], counts.sum(1))
    targets = np.concatenate([np.repeat(np.arange(3), row) for row in counts])
    weights = fit_head(torch.from_numpy(places), torch.from_numpy(targets), 1e-6, torch.zeros(2, 3).double())
    assert weights.softmax(-1).numpy() == pytest.approx(counts / 10, abs=1e-4)


def test_the_penalty_is_the_best_on_examples_that_are_not_fitted():
    rng = np.random.default_rng(2)
    features, noise = rng.normal(size=(160, 6)), rng.gumbel(size=(160, 3))
    targets = (features @ rng.normal(size=(6, 3)) + noise).argmax(1)
    judged = np.arange(160) % 4 == 0
    losses = []
    for penalty in PENALTIES:
        weights = scipy_head(features[~judged], targets[~judged], 3, penalty)
        logprobs = log_softmax(features[judged] @ weights, axis=1)
        losses.append(-logprobs[np.arange(judged.sum()), targets[judged]].mean())
    best = next(i for i in range(len(losses) - 1) if losses[i + 1] >= losses[i])
    assert 0 < best < len(PENALTIES) - 1 and losses[best] == min(losses)  # it has one valley here
    found = chosen_head(*map(torch.from_numpy, (features, targets, judged)), (6, 3))
    assert np.abs(found.numpy() - scipy_head(features, targets, 3, PENALTIES[best])).max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_are_those_of_a_plain_forward(family):
    model = tiny_model(family)
    prompts = build_prompts(cycles(3), word_tokenizer())
    pairs = [(0, (8, 9, 2)), (2, (2,)), (1, (7, 2)), (0, (10, 2))]
    expected = []
    for row, ids in pairs:
        prompt = prompts[row].prompt_ids
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False, output_hidden_states=True)
        expected.append(output.hidden_states[-1][0, len(prompt) - 1 : -1])
    expected = torch.cat(expected).double()
    assert torch.allclose(module._states(model, prompts, pairs), expected, atol=1e-5)

    class Bare(torch.nn.Module):
        """A causal model that names no decoder."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    assert torch.allclose(module._states(Bare(), prompts, pairs), expected, atol=1e-5)
    hollow = Bare()
    hollow.forward = lambda **inputs: types.SimpleNamespace(logits=None)
    with pytest.raises(ModelError, match="gives no hidden states"):
        module._states(hollow, prompts, pairs)


def test_positions_and_sides_are_counted_by_hand(measured):
    _, rows, _ = measured
    held_out = [row for row in rows if LOOKAHEAD("held_out") in row]
    assert len(held_out) + sum(row == {LOOKAHEAD("fitted"): 1.0} for row in rows) == len(rows)
    assert 4 <= len(held_out) <= 20
    for row in held_out:  # six letters and the stop: 7 positions see a next token, 4 see a fourth one
        assert [row[LOOKAHEAD("count", k)] for k in (1, 2, 3, 4)] == [7, 6, 5, 4]


def test_the_current_token_predicts_what_most_often_follows_it(measured):
    """A head on the token alone is a table of counts: its guess is the most frequent target of the fitted rows.

    Where two targets are equally frequent, rounding decides, so what is right lies between two counts made by hand.
    """
    _, rows, _ = measured
    answers = [[*row["references"][0].split(), "stop"] for row in cycles()]
    pairs = [list(zip(["=", *answer[:-1]], range(len(answer)), strict=True)) for answer in answers]
    held_out = [i for i, row in enumerate(rows) if LOOKAHEAD("held_out") in row]
    for k in (1, 2, 3, 4):
        table = collections.defaultdict(collections.Counter)
        for i, answer in enumerate(answers):
            for token, place in pairs[i][: len(answer) - k + 1] if i not in held_out else []:
                table[token][answer[place + k - 1]] += 1
        least = most = 0
        for i in held_out:
            for token, place in pairs[i][: len(answers[i]) - k + 1]:
                counts, target = table[token], answers[i][place + k - 1]
                assert counts  # every letter was met
                best = [word for word, count in counts.items() if count == max(counts.values())]
                least += best == [target]
                most += target in best
        right = sum(rows[i][LOOKAHEAD("right", k, "current_token")] for i in held_out)
        assert least <= right <= most
        assert most < sum(rows[i][LOOKAHEAD("count", k)] for i in held_out)  # the stop follows any letter


def test_the_own_head_is_the_models_next_token_loss(measured):
    model, rows, context = measured
    for row, prompt, (reference,) in zip(rows, context.prompts, context.references, strict=True):
        if LOOKAHEAD("held_out") in row:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt.prompt_ids, *reference]]), use_cache=False).logits[0]
            table = logits[len(prompt.prompt_ids) - 1 : -1].double().log_softmax(-1)
            nll = -sum(table[t, token].item() for t, token in enumerate(reference))
            assert row[LOOKAHEAD("nll", 1, "own_head")] == pytest.approx(nll, abs=1e-4)


def test_a_state_that_holds_a_later_token_shows_it(monkeypatch):
    """States made to hold the token three ahead, and nothing else, give it away at k = 3 alone."""
    rng = np.random.default_rng(3)
    rows = [
        {
            "prompt": f"{' '.join(rng.choice(list('abcdefgh'), 5))} = ",
            "references": [" ".join(rng.choice(list(WORDS), 8))],
        }
        for _ in range(60)
    ]

    def planted(model, prompts, pairs):
        codes = [[*ids[2:], 0, 0][: len(ids)] for _, ids in pairs]
        flat = torch.tensor([code for row in codes for code in row])
        return torch.nn.functional.one_hot(flat, len(VOCABULARY)).double()

    monkeypatch.setattr(module, "_states", planted)
    found, _ = statistics(rows)
    for k in (1, 2, 3, 4):
        keys = LOOKAHEAD("right", k, "model"), LOOKAHEAD("count", k)
        right, count = (sum(row.get(key, 0) for row in found) for key in keys)
        assert right == count if k == 3 else right < count / 2


def test_equal_prompts_fall_on_one_side_and_no_token_decides():
    rows = [{"prompt": row["prompt"], "references": [text]} for row in cycles(20) for text in ("A B C D", "E F G")]
    found, _ = statistics(rows)
    sides = [{key.name for key in row} & {"fitted", "held_out"} for row in found]
    assert all(sides[i] == sides[i + 1] for i in range(0, len(sides), 2))
    assert {side for pair in sides for side in pair} == {"fitted", "held_out"}


def test_random_weights_are_named_by_the_seed_and_leave_the_random_state():
    model = tiny_model("llama", seed=4)
    state = torch.get_rng_state()
    a, b, c = (module._random_twin(model, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key])
    assert not torch.equal(a[key], model.state_dict()[key])


def test_differences_are_the_models_value_less_the_controls():
    def row(scale):
        values = {"model": 1.0, "random_weights": 3.0, "current_token": 2.0}
        entry = {LOOKAHEAD("nll", 1, head): value * scale for head, value in values.items()}
        entry |= {LOOKAHEAD("right", 1, head): (3 - value) for head, value in values.items()}
        return entry | {LOOKAHEAD("nll", 1, "own_head"): 0.5, LOOKAHEAD("count", 1): 2.0, LOOKAHEAD("held_out"): 1.0}

    rows = {"a": [row(1.0), {LOOKAHEAD("fitted"): 1.0}, {}], "b": [row(2.0), {LOOKAHEAD("fitted"): 1.0}, {}]}
    block = Lookahead().results(rows, SETTINGS, {})
    assert (block["rows_fitted"], block["rows_held_out"]) == (1, 1)
    found = block["models"]["a"]["1"]
    assert found["positions"] == 2
    assert {head: cell["value"] for head, cell in found["nll"].items()} == {
        "model": 0.5,
        "random_weights": 1.5,
        "current_token": 1.0,
        "less_random_weights": -1.0,
        "less_current_token": -0.5,
        "own_head": 0.25,
    }
    assert found["right"]["less_random_weights"]["value"] == 1.0
    gaps = {(c["metric"], c["head"]): c["difference"] for c in block["comparisons"]}
    assert gaps["nll", "model"] == 0.5 and gaps["nll", "less_random_weights"] == -1.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", initializer_range=0.3).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_report_says_what_it_is_not(checkpoint, tmp_path):
    settings = dataclasses.replace(SETTINGS, study_rows=20)
    with load_rewards([letters]) as suite:
        options = {"settings": settings, "prompt_options": {}, "output_dir": tmp_path, "title": "t"}
        results = contrast_and_report({"one": checkpoint, "same": checkpoint}, cycles(), suite, **options)
    block = results["studies"]["lookahead"]
    assert block["rows_fitted"] + block["rows_held_out"] == 20
    assert block["models"]["one"] == block["models"]["same"]
    assert all(c["difference"] == 0 for c in block["comparisons"])
    assert (tmp_path / "plots" / "lookahead.svg").is_file()
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert "multi-token prediction. " in text and "nothing here shows planning" in text


def test_too_few_rows_are_said_to_be_too_few(checkpoint):
    with load_rewards([letters]) as suite:
        results = contrast({"one": checkpoint}, cycles(2), suite, settings=SETTINGS, quiet=True)
    block = results["studies"]["lookahead"]
    assert block == {"rows_fitted": 0, "rows_held_out": 0}
    assert "Skipped: too few rows" in Lookahead().section(results).definition
