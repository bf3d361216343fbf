"""The noise of sampling: streams, uniforms, and the token that a uniform picks."""

import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from rlseq.engine.noise import pick, stream_keys, uniforms


def test_a_token_is_picked_by_an_exact_cdf():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(3 * torch.randn(200, 50, generator=generator), -1)
    logprobs[::2, 10:40] = -torch.inf
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    units = [[round(Fraction(p) * 2**52) for p in row] for row in logprobs.double().exp().tolist()]
    bounds = [sum(row[: int(n) + 1]) for row, n in zip(units, torch.randint(0, 50, (200,)), strict=True)]
    totals = [sum(row) for row in units]
    cases = zip(bounds, totals, uniform.tolist(), strict=True)
    at = [b / t if i % 3 == 0 and 0 < b < t else u for i, (b, t, u) in enumerate(cases)]
    expected = []
    for row, total, u in zip(units, totals, at, strict=True):
        wanted, cumulative, index = min(int(u * total), total - 1), row[0], 0
        while cumulative <= wanted:
            index += 1
            cumulative += row[index]
        expected.append(index)
    assert pick(logprobs, torch.tensor(at, dtype=torch.float64)).tolist() == expected
    assert pick(logprobs[:1], torch.tensor([1.0], dtype=torch.float64)).item() < 50
    of = np.array([1, 0, 1, 2, 1, 0])  # several uniforms a distribution: those of its copies
    uniform = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.99, 0.0], dtype=torch.float64)
    assert pick(logprobs[:3], uniform, of).tolist() == pick(logprobs[:3][of], uniform).tolist()
    assert pick(torch.full((1, 3), torch.nan), torch.tensor([0.5], dtype=torch.float64)).item() in range(3)


def test_uniforms_are_splitmix64():
    # The first outputs of the reference implementation (Vigna, prng.di.unimi.it/splitmix64.c) for seed 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = [uniforms(np.array([1234567], dtype=np.uint64), position)[0] for position in range(4)]
    assert found == [(z >> 11) / 2**53 for z in outputs]


@pytest.mark.parametrize(
    ("stream", "written"),
    [(1, b'(3, 1, "it\'s", 2)'), ("kl/forward", b"(3, 'kl/forward', \"it's\", 2)")],
)
def test_a_stream_is_keyed_by_the_hash_of_its_coordinates(stream, written):
    expected = int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "little")
    assert stream_keys(3, stream, ["it's"], [2]).tolist() == [expected]


def noise(seed=0, stream=0, prompts=1, samples=1, positions=1, key="row {}"):
    pairs = list(itertools.product([key.format(i) for i in range(prompts)], range(samples)))
    keys = stream_keys(seed, stream, [k for k, _ in pairs], [s for _, s in pairs])
    return np.stack([uniforms(keys, t) for t in range(positions)])


N = 30_000  # the first 3,000 seeds alone happen to give p = 0.0008; the first 300,000 give 0.32
AXES = {
    "seed": lambda: np.concatenate([noise(seed=i)[0] for i in range(N)]),
    "stream": lambda: np.concatenate([noise(stream=i)[0] for i in range(N)]),
    "prompt": lambda: noise(prompts=N).ravel(),
    "sample": lambda: noise(samples=N).ravel(),
    "position": lambda: noise(positions=N).ravel(),
}


@pytest.mark.parametrize("axis", AXES)
def test_noise_along_each_coordinate_is_uniform_distinct_and_uncorrelated(axis):
    found = AXES[axis]()
    assert found.min() >= 0 and found.max() < 1
    assert len(set(found)) == N
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / np.sqrt(N)  # four standard errors
