"""What rewards are handed: copies, in the types of the library that a reward was written for."""

import asyncio
import contextlib
import time

import pytest
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError
from rlseq.scoring import reward
from rlseq.scoring.calls import waiting
from rlseq.scoring.calls.copies import fresh

CHAT = [{"role": "user", "content": "6*7?"}]
REPLY = {"role": "assistant", "content": "<answer>42</answer>"}


def score(spec, rollouts, columns=None, **options):
    columns = {"prompt": ["?"] * len(rollouts), **(columns or {})}
    with load_rewards([spec], **options) as suite:
        return suite.score(rollouts, columns)


def chat_values(spec, messages=(REPLY,), prompt=CHAT):
    table = score(spec, [rollout(REPLY["content"], messages=messages)], {"prompt": [prompt]})
    return next(iter(table.values.values()))


def test_trl_rewards_get_lists_of_dicts_for_chat_data():
    def kinds(prompts, completions, **kwargs):
        everything = [prompts, *prompts, completions, *completions]
        assert {type(one) for one in everything} == {list}
        assert {type(turn) for chat in (*prompts, *completions) for turn in chat} == {dict}
        return [float(len(prompt + completion)) for prompt, completion in zip(prompts, completions, strict=True)]

    assert chat_values(kinds, prompt=tuple(CHAT)) == [2.0]


def test_one_at_a_time_rewards_get_messages_and_prompt_as_lists():
    def kinds(completion, messages, prompt):
        return float(type(completion) is str and type(messages) is list and type(prompt) is list)

    assert chat_values(kinds, prompt=tuple(CHAT)) == [1.0]


def by_loop(completion, **kwargs):
    return float(any("<answer>" in m["content"] for m in completion if m["role"] == "assistant"))


def by_guarded_loop(completion, **kwargs):
    answers = [m for m in completion if getattr(m, "get", lambda _: None)("role") == "assistant"]
    return float(any("<answer>" in m["content"] for m in answers))


def by_last(completion, answer=""):
    return float("42" in completion[-1]["content"])


def by_last_kept(completion):
    last = completion[-1]
    return float("42" in last["content"])


def by_type(completion):
    return float(len(completion) == 1) if isinstance(completion, list) else 0.0


async def by_get(completion):
    return float(any(turn.get("role") == "assistant" for turn in reversed(completion)))


@pytest.mark.parametrize("theirs", [by_loop, by_guarded_loop, by_last, by_last_kept, by_type, by_get])
def test_a_reward_in_verifiers_convention_reads_messages(theirs):
    assert chat_values(theirs) == [1.0]
    text = score(theirs, [rollout("<answer>42</answer>")])  # of a text prompt: one message of the assistant
    assert next(iter(text.values.values())) == [1.0]


def last_reply(turns):
    return last_of(turns, "assistant")["content"]


def last_of(turns, role):
    return [turn for turn in turns if getattr(turn, "get", lambda _: None)("role") == role][-1]


def content_of(message):
    return message["content"] if hasattr(message, "keys") else ""


def text_of_either(turns):
    return turns if isinstance(turns, str) else turns[-1]["content"]


class Reader:
    def text(self, turns):
        return "".join(turn.get("content") for turn in turns) if not hasattr(turns, "lower") else ""

    def from_the_end(self, turns):
        return self.from_the_end(turns[1:]) if len(turns) > 1 else turns[0]["content"]

    def by_recursion(self, completion):
        return float("42" in self.from_the_end(completion))

    def by_method(self, completion):
        return float("42" in self.text(completion))

    async def __call__(self, completion):
        return float("42" in self.text(turns=completion))


READER = Reader()


def by_helper(completion):
    return float("42" in last_reply(completion))


def by_helper_of_one_message(completion):
    return float(any("42" in content_of(message=turn) for turn in completion))


def by_method_of_an_object(completion):
    return float("42" in READER.text(completion[-1:]))


def by_helper_in_a_closure():
    def inner(turns):
        return turns[-1]["content"]

    def closed(completion):
        return float("42" in inner(completion))

    return closed


@pytest.mark.parametrize(
    "theirs",
    [
        by_helper,
        by_helper_of_one_message,
        by_method_of_an_object,
        by_helper_in_a_closure(),
        READER.by_method,
        READER.by_recursion,
        {"func": READER, "name": "reader"},
    ],
)
def test_a_reward_whose_helper_reads_messages_gets_messages(theirs):
    assert chat_values(theirs) == [1.0]
    text = score(theirs, [rollout("<answer>42</answer>")])
    assert next(iter(text.values.values())) == [1.0]


def test_a_reward_whose_helper_takes_text_too_or_reads_something_else_keeps_its_completion_as_text():
    def either(completion):
        return float(type(completion) is str and "42" in text_of_either(completion))

    def other(completion, prompt):
        return float(type(completion) is str and "6" in content_of(prompt[-1]) and recursive(completion) == completion)

    def recursive(text):
        return text if len(text) else recursive(text)

    assert chat_values(either) == chat_values(other) == [1.0]


def test_columns_can_say_that_a_completion_is_handed_over_as_messages():
    def hidden(completion):
        return float("42" in globals()["last_" + "reply"](completion))  # which no source tells

    spec = {"func": hidden, "columns": {"completion": "messages"}}
    assert chat_values(spec) == [1.0]
    text = score(spec, [rollout("<answer>42</answer>")])
    assert next(iter(text.values.values())) == [1.0]


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (by_last, {"completion": "answer"}),
        (by_last, {"raw_completion": "messages"}),
        (lambda completions, **columns: [1.0] * len(completions), {"completions": "messages"}),
    ],
)
def test_columns_of_what_was_sampled_are_refused_in_one_line(function, columns):
    with pytest.raises(RewardError, match=r"which the model sampled; it is not a column\. Only") as refused:
        load_rewards([{"func": function, "columns": columns}])
    assert "\n" not in str(refused.value)


def test_a_reward_that_reads_the_prompts_messages_keeps_its_completion_as_text():
    def ours(completion, prompt):
        return float(type(completion) is str and "6" in prompt[-1]["content"] and all(c != "#" for c in completion))

    assert chat_values(ours) == [1.0]


def greedy(completion, references):
    total = 0.0
    while references:
        total += len(references.pop())
    return total


def nested(completion, info):
    info["tags"].append("x")
    info["more"]["n"] += 1
    return len(info["tags"]) + info["more"]["n"]


async def later(completion, info):
    return nested(completion, info)


def batch(completions, info, **kwargs):
    return [nested(None, one) for one in info]


@pytest.mark.parametrize("form", [nested, later, batch])
def test_a_reward_that_changes_nested_columns_changes_nothing(form):
    info = {"tags": [], "more": {"n": 1}}
    table = score(
        form, [rollout("a b", sample=i) for i in range(4)], {"info": [info] * 4}
    )  # one row, sampled four times
    assert next(iter(table.values.values())) == [3.0] * 4  # one tag and 1 + 1
    assert info == {"tags": [], "more": {"n": 1}}


def test_references_are_there_after_a_reward_has_emptied_them():
    references = [["abc"]] * 4
    table = score(greedy, [rollout("a b", sample=i) for i in range(4)], {"references": references})
    assert table.values["greedy"] == [3.0] * 4
    assert references == [["abc"]] * 4


def test_messages_of_a_rollout_and_arguments_of_a_spec_are_copies_too():
    def changed(completions, seen):
        seen.append(1)
        completions[0].append(completions[0][0].pop("content"))
        return [float(len(seen))]

    turn = dict(REPLY)
    one = rollout("x", messages=(turn,))
    seen = []
    with load_rewards([{"func": changed, "kwargs": {"seen": seen}}]) as suite:
        values = [suite.score([one], {"prompt": [CHAT]}).values["changed"] for _ in range(2)]
    assert values == [[1.0], [1.0]]
    assert (turn, seen) == (REPLY, [])


def test_each_attempt_of_an_async_reward_starts_from_the_same_arguments():
    async def flaky(completion, references):
        references.pop()
        if not tries.append(1) and len(tries) < 3:
            raise ConnectionError("down")
        return float(len(references))

    tries = []
    assert score(flaky, [rollout("a b")], {"references": [["a", "b"]]}).values["flaky"] == [1.0]


def test_arrays_tensors_and_sets_are_copied_and_clients_are_not():
    import numpy as np
    import torch

    class Client:
        pass

    client, given = Client(), {"array": np.zeros(2), "tensor": torch.zeros(2), "set": {1}, "pair": ([1], 2)}
    copied = fresh(given | {"client": client})
    copied["array"][0] = copied["tensor"][0] = 5
    copied["set"].add(2)
    copied["pair"][0].append(2)
    assert copied["client"] is client
    assert (given["array"].tolist(), given["tensor"].tolist()) == ([0, 0], [0, 0])
    assert (given["set"], given["pair"]) == ({1}, ([1], 2))


def test_details_are_kept_as_they_were_when_the_reward_returned_them():
    shared = {"count": 0, "list": []}

    def counting(completion):
        shared["count"] += 1
        shared["list"].append(shared["count"])
        return 1.0, shared

    table = score(counting, [rollout("a b", sample=i) for i in range(2)])
    assert table.details["counting"] == [{"count": 1, "list": [1]}, {"count": 2, "list": [1, 2]}]


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
