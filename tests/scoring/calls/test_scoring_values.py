"""What a reward may return or raise: ranges, odd values, errors of any kind, late answers, large weights."""

import asyncio
import contextlib
import time

import pytest
from test_scoring_handover import by_get, score
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError
from rlseq.scoring import reward
from rlseq.scoring.calls import waiting


@reward(range=(0, 1))
def above(completion):
    return float(completion)


@reward(range=(0, 1))
def above_batch(completions):
    return [(float(text), {"text": text}) for text in completions]


@pytest.mark.parametrize("ranged", [above, above_batch])
def test_a_value_outside_the_declared_range_is_invalid_by_name(ranged, tmp_path):
    texts = ["500", "1", "-500", "0.5"]
    for cache in (False, str(tmp_path / "kept"), str(tmp_path / "kept")):
        spec = {"func": ranged, "on_error": "abstain", "cache": cache}
        table = score(spec, list(map(rollout, texts)), max_error_rate=1.0)
        name = ranged.__name__
        assert table.values[name] == [None, 1.0, None, 0.5]
        assert table.status[name] == ["invalid", "ok", "invalid", "ok"]
        assert table.messages[name][0] == "returned 500, outside the range 0 to 1 that it declares"


def test_rounding_does_not_leave_the_declared_range():
    assert score(above, [rollout(str(1 + 2**-50))]).status["above"] == ["ok"]


class Sad:
    def __repr__(self):
        raise RuntimeError

    __str__ = __repr__


class SadError(Exception):
    def __str__(self):
        raise RuntimeError


class OfItsOwn(BaseException):
    pass


def raising(error):
    def t(completion):
        raise error

    return t


def returning(make):
    def t(completion):
        return make()

    return t


def timedelta():
    import numpy as np

    return np.timedelta64(5, "s")


def sparse():
    import torch

    return torch.ones(2).to_sparse()


@pytest.mark.parametrize(
    ("t", "status", "said"),
    [
        (returning(lambda: 1e300), "invalid", "1e\\+300, which training cannot compute with"),
        (returning(lambda: [1e300, 0]), "invalid", "1e\\+300, which training cannot compute with"),
        (returning(lambda: 10**400), "invalid", "returned inf"),
        (returning(timedelta), "invalid", "timedelta64 that cannot be read"),
        (returning(sparse), "invalid", "Tensor that cannot be read"),
        (returning(Sad), "invalid", "<Sad, of which repr\\(\\) raises RuntimeError>"),
        (raising(SadError()), "error", "SadError: <SadError, of which str\\(\\) raises RuntimeError>"),
        (raising(OfItsOwn("x")), "error", "OfItsOwn: x"),
        (raising(SystemExit(3)), "error", "SystemExit: 3"),
        (raising(GeneratorExit()), "error", "GeneratorExit"),
    ],
)
def test_values_and_errors_of_any_kind_are_the_rewards_failure(t, status, said):
    table = score({"func": t, "on_error": "abstain"}, [rollout("a b")])
    assert table.status["t"] == [status]
    with pytest.raises(RewardError, match=said):
        score(t, [rollout("a b")])


def test_details_that_hold_themselves_or_have_no_text_are_kept_as_far_as_they_go():
    def t(completion):
        cycle = {"n": 1}
        cycle["self"] = cycle
        return 1.0, {"cycle": cycle, "sad": Sad(), "sparse": sparse(), Sad(): 1, "large": 10**5000}

    (details,) = score(t, [rollout("a b")]).details["t"]
    assert details["cycle"]["self"]["self"]["n"] == 1
    assert details["sad"] == "<Sad, of which str() raises RuntimeError>"
    assert details["large"] == "a whole number of 16610 bits"  # 5000 · log2(10) = 16609.6


async def cancels_itself(completion):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def interrupts(completion):
    raise KeyboardInterrupt


async def interrupts_in_a_task(completion):
    async def inner():
        raise KeyboardInterrupt

    await asyncio.ensure_future(inner())


async def will_not_be_cancelled(completion):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("t", "status", "said"),
    [
        (cancels_itself, "error", "CancelledError"),
        (interrupts, "error", "KeyboardInterrupt"),
        (interrupts_in_a_task, "error", "KeyboardInterrupt"),
        (will_not_be_cancelled, "timeout", "no answer within 0.2 s"),
    ],
)
def test_an_async_reward_that_ends_its_task_or_loop_fails_alone(t, status, said):
    spec = {"func": t, "name": "t", "retries": 0, "on_error": "abstain", "concurrency": 2}
    if status == "timeout":
        one = load_rewards([spec])
        one.rewards[0].executor.retry = type(one.rewards[0].executor.retry)(2, 0, 0.2)
        table = one.score([rollout("a b")], {"prompt": ["?"]})
    else:
        table = score(spec, [rollout("a b")])
    assert table.status["t"] == [status]
    assert table.messages["t"][0].startswith(said)
    assert score(by_get, [rollout("a b")]).values["by_get"] == [1.0]  # the loop is there for the next


def test_an_async_reward_that_stops_its_loop_is_answered_all_the_same():
    async def stops(completion):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return 1.0

    assert score(stops, [rollout("a b"), rollout("a b", sample=1)]).values["stops"] == [1.0, 1.0]


def test_a_reward_that_does_not_return_is_named_while_it_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "FIRST", 0.1)
    monkeypatch.setattr(waiting, "POLL", 0.05)

    def slow(completion):
        time.sleep(1.3)
        return 1.0

    assert score(slow, [rollout("a b")]).values["slow"] == [1.0]
    assert "still waiting for reward 'slow'" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [1e12, -1e12, 1e300])
def test_weights_that_make_a_total_too_large_to_train_on_are_refused(weight):
    def large(completion):
        return 1e10

    def small(completion):
        return 1.0

    suite = load_rewards([large, small], weights=[weight, 1.0])
    with pytest.raises(
        RewardError, match=r"the reward of a completion, the weighted sum, is -?(1e|inf).* at most 1e\+18"
    ) as refused:
        suite.score([rollout("a b")], {"prompt": ["?"]})
    assert str(refused.value).endswith(f"Lower the weights: large {weight:g}, small 1")
    assert load_rewards([large, small], weights=[1e8, 1.0]).score([rollout("a b")], {"prompt": ["?"]}).totals == [
        1e18 + 1
    ]
