"""KL divergences between two toy models against the enumeration of every completion, and the report of them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_contrast import letters
from test_data import word_tokenizer
from test_map import ROWS
from tiny import tiny_model
from toy import COMPLETIONS, LONGEST, PROMPT, STOP, exact_logprobs, toy_model

import rlseq.engine.likelihood
from rlseq.engine.likelihood import divergence
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.errors import ModelError
from rlseq.evaluation.run import ContrastSettings, contrast, contrast_and_report
from rlseq.evaluation.statistics import Source
from rlseq.evaluation.studies.kl import KL, METRICS
from rlseq.evaluation.studies.study import Context
from rlseq.scoring import load_rewards
from rlseq.types import Prompt

DISTANCE = Source("kl")

SETTINGS = ContrastSettings(
    strategies=("greedy",), max_new_tokens=LONGEST, samples_per_row=8, resamples=300, studies=("kl",)
)
PROMPTS = (PROMPT, (1, 0), (0, 0, 1))


def toys():
    model, base = toy_model(1), toy_model(2)
    for toy in (model, base):
        toy.lm_head.weight.data *= 2  # far enough apart that agreement says something
    return model, base


def prompts_of(ids):
    return [Prompt(str(i), "", prompt_ids, {}) for i, prompt_ids in enumerate(ids)]


def context_of(model, base, prompts, settings=SETTINGS, **changes):
    given = {"tokenizer": None, "references": [()] * len(prompts), "suite": None, "completions": {}, "values": {}}
    given |= {"model": model, "prompts": prompts, "settings": settings, "stop_ids": [STOP], "baseline": lambda: base}
    return Context(**given | changes)


@torch.no_grad()
def next_logprobs(model, prompt_ids, prefix):
    """Log-probs of the next token, by one plain forward."""
    return model(input_ids=torch.tensor([[*prompt_ids, *prefix]])).logits[0, -1].log_softmax(-1)


def exact_kl(p, b, prompt_ids):
    """Σ_y p(y) log(p(y) / b(y)) over every completion."""
    p, b = ({y: value.item() for y, value in exact_logprobs(m, prompt_ids).items()} for m in (p, b))
    return sum(np.exp(p[y]) * (p[y] - b[y]) for y in COMPLETIONS)


def by_token(p, b, prompt_ids, completion):
    """The divergence at each token, summed over the vocabulary, and the difference in log-prob of the token."""
    rows = []
    for t, token in enumerate(completion):
        a, c = (next_logprobs(m, prompt_ids, completion[:t]) for m in (p, b))
        rows.append([sum((a[v].exp() * (a[v] - c[v])).item() for v in range(3)), (a[token] - c[token]).item()])
    return np.array(rows)


def test_over_all_completions_both_estimators_have_the_kl_of_the_sequences_as_their_mean():
    p, b = toys()
    for prompt_ids in PROMPTS:
        exact = exact_kl(p, b, prompt_ids)
        assert exact > 0.05
        found = divergence(p, b, [prompt_ids] * len(COMPLETIONS), COMPLETIONS)
        chances = [value.exp().item() for value in exact_logprobs(p, prompt_ids).values()]
        means = sum(chance * tokens.sum(0) for chance, tokens in zip(chances, found, strict=True))
        assert means.tolist() == pytest.approx([exact, exact], abs=1e-12)
        for y, tokens in zip(COMPLETIONS, found, strict=True):
            assert tokens.numpy() == pytest.approx(by_token(p, b, prompt_ids, y), abs=1e-12)


@pytest.mark.parametrize("chunk", [3, 7])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_small_chunks_of_logits_change_nothing(monkeypatch, family, chunk):
    p, b = (tiny_model(family, seed=seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 23, (n,), generator=generator).tolist() for n in (4, 2, 6, 3)]
    completions = [torch.randint(3, 23, (n,), generator=generator).tolist() for n in (5, 0, 1, 7)]
    largest = []
    softmax = torch.log_softmax

    def watched(x, *args, **kwargs):
        largest.append(x.shape[0])
        return softmax(x, *args, **kwargs)

    whole = divergence(p, b, ids, completions)
    monkeypatch.setattr(rlseq.engine.likelihood, "_CHUNK_LOGITS", chunk * 23)
    monkeypatch.setattr(torch, "log_softmax", watched)
    split = divergence(p, b, ids, completions)
    assert max(largest) == chunk
    for x, y in zip(whole, split, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert [len(x) for x in split] == [5, 0, 1, 7]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_row_holds_the_sums_over_its_samples(direction):
    model, base = toys()
    p, b = (model, base) if direction == "forward" else (base, model)
    prompts, done = prompts_of(PROMPTS), []
    found = KL().measure(context_of(model, base, prompts, progress=done.append))
    options = {"num_samples": 8, "max_new_tokens": LONGEST, "strategy": Sample(), "seed": 0, "stop_ids": [STOP]}
    groups = sample(p, prompts, stream=f"kl/{direction}", **options)
    for row, prompt, group in zip(found, prompts, groups, strict=True):
        sums = sum(by_token(p, b, prompt.prompt_ids, r.completion_ids).sum(0) for r in group)
        kl, plain, tokens, samples = (row[DISTANCE(name, direction)] for name in ("kl", "plain", "tokens", "samples"))
        assert (kl, plain) == pytest.approx(tuple(sums), abs=1e-9)
        assert (tokens, samples) == (sum(len(r.completion_ids) for r in group), 8)
    assert sum(done) == len(prompts)


@pytest.fixture(scope="module")
def many():
    """600 rows of equal prompts: what varies between them is sampling alone."""
    model, base = toys()
    settings = dataclasses.replace(SETTINGS, samples_per_row=4)
    rows = KL().measure(context_of(model, base, prompts_of([PROMPT] * 600), settings))
    block = KL().results({"base": [{"itself": 1.0}] * 600, "model": rows}, settings, {})
    return model, base, block


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_estimates_agree_with_the_exact_kl_and_summing_over_the_vocabulary_lowers_the_variance(many, direction):
    model, base, block = many
    p, b = (model, base) if direction == "forward" else (base, model)
    exact = exact_kl(p, b, PROMPT)
    chances = np.array([value.exp().item() for value in exact_logprobs(p, PROMPT).values()])
    sums = np.array([by_token(p, b, PROMPT, y).sum(0) for y in COMPLETIONS])  # (7, 2)
    variances = chances @ (sums - exact) ** 2  # of one sample
    assert variances[0] < variances[1]
    cells = block["models"]["model"][direction]
    for name, variance in zip(("kl", "plain"), variances, strict=True):
        error = np.sqrt(variance / 2400)
        assert exact > 10 * error  # else agreement would say nothing
        assert abs(cells[name]["value"] - exact) < 4 * error
        low, high = cells[name]["ci95"]
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    ratio = cells["variance_ratio"]
    assert ratio["ci95"][0] < variances[1] / variances[0] < ratio["ci95"][1]
    assert ratio["ci95"][0] > 1
    length = chances @ [len(y) for y in COMPLETIONS]
    assert cells["length"]["value"] == pytest.approx(length, rel=0.03)
    assert cells["kl_per_token"]["value"] == pytest.approx(cells["kl"]["value"] / cells["length"]["value"])


def test_the_variance_ratio_is_that_of_the_row_means():
    plain, kl = np.array([1.0, 5.0, 3.0, 2.0]), np.array([2.0, 2.5, 3.0, 2.2])
    stats = np.stack([plain, plain**2, kl, kl**2, np.ones(4)], 1)
    aggregate = METRICS["forward", "variance_ratio"].aggregate
    assert aggregate(stats) == pytest.approx(np.var(plain) / np.var(kl))
    assert aggregate(stats) == pytest.approx(float(aggregate.from_sums(stats.mean(0))))
    assert np.isnan(aggregate(stats[:1]))


def silence(model, token):
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([token]), -torch.inf))
    return model


def test_a_token_that_both_rule_out_counts_nothing_and_one_that_one_alone_does_is_refused():
    p, b = (silence(model, 1) for model in toys())
    found = KL().measure(context_of(p, b, prompts_of([PROMPT])))
    assert found[0][DISTANCE("kl", "forward")] > 0 and np.isfinite(found[0][DISTANCE("kl", "reverse")])
    for model, base in ((toys()[0], b), (p, toys()[1])):
        with pytest.raises(ModelError, match="infinite KL"):
            KL().measure(context_of(model, base, prompts_of([PROMPT] * 20)))


def test_vocabularies_of_different_sizes_have_no_divergence():
    one, other = tiny_model("llama"), tiny_model("llama", vocab_size=24)
    with pytest.raises(ValueError, match="vocabularies of 23 and 24 tokens"):
        divergence(one, other, [[3]], [[4]])


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, size) in enumerate({"one": 23, "two": 23, "wide": 24}.items()):
        tiny_model("llama", seed=seed, initializer_range=0.3, vocab_size=size).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    models = {name: str(folder / name) for name in ("one", "two", "wide")} | {"again": str(folder / "one")}
    settings = dataclasses.replace(SETTINGS, max_new_tokens=4, study_rows=3)
    with load_rewards([letters]) as suite:
        options = {"settings": settings, "prompt_options": {}, "output_dir": folder / "out", "title": "t"}
        contrast_and_report(models, ROWS, suite, **options)
        alone = contrast({"one": models["one"]}, ROWS, suite, settings=settings, quiet=True)
    return folder / "out", alone


def test_the_report_has_both_directions_and_says_what_is_left_out(reported):
    out, alone = reported
    block = json.loads((out / "results.json").read_text())["studies"]["kl"]
    assert (block["first"], block["rows"]) == ("one", 3)
    assert set(block["models"]) == {"two", "again"}
    for cells in block["models"]["two"].values():
        assert cells["kl"]["value"] > 0
        for cell in cells.values():
            low, high = cell["ci95"]
            assert low <= cell["value"] <= high
    assert {c["kl"]["value"] for c in block["models"]["again"].values()} == {0}
    assert block["skipped"] == {"wide": {"vocabulary": 24, "vocabulary_first": 23}}
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert "KL(two ‖ one)" in text and "KL(one ‖ two)" in text
        assert "wide is left out: its vocabulary has 24 tokens, that of one 23" in text
    assert "kl" not in alone["studies"]
