"""What rewards are handed: copies, in the types of the library that a reward was written for."""

import pytest
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError
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
