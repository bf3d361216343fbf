"""Bits per byte of documents: against plain forwards, an arithmetic coder that decodes, and Hugging Face's own loop."""

import lzma
import math
from pathlib import Path

import pytest
import torch
from tiny_bytes import BOS, CONTEXT, EOS, VOCAB, byte_model, byte_tokenizer
from transformers import BloomConfig

from rlseq.evaluation.measure.documents import (
    Coding,
    coding_of,
    document_logprobs,
    windows,
)
from rlseq.evaluation.run import ContrastSettings
from rlseq.evaluation.studies.compression import lzma_bits

ROOT = Path(__file__).parents[2]
TEXTS = [
    "naïve text — with 🙂 and\r\ntabs\t, longer than the context by far.  ",
    "short",
    "x",
    "a second, middling document",
]
ROWS = [{"prompt": "a"}, {"prompt": "b"}]


def settings(**changes):
    changes = {"likelihood_dataset": "text.txt", **changes}
    return ContrastSettings(strategies=("greedy",), max_new_tokens=2, resamples=400, **changes)


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def given(sequence, place, coding):
    """The tokens before a place that its window holds: those of the first window, or of the first that reaches it."""
    begin = 0 if place < coding.context else coding.stride * math.ceil((place - coding.context + 1) / coding.stride)
    return sequence[begin:place]


def distribution(model, sequence, place, coding):
    """The probabilities (V,) of the token at a place of a sequence, by one plain forward of what it is given."""
    before = given(sequence, place, coding)
    if not before:
        return torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=torch.tensor([before])).logits[0, -1].double().softmax(-1)


def by_hand(model, tokens, coding):
    """Log-prob of each token, token by token."""
    start = [] if coding.start is None else [coding.start]
    sequence = [*start, *tokens]
    return [
        distribution(model, sequence, place, coding)[sequence[place]].log().item()
        for place in range(len(start), len(sequence))
    ]


CODINGS = [Coding(CONTEXT, 5, EOS, VOCAB), Coding(CONTEXT, 15, None, VOCAB), Coding(7, 1, BOS, VOCAB)]


def test_windows_score_every_token_once_with_the_context_that_is_promised():
    for tokens in range(40):
        for context in range(2, 10):
            for stride in range(1, context):
                scored = []
                for begin, first, end in windows(tokens, context, stride):
                    assert begin % stride == 0 and end - begin <= context and begin < first < end
                    scored += [(place, place - begin) for place in range(first, end)]
                assert [place for place, _ in scored] == list(range(1, tokens))
                assert all(before >= min(place, context - stride) for place, before in scored)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probs_are_those_of_plain_forwards_token_by_token(family, coding, monkeypatch):
    monkeypatch.setattr(
        "rlseq.engine.likelihood.pack", lambda *a, **k: pytest.fail("a mask of the window's length, squared")
    )
    model = byte_model(family)
    tokens = [[], *map(ids_of, TEXTS)]
    found = document_logprobs(model, tokens, coding)
    assert [len(x) for x in found] == [len(t) for t in tokens]
    for ids, logprobs in zip(tokens, found, strict=True):
        assert logprobs.tolist() == pytest.approx(by_hand(model, ids, coding), rel=1e-9, abs=1e-9)


def test_the_sum_is_that_of_hugging_face_s_strided_perplexity():
    model, coding = byte_model(), CODINGS[0]
    sequence = torch.tensor([[EOS, *ids_of(TEXTS[0])]])
    total, scored, previous_end = 0.0, 0, 0
    for begin in range(0, sequence.shape[1], coding.stride):  # as in its guide, "Perplexity of fixed-length models"
        end = min(begin + coding.context, sequence.shape[1])
        ids = sequence[:, begin:end]
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        counted = (labels != -100).sum().item() - (previous_end == 0)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * counted
        scored += counted
        previous_end = end
        if end == sequence.shape[1]:
            break
    (logprobs,) = document_logprobs(model, [ids_of(TEXTS[0])], coding)
    assert (len(logprobs), -logprobs.sum().item()) == (scored, pytest.approx(total, rel=1e-6))


# An arithmetic coder in exact integers: after n tokens the text is an interval [low, low + width) / TOTALⁿ.

PRECISION = 40
TOTAL = 2**PRECISION


def frequencies(model, sequence, place, coding):
    """The distribution as whole numbers above 0 that sum to TOTAL: f > p (TOTAL − V), and f < p TOTAL + V + 1."""
    p = distribution(model, sequence, place, coding).tolist()
    counts = [1 + int(x * (TOTAL - VOCAB)) for x in p]
    counts[p.index(max(p))] += TOTAL - sum(counts)
    return counts


def encode(model, tokens, coding):
    """(code, its bits)"""
    sequence = [] if coding.start is None else [coding.start]
    low, width, scale = 0, 1, 0
    for token in tokens:
        counts = frequencies(model, sequence, len(sequence), coding)
        low, width, scale = low * TOTAL + width * sum(counts[:token]), width * counts[token], scale + PRECISION
        sequence.append(token)
    bits = scale - (width.bit_length() - 1)  # steps of 2^−bits are no wider than the interval: one falls into it
    return -(-low >> (scale - bits)), bits


def decode(model, code, bits, number, coding):
    sequence = [] if coding.start is None else [coding.start]
    low, width, scale = 0, 1, 0
    for _ in range(number):
        counts = frequencies(model, sequence, len(sequence), coding)
        low, scale, token = low * TOTAL, scale + PRECISION, 0
        while (low + width * counts[token]) << bits <= code << scale:
            low += width * counts[token]
            token += 1
        width *= counts[token]
        sequence.append(token)
    return sequence[-number:]


@pytest.mark.parametrize("coding", CODINGS)
def test_an_arithmetic_coder_spends_the_bits_that_are_promised_and_decodes_the_text(coding):
    model, tokens = byte_model(), ids_of(TEXTS[0])
    assert len(tokens) > 4 * coding.context
    (logprobs,) = document_logprobs(model, [tokens], coding)
    promised = -logprobs.sum().item() / math.log(2)
    code, bits = encode(model, tokens, coding)
    # whole-number frequencies cost or gain a token at most this, by the bounds of `frequencies`
    lost = len(tokens) * math.log2(TOTAL / (TOTAL - VOCAB))
    gained = sum(math.log2(1 + (VOCAB + 1) / (TOTAL * p)) for p in logprobs.exp().tolist())
    assert lost < 1e-6 and gained < 1e-2
    assert 0 <= code < 2**bits
    assert promised - gained <= bits <= promised + 1 + lost  # so within 2 bits
    decoded = decode(model, code, bits, len(tokens), coding)
    assert decoded == tokens
    assert byte_tokenizer().decode(decoded) == TEXTS[0]


def test_coding_follows_the_model_the_tokenizer_and_the_options():
    config, both = byte_model().config, byte_tokenizer(bos_token="<bos>", eos_token="<eos>")
    assert coding_of(config, both, settings()) == Coding(16, 8, BOS, VOCAB)
    assert coding_of(config, byte_tokenizer(eos_token="<eos>"), settings()) == Coding(16, 8, EOS, VOCAB)
    assert coding_of(config, byte_tokenizer(), settings(likelihood_stride=15)) == Coding(16, 15, None, VOCAB)
    assert coding_of(config, byte_tokenizer(), settings(likelihood_context=11)) == Coding(11, 5, None, VOCAB)
    assert coding_of(config, byte_tokenizer(), settings(likelihood_context=99)) == Coding(16, 8, None, VOCAB)
    assert coding_of(config, byte_tokenizer(model_max_length=6), settings()) == Coding(6, 3, None, VOCAB)
    endless = BloomConfig(vocab_size=VOCAB)  # ALiBi has no longest position
    assert coding_of(endless, byte_tokenizer(), settings()) == Coding(2048, 1024, None, VOCAB)


def test_lzma_is_a_whole_code_of_the_text():
    text = (TEXTS[0] * 50).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    standard = lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters)  # with the preset's own dictionary
    assert lzma_bits(text) == 8 * len(standard)
    assert lzma.decompress(standard, format=lzma.FORMAT_RAW, filters=filters) == text
