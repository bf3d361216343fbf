"""Decoding strategies: how they are written and read, and their warps against numpy."""

import numpy as np
import pytest
import torch

from rlseq.engine.strategies import MBR, Beam, BestOf, Greedy, Sample, parse_strategy
from rlseq.errors import ConfigError


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def nucleus(p, mass):
    """The fewest tokens, likeliest first, whose mass reaches `mass`."""
    kept, total = np.zeros(len(p), bool), 0.0
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        kept[token] = True
        total += p[token]
        if total >= mass:
            break
    return kept


def warped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution that is sampled from, token by token in float64."""
    p = softmax(np.asarray(logits, dtype=float) / temperature)
    if top_k is not None:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
        p /= p.sum()
    if top_p is not None:
        p = np.where(nucleus(p, top_p), p, 0)
        p /= p.sum()
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
        p /= p.sum()
    return p


WARPS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.05},
    {"top_p": 0.7},
    {"top_p": 1.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("settings", WARPS, ids=str)
def test_a_warp_gives_the_log_probs_that_numpy_gives(settings):
    logits = np.random.default_rng(1).normal(scale=2, size=(7, 3, 19)).astype(np.float32)
    found = Sample(**settings).warp(torch.from_numpy(logits))
    expected = np.apply_along_axis(warped, -1, logits, **settings)
    assert found.shape == logits.shape
    np.testing.assert_array_equal(np.isneginf(found.numpy()), expected == 0)
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose(found.exp().sum(-1).numpy(), 1, rtol=1e-5)


def test_a_warp_of_half_precision_is_computed_in_float32_and_float64_stays():
    logits = torch.linspace(-3, 3, 11)
    assert Sample().warp(logits.to(torch.bfloat16)).dtype == torch.float32
    assert Sample().warp(logits.double()).dtype == torch.float64


def test_a_nucleus_takes_the_token_that_reaches_its_mass():
    # 0.5 alone reaches 0.5; 0.51 needs the next one too: 0.5 / 0.8 and 0.3 / 0.8.
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert Sample(top_p=0.499).warp(logits).exp().tolist() == pytest.approx([1, 0, 0])
    assert Sample(top_p=0.51).warp(logits).exp().tolist() == pytest.approx([0.625, 0.375, 0])


WRITTEN = {
    "greedy": Greedy(),
    "sample": Sample(),
    "sample:temperature=0.7": Sample(temperature=0.7),
    "sample:temperature=0.7,top_k=5,top_p=0.9,min_p=0.05": Sample(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05),
    "beam": Beam(),
    "beam:width=10": Beam(width=10),
    "beam:width=10,length_penalty=-0.5": Beam(width=10, length_penalty=-0.5),
    "best_of:n=8": BestOf(n=8),
    "best_of:n=16,temperature=0.7,top_k=5,top_p=0.9,min_p=0.05": BestOf(16, "logprob", 0.7, 5, 0.9, 0.05),
    "best_of:n=8,by=phoneme_accuracy": BestOf(n=8, by="phoneme_accuracy"),
    "mbr:n=8,utility=error_rate": MBR(n=8, utility="error_rate"),
    "mbr:n=4,utility=chrf-2,temperature=0.5": MBR(n=4, utility="chrf-2", temperature=0.5),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_strategy_is_read_as_written_and_its_signature_is_what_was_written(text):
    assert parse_strategy(text) == WRITTEN[text]
    assert parse_strategy(text).spec == text


def test_settings_equal_to_the_defaults_are_not_in_the_signature():
    assert parse_strategy("sample: temperature=1.0").spec == "sample"
    assert parse_strategy("beam:width=5,length_penalty=0").spec == "beam"
    assert parse_strategy("best_of:by=logprob, n= 8,temperature=1").spec == "best_of:n=8"


def test_candidates_are_sampled_from_the_distribution_of_sample_with_the_same_settings():
    best_of = parse_strategy("best_of:n=3,temperature=0.7,top_k=5,top_p=0.9,min_p=0.05")
    assert best_of.sampler == Sample(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
    assert parse_strategy("mbr:n=3,utility=chrf").sampler == Sample()


def test_only_sample_gives_several_completions_a_prompt():
    assert [text for text in WRITTEN if parse_strategy(text).is_stochastic] == [
        t for t in WRITTEN if t.startswith("sample")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gredy",
            "no decoding strategy 'gredy'; there are greedy, sample, beam, best_of, mbr. Did you mean 'greedy'?",
        ),
        ("", "no decoding strategy ''"),
        ("sample:temprature=1", "takes temperature=…, top_k=…, top_p=…, min_p=…. Did you mean 'temperature'?"),
        ("sample:temperature", "'temperature' is not a setting of sample"),
        ("greedy:width=2", "it takes none"),
        ("sample:temperature=hot", "temperature is 'hot'; expected a number"),
        ("sample:top_k=2.5", "top_k is '2.5'; expected a whole number"),
        ("sample:temperature=1,temperature=2", "gives temperature twice"),
        ("sample:temperature=0", "expected a number above 0 (for the limit 0 use greedy)"),
        ("sample:temperature=nan", "temperature is nan"),
        ("sample:top_k=0", "top_k is 0; expected a whole number from 1"),
        ("sample:top_p=0", "top_p is 0.0; expected a number in (0, 1]"),
        ("sample:top_p=1.1", "top_p is 1.1"),
        ("sample:min_p=-0.1", "min_p is -0.1; expected a number in [0, 1]"),
        ("beam:width=0", "width is 0; expected a whole number from 1"),
        ("best_of", "strategy 'best_of' does not say n; give best_of:n=8"),
        ("best_of:n=1", "best_of: n is 1; expected a whole number from 2"),
        ("best_of:n=2.5", "n is '2.5'; expected a whole number"),
        ("best_of:n=8,temperature=0", "best_of: temperature is 0.0; expected a number above 0"),
        ("best_of:n=8,top_p=2", "best_of: top_p is 2.0"),
        ("best_of:n=8,utility=chrf", "'utility=chrf' is not a setting of best_of"),
        ("mbr", "does not say n and utility; give mbr:n=8,utility=error_rate, for example"),
        ("mbr:n=8", "does not say utility; give mbr:n=8,utility=error_rate"),
        ("mbr:n=8,utility=", "no utility is named"),
        ("mbr:n=0,utility=chrf", "mbr: n is 0; expected a whole number from 2"),
        ("mbr:n=8,utilty=chrf", "Did you mean 'utility'?"),
        ("beam:length_penalty=inf", "length_penalty is inf; expected a finite number"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_was_expected(text, message):
    with pytest.raises(ConfigError) as error:
        parse_strategy(text)
    assert message in str(error.value)
