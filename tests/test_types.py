"""A rollout is made of a prompt's key, token ids and text; the rest follows from them or is given."""

import math

import pytest

from rlseq import Rollout


def test_a_rollout_needs_a_prompt_key_ids_and_text():
    made = Rollout.from_ids("k", [5, 6, 2], "a b")
    assert (made.prompt_key, made.completion_ids, made.text) == ("k", (5, 6, 2), "a b")
    assert (made.sample, made.loss_mask, made.logprobs) == (0, (True, True, True), ())
    assert (made.text_with_special_tokens, made.messages, made.finish_reason) == ("a b", None, "stop")


def test_what_is_given_is_kept():
    given = {"sample": 3, "loss_mask": [False, True], "logprobs": [0.0, -1.5], "finish_reason": "length"}
    made = Rollout.from_ids("k", (5, 6), "a", text_with_special_tokens="<s> a", strategy="greedy", **given)
    assert (made.sample, made.loss_mask, made.logprobs) == (3, (False, True), (0.0, -1.5))
    assert (made.text_with_special_tokens, made.finish_reason, made.strategy) == ("<s> a", "length", "greedy")
    assert made.logprob == -1.5


def test_a_chat_gets_the_text_as_the_assistants_message_unless_it_has_messages():
    assert Rollout.from_ids("k", [1], "hi", chat=True).messages == ({"role": "assistant", "content": "hi"},)
    told = [{"role": "tool", "content": "4"}]
    assert Rollout.from_ids("k", [1], "hi", chat=True, messages=told).messages == told


def test_unknown_log_probs_have_no_sum():
    assert math.isnan(Rollout.from_ids("k", [1, 2], "a").logprob)
    assert Rollout.from_ids("k", [], "").logprob == 0


@pytest.mark.parametrize("wrong", [{"logprobs": [0.0]}, {"loss_mask": [True, True, True]}])
def test_numbers_that_do_not_fit_the_ids_are_an_error(wrong):
    with pytest.raises(ValueError, match="2 token ids"):
        Rollout.from_ids("k", [1, 2], "a", **wrong)
