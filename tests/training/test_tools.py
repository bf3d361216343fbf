"""Tools that the model calls while it answers: what is trained of such a rollout, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny_chat import scripted_trainer
from tiny_task import ROWS, tiny_tokenizer

from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError, DataError, RlseqError
from rlseq.scoring.replay import read_rollouts
from rlseq.training.run.rollout_log import calls_tools
from rlseq.training.selection.rejection import read_candidates
from rlseq.training.tools import check_tools, load_tools

CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call><eos>'
ANSWER = "It is 42.<eos>"
PLAIN = "I do not know.<eos>"
CHAT = [{"prompt": [{"role": "user", "content": "6 times 7?"}], "references": ["42"]}]
CALLS = []


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the first.
        b: the second.
    """
    CALLS.append((a, b))
    return a * b


def untold(a, b):
    return a * b


def says_42(completion: str) -> float:
    return float("42" in completion)


def turn(row, text):
    """Every other row calls the tool, and answers once it sees the result."""
    return ANSWER if "<tool_response>" in text else PLAIN if row % 2 else CALL


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A step with the tool: the trainer, what its losses were given, and its gradients."""
    CALLS.clear()
    trainer, scripted = scripted_trainer(
        tmp_path,
        monkeypatch,
        turn,
        rows=CHAT,
        rewards=(says_42,),
        tools=[f"{__file__}:multiply"],
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=400,
        max_steps=1,
    )
    batches, compute = [], trainer.micro_batch_loss

    def remember(model, batch):
        batches.append(batch)
        return compute(model, batch)

    monkeypatch.setattr(trainer, "micro_batch_loss", remember)
    trainer.train()
    return trainer, batches, scripted


def test_a_rollout_holds_every_turn_and_trains_none_of_the_tools_words(trained):
    trainer, (batch,), scripted = trained
    assert CALLS == [] and len(scripted.seen) == 6  # the tool is the file's own; 4 first turns, 2 answers
    assert all('"name": "multiply"' in text for text in scripted.seen)  # the prompt tells of it
    for number, scored in enumerate(trainer.batch.scored):
        rollout, decode = scored.rollout, trainer.processing_class.decode
        own = decode([i for i, t in zip(rollout.completion_ids, rollout.loss_mask, strict=True) if t])
        others = decode([i for i, t in zip(rollout.completion_ids, rollout.loss_mask, strict=True) if not t])
        if number % 2:
            assert (own, others) == (PLAIN, "") and len(rollout.messages) == 1
            assert scored.total == 0.0
        else:
            # The words of the model, and what Qwen3's template puts between them, by hand.
            assert own == CALL + ANSWER
            assert others.strip() == (
                "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant"
            )
            assert [message["role"] for message in rollout.messages] == ["assistant", "tool", "assistant"]
            assert rollout.messages[1]["content"] == "42" and rollout.text == "It is 42." and scored.total == 1.0
        assert rollout.finish_reason == "stop"
    # The loss sees the same tokens.
    rows = zip(batch.completion_ids, batch.mask.tolist(), strict=True)
    tokens = {tuple(itertools.compress(ids, kept)) for ids, kept in rows}
    assert tokens == {tuple(trainer.processing_class(text=said).input_ids) for said in (CALL + ANSWER, PLAIN)}


def test_the_log_holds_every_turn_and_rescoring_gets_them(trained, tmp_path):
    trainer, _, _ = trained
    logged = read_rollouts(trainer.batches.log.folder)
    assert [list(rollout.messages) for rollout in logged.rollouts] == [
        json.loads(json.dumps(scored.rollout.messages)) for scored in trainer.batch.scored
    ]
    assert [len(rollout.messages) for rollout in logged.rollouts] == [3, 1, 3, 1]
    assert logged.rollouts[0].messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 6, "b": 7}


def test_a_call_alone_is_a_turn_that_is_logged():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    answer = {"role": "assistant", "content": "It is 42."}
    assert calls_tools([call]) and calls_tools([call, {"role": "tool", "content": "42"}, answer])
    assert not calls_tools([answer]) and not calls_tools(()) and not calls_tools(None)


def test_rollouts_with_calls_are_not_learnt_as_if_without_them(trained):
    trainer, _, _ = trained
    with pytest.raises(DataError, match="record 1: tools were called in it"):
        read_candidates([str(trainer.batches.log.folder.parent)])


def test_the_log_probs_of_the_tools_words_have_no_gradient(trained):
    trainer, (batch,), _ = trained
    found, compute = [], trainer.forward.scores

    def remember(*args, **options):
        scores = compute(*args, **options)
        found.append(scores.logprobs)
        scores.logprobs.retain_grad()
        return scores

    trainer.forward.scores = remember
    trainer.model.train()
    trainer.micro_batch_loss(trainer.model, batch).backward()
    assert torch.equal(found[0].grad != 0, batch.mask)


def test_a_tool_must_say_how_it_is_called():
    assert [tool.__name__ for tool in load_tools([f"{__file__}:multiply"])] == ["multiply"]
    with pytest.raises(ConfigError, match="does not tell a model how it is called"):
        load_tools([f"{__file__}:untold"])
    with pytest.raises(RlseqError, match="nowhere"):
        load_tools([f"{__file__}:nowhere"])
    with pytest.raises(ConfigError, match=r"tools: 'nofile\.py:f' is not found: there is no file"):
        load_tools(["nofile.py:f"])
    with pytest.raises(ConfigError, match=r"tools: 'multiply' names no function; expected path"):
        load_tools(["multiply"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"objective": "minimum_risk"}, "objective"),
        ({"advantage_baseline": "greedy"}, "advantage_baseline greedy"),
        ({"reference_loss_coef": 0.1}, "reference_loss_coef"),
        ({}, "a prompt is a text"),
    ],
)
def test_what_cannot_go_with_tools_is_refused(settings, named):
    config = GRPOConfig(output_dir="x", tools=["a:b"], num_generations=2, per_device_train_batch_size=2, **settings)
    with pytest.raises(ConfigError, match=named):
        check_tools(config, build_prompts(ROWS, tiny_tokenizer()))
