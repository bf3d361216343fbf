"""Steps of one shape: by brute force, each slot's logits are those of a plain forward of its whole sequence.

No GPU is needed: in place of a CUDA graph the tests record a step's operations with make_fx and replay those. As with a
graph, what Python did while recording is not done again, and a step that needs a number from a tensor cannot be
recorded.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import EOS, VOCAB, tiny_model
from tiny_shapes import tiny_shape
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, GPTNeoConfig

from rlseq.engine.decoding import backends, cuda_graph
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Greedy, Sample
from rlseq.types import Prompt

HELD = [[3, 4, 5], [6], [7, 8, 9], [10, 11]]
# Rows branch beyond the buffer, change places, end, and go on long enough to be replayed and to outgrow the tokens.
SOURCES = [None, [1, 1, 3, 0, 2, 3], [5, 4, 1], None, None, None, None, [0, 0, 0, 1], [3, 2, 1, 0], *[None] * 6]


class Tape:
    def __init__(self, operations, found):
        self.operations, self.found = operations, found
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.found.copy_(self.operations(torch.zeros(1)))


@pytest.fixture
def tapes(monkeypatch):
    """Steps are recorded and replayed; the list of what was recorded."""
    made = []

    def capture(step):
        operations = make_fx(lambda _: step())(torch.zeros(1))
        made.append(Tape(operations, torch.empty_like(step())))
        return made[-1], made[-1].found

    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(backends, "may_capture", lambda model: True)
    return made


def alone(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


@torch.no_grad()
def follow(model, state, sources_of_steps, held=HELD):
    """Advance through the steps, and compare each with forwards alone."""
    for number, sources in enumerate(sources_of_steps):
        index = range(len(held)) if sources is None else sources
        tokens = [(3 + number + 2 * i) % 23 for i in range(len(index))]
        held = [[*held[s], token] for s, token in zip(index, tokens, strict=True)]
        state.advance(None if sources is None else np.array(sources), np.array(tokens))
        expected = torch.stack([alone(model, ids) for ids in held])
        torch.testing.assert_close(state.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_each_slot_goes_on_as_its_sequence_alone(family, attention, tapes, monkeypatch):
    monkeypatch.setattr(cuda_graph, "TOKENS", 4)
    monkeypatch.setattr(cuda_graph, "MIN_HEADROOM", 4)
    model = tiny_model(family, attn_implementation=attention)
    with torch.no_grad():
        state = backends.cuda_graph_decoder(model, HELD, 6, 30)
    torch.testing.assert_close(state.logits[0], alone(model, HELD[0]).detach(), atol=1e-4, rtol=1e-4)
    follow(model, state, SOURCES)
    assert len(tapes) > 1 and sum(tape.replays for tape in tapes) >= 4 and state.refused is None


def test_a_shape_lasts_and_rows_that_idle_are_let_go():
    model = tiny_model()
    with torch.no_grad():
        state = backends.cuda_graph_decoder(model, [[3 + i] for i in range(16)], 64, 50)
    places, sizes = [], []
    model.register_forward_pre_hook(
        lambda _, args, inputs: places.append(
            tuple(inputs[name].data_ptr() for name in ("input_ids", "attention_mask", "position_ids"))
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for step in range(49):
            sources = np.repeat(np.arange(16), 4) if step == 10 else np.arange(5) if step == 20 else None
            state.advance(sources, np.full(16 if step < 10 else 64 if step < 20 else 5, 4))
            sizes.append(state._bias.shape)
    assert sizes == [(16, 1, 1, 64)] * 10 + [(64, 1, 1, 64)] * 10 + [(5, 1, 1, 64)] * 29
    assert len(set(places)) == 3


def test_sizes_of_rows():
    sizes = sorted({cuda_graph._sized(rows) for rows in range(1, 129)})
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert all(cuda_graph._sized(rows) >= rows for rows in range(1, 1000))


def test_rows_do_not_go_to_and_fro_between_two_sizes():
    with torch.no_grad():
        state = backends.cuda_graph_decoder(tiny_model(), [[3 + i % 20] for i in range(57)], 100, 60)
        for rows in (56, 57, 56, 57, 55, 57):
            state.advance(np.arange(rows) % len(state.logits), np.full(rows, 4))
            assert len(state._bias) == 64
        state.advance(np.arange(40), np.full(40, 4))
        assert len(state._bias) == 40


def compare(model, prompts, found):
    """The log-probs of rollouts with those of one plain forward a sequence."""
    for prompt, group in zip(prompts, found, strict=True):
        for rollout in group:
            ids = torch.tensor([[*prompt.prompt_ids, *rollout.completion_ids]])
            with torch.no_grad():
                rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)
            expected = rows.gather(-1, torch.tensor([rollout.completion_ids]).T)[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def sampled(model, strategy, **changes):
    prompts = [Prompt(str(i), "", tuple(range(3, 4 + i)), {}) for i in range(4)]
    settings = {"num_samples": 5 if strategy.is_stochastic else 1, "max_new_tokens": 30, "seed": 0, "stop_ids": [2]}
    return prompts, sample(model, prompts, strategy=strategy, **settings | changes)


@pytest.mark.parametrize("strategy", [Sample(), Greedy()])
def test_completions_have_the_log_probs_of_plain_forwards(strategy, tapes, capsys):
    model = tiny_model("qwen2")
    prompts, found = sampled(model, strategy)
    assert backends.select_backend(model) == "cuda_graph" and capsys.readouterr().out == ""
    assert sum(tape.replays for tape in tapes) > 20
    compare(model, prompts, found)


def test_weights_that_change_between_steps_count(tapes):
    # A graph reads the weights where they are: what the optimiser writes there is what the next replay uses.
    model = tiny_model()
    with torch.no_grad():
        state = backends.cuda_graph_decoder(model, HELD, 4, 30)
        for _ in range(cuda_graph.WARM + 1):
            state.advance(None, np.array([3, 4, 5, 6]))
        model.lm_head.weight.zero_()
        state.advance(None, np.array([3, 4, 5, 6]))
    assert tapes[0].replays == 2 and not state.logits.any()


@pytest.mark.parametrize(
    ("name", "way", "why"),
    [
        ("mistral", "padded", "something else than every token's keys"),  # a window
        ("qwen2_moe", "cuda_graph", None),
        ("qwen3_5", "padded", "something else than every token's keys"),  # states
    ],
)
def test_what_has_no_fixed_shape_is_decoded_as_before(name, way, why, tapes, capsys):
    model = tiny_model("mistral") if name == "mistral" else tiny_shape(name)
    sampled(model, Sample(), max_new_tokens=6)
    said = capsys.readouterr().out
    assert backends.select_backend(model) == way or (way == "cuda_graph" and "cannot be captured" in said)
    assert why is None or ("is decoded without a CUDA graph: " in said and why in said)


def test_windows_that_follow_the_columns_are_decoded_from_a_cache_that_grows(tapes, capsys):
    # The window is longer than the trial's prompts, so that the trial would not notice.
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "window_size": 64}
    layers = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128}
    config = GPTNeoConfig(
        vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=EOS, initializer_range=0.4, **sizes, **layers
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [Prompt("0", "", tuple(3 + i * i % 18 for i in range(70)), {})]
    found = sample(model, prompts, strategy=Sample(), num_samples=3, max_new_tokens=20, seed=0, stop_ids=[2])
    assert "windows are counted from the end of the buffer" in capsys.readouterr().out
    compare(model, prompts, found)


def test_a_step_that_cannot_be_captured_runs_kernel_by_kernel(tapes, monkeypatch, capsys):
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "capture", fails)
    model = tiny_model()
    sampled(model, Sample())
    assert backends.select_backend(model) == "padded"
    expected = "LlamaForCausalLM is decoded without a CUDA graph: its step cannot be captured (RuntimeError: operation "
    assert expected + "not permitted when stream is capturing)" in capsys.readouterr().out
    with torch.no_grad():
        state = backends.cuda_graph_decoder(model, HELD, 6, 30)
    follow(model, state, SOURCES)  # and where it fails later than in the trial, the steps go on
    assert state.refused


def test_what_may_be_captured(monkeypatch):
    model = tiny_model()
    assert not cuda_graph.may_capture(model)  # not on CUDA
    for parameter in model.parameters():
        monkeypatch.setattr(type(parameter), "device", torch.device("cuda:0"), raising=False)
    assert cuda_graph.may_capture(model)
    model.lm_head._hf_hook = object()  # accelerate moves its weights
    assert not cuda_graph.may_capture(model)
