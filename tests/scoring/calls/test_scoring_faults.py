"""What happens when a reward goes wrong: statuses, on_error, killed workers, retries, the cache."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_rollouts import only, score

from rlseq.errors import RewardError
from rlseq.scoring import reward


@reward(range=(-1, 1))
def moody(completion):
    if completion == "raise":
        raise ValueError("cannot read this")
    if completion == "exit":
        sys.exit(3)
    return {
        "none": None,
        "nan": math.nan,
        "inf": math.inf,
        "text": "0.5",
        "numpy": np.float32(0.25),
        "bool": True,
        "dict": {"score": 1},
        "array": np.array([1.0, 2.0]),
        "pair": (0.75, {"why": "so"}),
        "nan pair": (math.nan, {"why": "so"}),
    }.get(completion, 0.5)


# Statuses and on_error


@pytest.mark.parametrize(
    ("completion", "value", "status"),
    [
        ("fine", 0.5, "ok"),
        ("", 0.5, "ok"),
        ("none", None, "abstained"),
        ("numpy", 0.25, "ok"),
        ("bool", 1.0, "ok"),
        ("pair", 0.75, "ok"),
        ("raise", None, "error"),
        ("exit", None, "error"),
        ("nan", None, "invalid"),
        ("inf", None, "invalid"),
        ("text", None, "invalid"),
        ("dict", None, "invalid"),
        ("array", None, "invalid"),
        ("nan pair", None, "invalid"),
    ],
)
def test_every_value_has_a_status(completion, value, status):
    table = score({"func": moody, "on_error": "abstain"}, [completion])
    assert (only(table, "values"), only(table, "status")) == ([value], [status])


@pytest.mark.parametrize(
    ("completion", "what"), [("raise", "raised"), ("nan", "gave no usable value"), ("inf", "gave no usable value")]
)
def test_by_default_a_failure_ends_the_run_naming_reward_prompt_and_completion(completion, what):
    with pytest.raises(RewardError) as caught:
        score(moody, ["fine", completion])
    message = str(caught.value)
    assert all(
        part in message for part in (f"reward 'moody' {what}", "'row-1'", f"completion '{completion}'", "on_error")
    )
    if completion == "raise":
        assert "ValueError: cannot read this" in message
        assert Path(__file__).name in message  # where it was raised


def test_abstain_leaves_failures_out_and_floor_gives_the_lowest_value():
    texts = ["fine", "raise", "nan", "none"]
    assert only(score({"func": moody, "on_error": "abstain"}, texts), "values") == [0.5, None, None, None]
    floored = score({"func": moody, "on_error": "floor"}, texts)
    assert only(floored, "values") == [0.5, -1.0, -1.0, None]
    assert only(floored, "status") == ["ok", "error", "invalid", "abstained"]
    assert only(score({"func": moody, "on_error": "floor", "floor": -9}, texts), "values")[1] == -9.0


def test_failures_are_counted_apart_from_abstentions_and_zeros():
    table = score({"func": moody, "on_error": "floor"}, ["raise", "nan", "none", "fine"])
    assert table.failures == {"moody": 2}
    assert table.failure_counts == {"moody": {"abstained": 1, "error": 1, "timeout": 0, "invalid": 1}}
    assert "ValueError" in table.messages["moody"][0]


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 3, [], 1.0, None, "ab", {"rewards": [1.0, 1.0]}])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_wrong_count_is_always_an_error_naming_the_reward(returned, on_error):
    def batch(completions, **kwargs):
        return returned

    with pytest.raises(RewardError, match=r"reward 'batch' returned .*2"):
        score({"func": batch, "on_error": on_error}, ["a", "b"])


def test_one_bad_value_in_a_batch_spoils_no_other():
    def batch(completions, **kwargs):
        return [1.0, math.nan, None, (0.5, {"n": 1})]

    table = score({"func": batch, "on_error": "abstain"}, ["a", "b", "c", "d"])
    assert only(table, "status") == ["ok", "invalid", "abstained", "ok"]
    assert only(table, "details")[3] == {"n": 1}


def test_a_broken_reward_stops_the_run_although_it_may_abstain():
    spec = {"func": moody, "on_error": "abstain"}
    assert score(spec, ["fine"] * 38 + ["raise"] * 2, max_error_rate=0.05).failures == {"moody": 2}
    with pytest.raises(RewardError, match=r"failed on 3 of 40 completions, more than max_error_rate = 0\.05"):
        score(spec, ["fine"] * 37 + ["raise"] * 3, max_error_rate=0.05)


def test_one_failure_in_a_small_batch_is_no_proof_unless_none_is_allowed():
    spec = {"func": moody, "on_error": "abstain"}
    assert score(spec, ["fine", "raise"], max_error_rate=0.05).failures == {"moody": 1}
    with pytest.raises(RewardError, match="failed on 1 of 2"):
        score(spec, ["fine", "raise"], max_error_rate=0.0)


# Worker processes


def test_async_calls_are_bounded_retried_and_kept_in_order():
    state = {"now": 0, "most": 0, "tries": 0}

    async def judge(completion):
        state["now"] += 1
        state["most"] = max(state["most"], state["now"])
        await asyncio.sleep(0.02)
        state["now"] -= 1
        if completion == "7" and state["tries"] < 1:
            state["tries"] += 1
            raise ConnectionError("busy")
        return float(completion)

    texts = [str(i) for i in range(12)]
    assert only(score({"func": judge, "concurrency": 3}, texts), "values") == [float(t) for t in texts]
    assert state["most"] == 3
    assert state["tries"] == 1


def test_an_async_reward_that_keeps_failing_is_an_error_after_its_retries():
    tries = []

    async def judge(completion):
        tries.append(completion)
        raise ConnectionError("down")

    table = score({"func": judge, "retries": 1, "on_error": "abstain"}, ["a"])
    assert only(table, "status") == ["error"]
    assert tries == ["a", "a"]


def test_a_cancelled_wait_of_an_async_reward_is_an_error_of_that_completion():
    async def judge(completion):
        if completion == "cancelled":
            raise asyncio.CancelledError
        return 1.0

    table = score({"func": judge, "retries": 0, "on_error": "abstain"}, ["a", "cancelled", "b"])
    assert only(table, "values") == [1.0, None, 1.0]
    assert only(table, "messages")[1].startswith("CancelledError")


def test_a_coroutine_that_a_plain_function_returns_is_explained():
    async def judge(completion):
        return 1.0

    def wrapped(completion):
        return judge(completion)

    with pytest.raises(RewardError, match=r"a coroutine that nobody awaits; declare the reward itself with async def"):
        score(wrapped, ["a"])
