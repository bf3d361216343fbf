"""The noise of sampling: one uniform per token, and the token that it picks.

A uniform is a function of (seed, stream, prompt key, sample, position) alone, so a sampled token does not depend on the
batch, on the order of rows or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from rlseq.engine.float64 import float64_device, to_float64
from rlseq.engine.packed.layout import ranks
from rlseq.engine.strategies import to_units


def stream_keys(seed: int, stream: int | str, prompt_keys: Sequence[str], samples: Sequence[int]) -> np.ndarray:
    """Return one 64-bit key per row, (B,): the hash of (seed, stream, prompt key, sample)."""
    digests = (
        hashlib.blake2b(repr((seed, stream, key, sample)).encode(), digest_size=8).digest()
        for key, sample in zip(prompt_keys, samples, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """Return the uniform in [0, 1) of each stream at a position: SplitMix64 (Steele et al. 2014), 53 bits, (B,)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def pick(logprobs: torch.Tensor, uniform: torch.Tensor, of: np.ndarray | None = None) -> torch.Tensor:
    """Pick a token (B,) by inverse CDF of uniforms (B,), in whole numbers of 2⁻⁵², from log-probs.

    Args:
        logprobs: (U, V).
        uniform: (B,) in [0, 1).
        of: (B,) the distribution, of U, that each uniform picks from; None: each from its own, U = B.
    """
    device = logprobs.device
    exact = float64_device(device)
    probs = to_float64(logprobs)
    cdf = to_units(probs.exp() if probs is logprobs else probs.exp_()).cumsum_(-1)
    of = np.arange(len(cdf)) if of is None else of
    rank = ranks(of)  # a table (U, K) of the uniforms of each distribution, so that no CDF is copied
    where = torch.from_numpy(of).to(cdf.device), torch.from_numpy(rank).to(cdf.device)
    total = cdf[:, -1][where[0]]
    wanted = cdf.new_zeros(len(cdf), int(rank.max()) + 1)
    # u·total may round up to the total
    wanted[where] = torch.minimum((uniform.to(exact) * total).long(), total - 1)
    index = torch.searchsorted(cdf, wanted, right=True)[where]
    return index.clamp(max=logprobs.size(-1) - 1).to(device)  # beyond it only where a model gives no numbers
