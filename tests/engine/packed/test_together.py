"""Prompts that begin alike in one row: written once, with every number and gradient of each sequence alone."""

from __future__ import annotations

import pytest
import torch
from test_packing import alone, gradients, shifted_logprobs
from tiny import FAMILIES, PAD, tiny_model

from rlseq.engine.decoding import common_prefix
from rlseq.engine.packed import together
from rlseq.engine.packed.packing import IGNORED, unpack, unpack_padded
from rlseq.engine.packed.together import pack_together
from rlseq.training.update.forward import forward

HEAD = [3, 14, 15, 9]
ALIKE = [
    ([*HEAD, 5], [[10, 11, 2], [12], [10, 11, 4]]),
    ([16, 15, 8], [[7, 2], [7, 3]]),  # begins as no other
    ([*HEAD, 5, 10], [[11, 2], []]),  # continues as a completion of the first does
    ([*HEAD, 6, 7], [[10, 11, 2]]),
]
OPTIONS = {"pad_id": PAD, "whole_groups": True}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Heads pay from the first token on."""
    monkeypatch.setattr(common_prefix, "LEAST_SAVED", 1)
    monkeypatch.setattr(common_prefix, "LEAST_SHARE", 0.0)


def test_a_row_is_the_one_written_by_hand():
    batch = pack_together([([1, 2, 5], [[10], [11]]), ([1, 2, 6], [[12]])], **OPTIONS)
    o = IGNORED
    assert batch.input_ids.tolist() == [[1, 2, 5, 10, 5, 11, 2, 6, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 1, 2, 3]]
    assert batch.labels.tolist() == [[o, o, o, 10, o, 11, o, o, 12]]  # what is left of the prompts is not scored
    assert batch.lengths == (1, 1, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(family, attention):
    model = tiny_model(family, dtype=torch.float64, attn_implementation=attention)
    weights = [torch.arange(1.0, len(c) + 1, dtype=torch.float64) for _, cs in ALIKE for c in cs]
    batch = pack_together(ALIKE, dtype=torch.float64, attention=attention, **OPTIONS)
    assert batch.input_ids.shape == (2, 18)  # three prompts and their four completions; and the one that begins alone
    found = unpack(shifted_logprobs(model, batch), batch)
    expected = [alone(model, p, c) for p, cs in ALIKE for c in cs]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    together_ = gradients(model, sum((a * w).sum() for a, w in zip(found, weights, strict=True)))
    apart = gradients(model, sum((b * w).sum() for b, w in zip(expected, weights, strict=True)))
    for name, gradient in apart.items():
        # a norm is computed in float32
        torch.testing.assert_close(together_[name], gradient, atol=2e-5 * gradient.abs().max().item(), rtol=1e-3)


def test_long_rows_are_split_and_keep_the_order_of_completions(monkeypatch):
    monkeypatch.setattr(together, "ROW_TOKENS", 14)
    model = tiny_model(dtype=torch.float64)
    batch = pack_together(ALIKE, dtype=torch.float64, **OPTIONS)
    assert len(batch.input_ids) > 1
    width = max(batch.lengths)
    padded = unpack_padded(shifted_logprobs(model, batch), batch, width)
    expected = [alone(model, p, c) for p, cs in ALIKE for c in cs]
    for row, wanted in zip(padded, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, atol=2e-6, rtol=0)


def test_groups_that_begin_differently_or_have_no_completion_are_packed_as_before():
    assert pack_together([([1], [[2]]), ([3, 4], [[5]])], **OPTIONS) is None
    assert pack_together([([*HEAD, 5], [[2]]), ([*HEAD, 6], [])], **OPTIONS) is None


def test_an_update_s_log_probs_are_those_of_rows_packed_apart(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    prompts = [tuple(p) for p, cs in ALIKE for _ in cs]
    completions = [tuple(c) for _, cs in ALIKE for c in cs]
    references = [((9, 2), (10, 11)) for _ in prompts]
    options = {"packs": True, "pad_id": PAD, "dtype": torch.float64, "device": torch.device("cpu")}

    def scores():
        return forward(model, prompts, completions, 5, references=references, attention="sdpa", **options)

    joined = scores()
    monkeypatch.setattr(common_prefix, "LEAST_SAVED", 10**9)
    apart = scores()
    torch.testing.assert_close(joined.logprobs, apart.logprobs, atol=2e-6, rtol=0)
    torch.testing.assert_close(joined.entropies, apart.entropies, atol=2e-6, rtol=0)
    for a, b in zip(joined.references.logprobs, apart.references.logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
