"""What many prompts begin with is computed once, and every number is that of each prompt alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, MambaConfig

from rlseq.engine.decoding import common_prefix
from rlseq.engine.decoding.common_prefix import find_common_prefixes, serves
from rlseq.engine.decoding.decoders import CachedDecoder, SharedPrefixDecoder
from rlseq.engine.likelihood import divergence, score

SYSTEM, EXAMPLE = [3, 14, 15, 9, 2, 6, 5], [8, 9, 7, 4, 11]
PROMPTS = [
    [*SYSTEM, *EXAMPLE, 4],
    [*SYSTEM, *EXAMPLE, 5, 6, 7],
    [16, 15, 8],  # begins as no other
    [*SYSTEM, *EXAMPLE],  # its last token is not of the common prefix: something must follow it
    [*SYSTEM, *EXAMPLE, 5, 6, 7],  # twice
    [*SYSTEM, *EXAMPLE, 20, 1, 13, 20, 17, 5, 3, 2],
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Heads pay from the first token on."""
    monkeypatch.setattr(common_prefix, "LEAST_SAVED", 1)
    monkeypatch.setattr(common_prefix, "LEAST_SHARE", 0.0)


@pytest.fixture
def computed(monkeypatch):
    """The tokens of each forward pass."""
    shapes = []
    forward = torch.nn.Embedding.forward

    def counted(self, ids):
        if self.num_embeddings == VOCAB:
            shapes.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    return shapes


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def test_the_common_prefixes_are_those_that_save_the_most():
    prefixes = find_common_prefixes(PROMPTS)
    assert prefixes.ids == [[*SYSTEM, *EXAMPLE[:-1]]] and prefixes.of.tolist() == [0, 0, -1, 0, 0, 0]
    assert prefixes.lengths.tolist() == [11, 11, 0, 11, 11, 11]
    long = [[1] * 30, [1] * 29 + [2], [1] * 3 + [4], [1] * 3 + [5]]  # a prefix of 3 saves 9 tokens; one of 29 saves 29
    assert find_common_prefixes(long).lengths.tolist() == [29, 29, 0, 0]
    assert (
        find_common_prefixes([[1] * 6, [1] * 5 + [2], *([1] * 4 + [n] for n in range(3, 9))]).lengths.tolist()
        == [4] * 8
    )
    assert find_common_prefixes([[1, 2], [3, 4]]) is None and find_common_prefixes([[1, 2]]) is None


def test_random_prompts_against_every_threshold():
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompts = [rng.integers(0, 2, size=rng.integers(1, 9)).tolist() for _ in range(rng.integers(2, 9))]
        prefixes = find_common_prefixes(prompts)
        saved = 0 if prefixes is None else sum(prefixes.lengths) - sum(map(len, prefixes.ids))
        best = 0
        for least in range(1, 9):  # neighbours in sorted order stay together if they share `least`
            runs = [[sorted(prompts)[0]]]
            for a, b in itertools.pairwise(sorted(prompts)):
                together = min(len(a), len(b)) > least and a[:least] == b[:least]
                runs = [*runs[:-1], [*runs[-1], b]] if together else [*runs, [b]]
            saved_by_runs = []
            for run in runs:
                n = 0
                while n < min(map(len, run)) - 1 and len({tuple(p[: n + 1]) for p in run}) == 1:
                    n += 1
                saved_by_runs.append((len(run) - 1) * n)
            best = max(best, sum(saved_by_runs))
        assert saved == best
        for u, prompt in enumerate(prompts if prefixes else []):
            common = prefixes.ids[prefixes.of[u]] if prefixes.of[u] >= 0 else []
            assert prompt[: len(common)] == common and len(prompt) > len(common)


def test_short_prompts_are_left_as_they_are(monkeypatch):
    monkeypatch.undo()
    assert find_common_prefixes(PROMPTS) is None  # 62 tokens
    assert find_common_prefixes([[*range(200), n] for n in range(5)]).lengths.tolist() == [200] * 5
    assert find_common_prefixes([[1, *([n] * 200)] for n in range(600)]) is None  # one token of 201: 599 are saved


@pytest.mark.parametrize("decoder", [CachedDecoder, SharedPrefixDecoder])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_decoding_goes_on_as_from_each_prompt_alone(family, decoder, computed):
    model, held = tiny_model(family, dtype=torch.float64), [list(ids) for ids in PROMPTS]
    with torch.no_grad():
        found = decoder(model, held, 8, 40)
        assert computed == [(1, 11), (6, 9)]
        for sources in (None, [0, 0, 2, 1, 5, 4, 3, 3], [7, 2, 1], None):
            tokens = [(5 * n + 3) % VOCAB for n in range(len(sources or held))]
            found.advance(None if sources is None else np.array(sources), np.array(tokens))
            held = [[*held[s], t] for s, t in zip(sources or range(len(held)), tokens, strict=True)]
            expected = torch.stack([alone(model, ids)[-1] for ids in held])
            torch.testing.assert_close(found.logits.double(), expected, atol=2e-6, rtol=0)  # they are given in float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_scores_are_those_of_each_prompt_alone(family, attention, computed):
    model = tiny_model(family, dtype=torch.float64, attn_implementation=attention)
    prompts = [ids for ids in PROMPTS if PROMPTS.count(ids) == 1]  # equal ones share a packed row instead
    completions = [[5, 9, 2], [], [7], [11, 12, 13, 2, 6]]
    found = score(model, prompts, completions)
    assert computed[-2:] == [(1, 11), (4, 14)]  # the common prefix, and what follows it
    for prompt, completion, scores in zip(prompts, completions, found, strict=True):
        logits = alone(model, [*prompt, *completion]).log_softmax(-1)
        wanted = [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
        assert scores.tolist() == pytest.approx(wanted, abs=2e-6)  # a norm is computed in float32


def test_two_models_each_have_their_own_keys():
    p, b = (tiny_model(seed=seed, dtype=torch.float64) for seed in (0, 1))
    prompts, completions = [PROMPTS[0], PROMPTS[1], PROMPTS[5]], [[5, 9], [7], [11, 12, 2]]
    together = divergence(p, b, prompts, completions)
    for prompt, completion, found in zip(prompts, completions, together, strict=True):
        (expected,) = divergence(p, b, [prompt], [completion])
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_what_cannot_continue_from_a_prefix_is_computed_whole(computed):
    mistral = tiny_model("mistral")  # a window of 4 tokens would count the gaps
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1))
    assert not serves(mistral) and not serves(mamba) and serves(tiny_model())
    with torch.no_grad():
        CachedDecoder(mistral, PROMPTS)
    assert computed == [(6, 20)]
