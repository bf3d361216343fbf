"""Finding rewards, detecting their signatures, and what they are called with."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace

import pytest
from tiny_rollouts import rollout, source_writer, values

from rlseq import load_rewards
from rlseq.errors import RewardError
from rlseq.scoring import reward


@pytest.fixture
def folder(tmp_path):
    return source_writer(tmp_path)


# Forms


def test_one_at_a_time_gets_fields_and_columns_by_name():
    seen = []

    def f(completion, answer, prompt, completion_ids, raw_completion, finish_reason, prompt_key, sample, extra=7):
        seen.append(
            (completion, answer, prompt, completion_ids, raw_completion, finish_reason, prompt_key, sample, extra)
        )
        return len(completion)

    assert values(f, [rollout("a b", key="k", finish="length")], {"answer": [3], "unused": [0]}) == [3.0]
    assert seen == [("a b", 3, "q", [0, 1], "a b</s>", "length", "k", 0, 7)]


def test_a_catch_all_gets_every_field_and_column():
    def f(completion, **kwargs):
        assert {"prompt", "answer", "finish_reason"} <= kwargs.keys()
        return kwargs["answer"]

    assert values(f, ["a", "b"], {"answer": [1, 2]}) == [1.0, 2.0]


def test_a_column_with_a_default_is_still_given():
    def f(completion, answer=None):
        return answer

    assert values(f, ["a"], {"answer": [5]}) == [5.0]
    assert values(f, ["a"]) == [None]


def test_a_column_cannot_shadow_the_completion_but_shadows_the_lesser_fields():
    def f(completion, sample):
        return float(completion == "mine") + 10 * sample

    assert values(f, ["mine"], {"completion": ["theirs"], "sample": [4]}) == [41.0]


def test_completion_is_text_for_chat_data_and_messages_hold_the_rest():
    chat = ({"role": "assistant", "content": "hi"},)

    def f(completion, messages, prompt):
        return float(completion == "hi" and messages == list(chat) and prompt[0]["role"] == "user")

    assert values(f, [rollout("hi", messages=chat)], {"prompt": [[{"role": "user", "content": "x"}]]}) == [1.0]


# Written for TRL, as its documentation shows them, and not changed
TRL_FILES = {
    "ids": (
        "def reward_func(completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n",
        [2, 1],
    ),
    "text": (
        "def reward_func(completions, ground_truth, **kwargs):\n"
        "    return [1.0 if c == gt else 0.0 for c, gt in zip(completions, ground_truth)]\n",
        [1, 0],
    ),
    "log": (
        "def reward_func(prompts, completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):\n"
        "    log_extra('n', [len(c) for c in completions])\n"
        "    log_metric('mean', 1.0)\n"
        "    return [float(trainer_state.global_step), None]\n",
        [9, None],
    ),
}


@pytest.mark.parametrize("name", TRL_FILES)
def test_a_reward_written_for_trl_works_unchanged(name, folder):
    source, expected = TRL_FILES[name]
    path = folder("theirs.py", source)
    logged = {}
    context = SimpleNamespace(
        trainer_state=SimpleNamespace(global_step=9),
        log_extra=lambda column, items: logged.update({column: items}),
        log_metric=lambda metric, value: logged.update({metric: value}),
    )
    suite = load_rewards([f"{path}:reward_func"])
    columns = {"prompt": ["q", "q"], "ground_truth": ["a b", "x"]}
    table = suite.score([rollout("a b"), rollout("b")], columns, context=context)
    assert table.values["reward_func"] == expected
    assert logged == ({"n": [3, 1], "mean": 1.0} if name == "log" else {})


def test_a_trl_reward_for_chat_gets_messages_and_a_marked_one_gets_text():
    def theirs(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    @reward
    def ours(completions):
        return [float(len(completion)) for completion in completions]

    chat = [rollout("hey", messages=({"role": "assistant", "content": "hey"},))]
    assert values(theirs, chat) == values(ours, chat) == [3.0]


def test_a_trl_catch_all_gets_no_column_that_trl_would_hold_back():
    def theirs(completions, **kwargs):
        assert kwargs.keys() == {"prompts", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric"}
        return [0.0] * len(completions)

    assert values(theirs, ["a"], {"answer": [1], "completion": ["x"]}) == [0.0]


def test_verls_compute_score_works_unchanged():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert (data_source, extra_info) == ("openai/gsm8k", {"index": 3})
        return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str}

    suite = load_rewards([compute_score])
    columns = {
        "prompt": ["q"],
        "data_source": ["openai/gsm8k"],
        "reward_model": [{"style": "rule", "ground_truth": "72"}],
        "extra_info": [{"index": 3}],
    }
    table = suite.score([rollout("72")], columns)
    assert table.values == {"compute_score": [1.0]}
    assert table.details == {"compute_score": [{"acc": True, "pred": "72"}]}


def test_a_verl_scorer_without_data_source_and_with_more_parameters_works():
    def compute_score(solution_str, ground_truth, method="strict", score=1.0):
        return score if solution_str == ground_truth and method == "flexible" else 0

    spec = {"func": compute_score, "kwargs": {"method": "flexible"}, "columns": {"ground_truth": "answer"}}
    assert values(spec, ["7", "8"], {"answer": ["7", "7"]}) == [1.0, 0.0]


def test_openrlhfs_reward_func_works_unchanged():
    import torch

    def reward_func(queries, prompts, labels, **kwargs):
        rewards = torch.tensor(
            [float(q == f"{p}{label}</s>") for q, p, label in zip(queries, prompts, labels, strict=True)]
        )
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"length": torch.tensor([3, 4])}}

    suite = load_rewards([reward_func])
    table = suite.score([rollout("yes"), rollout("no")], {"prompt": ["is it? ", "or? "], "label": ["yes", "yes"]})
    assert table.values == {"reward_func": [1.0, 0.0]}
    assert table.details == {"reward_func": [{"length": 3}, {"length": 4}]}


def test_openrlhfs_plain_tensor_is_taken():
    import torch

    def reward_func(queries, prompts, labels):
        return torch.tensor([0.25, 0.5])

    assert values(reward_func, ["a", "b"], {"labels": ["x", "y"]}) == [0.25, 0.5]


def test_async_functions_of_each_form_serve():
    async def one(completion):
        await asyncio.sleep(0)
        return len(completion)

    async def batch(completions, **kwargs):
        return [float(len(c)) for c in completions]

    async def compute_score(solution_str, ground_truth):
        return {"score": len(solution_str)}

    async def reward_func(queries, prompts, labels):
        return [1.0] * len(queries)

    columns = {"ground_truth": ["", ""], "labels": ["", ""]}
    assert values(one, ["a", "bb"]) == values(batch, ["a", "bb"]) == [1.0, 2.0]
    assert values(compute_score, ["a", "bb"], columns) == [1.0, 2.0]
    assert values(reward_func, ["a", "bb"], columns) == [1.0, 1.0]


def test_an_async_reward_works_inside_a_running_loop():
    async def one(completion):
        return 2.0

    async def notebook_cell():
        return values(one, ["a"])

    assert asyncio.run(notebook_cell()) == [2.0]


def test_partials_and_callable_objects_serve():
    class Scorer:
        def __call__(self, completion):
            return 3

    def f(completion, bonus):
        return bonus

    assert values(Scorer(), ["a"]) == [3.0]
    assert values(functools.partial(f, bonus=4), ["a"]) == [4.0]


@pytest.mark.parametrize("made", ["self", "self, completion=None"])  # the second would pass for a function
def test_a_class_is_no_reward_but_its_instances_are(tmp_path, made):
    path = tmp_path / "f.py"
    methods = f"    def __init__({made}): pass\n    def __call__(self, completion): return 3\n"
    path.write_text(f"class Scorer:\n{methods}\nmine = Scorer()\n")
    with pytest.raises(RewardError, match=r"reward 'Scorer' is a class; .* Name an instance: `my_reward = Scorer\("):
        load_rewards([f"{path}:Scorer"])
    assert values(f"{path}:mine", ["a"]) == [3.0]


def test_what_fits_no_form_is_an_error_that_lists_the_forms():
    def f(compltion, answer):
        return 0

    with pytest.raises(RewardError) as caught:
        load_rewards([f])
    message = str(caught.value)
    assert all(
        part in message
        for part in ("(compltion, answer)", "Did you mean 'completion'?", "solution_str", "queries", "TRL")
    )


@pytest.mark.parametrize("many", ["completions", "prompts"])
def test_one_row_and_many_in_one_signature_is_an_error(many):
    namespace = {}
    exec(f"def f(completion, {many}): return 0", namespace)
    with pytest.raises(RewardError, match=f"'completion', of one row, and for {many}, of many"):
        load_rewards([namespace["f"]])


# Groups


def test_a_group_reward_gets_all_completions_of_a_prompt_at_once():
    seen = []

    @reward(scope="group")
    def best(completions, references):
        seen.append((completions, references))
        top = max(map(len, completions))
        return [float(len(c) == top) for c in completions]

    rollouts = [
        rollout(t, key=k, sample=s) for t, k, s in [("a", "p", 0), ("bb", "q", 0), ("ccc", "p", 1), ("d", "q", 1)]
    ]
    columns = {"references": [["x"], ["y"], ["x"], ["y"]]}
    assert values(best, rollouts, {"prompt": ["1", "2", "1", "2"], **columns}) == [0.0, 1.0, 1.0, 0.0]
    assert seen == [(["a", "ccc"], [["x"], ["x"]]), (["bb", "d"], [["y"], ["y"]])]


def test_a_prompt_sampled_twice_in_a_batch_makes_two_groups():
    @reward(scope="group")
    def size(completions):
        return [float(len(completions))] * len(completions)

    assert values(size, [rollout(key="p", sample=s) for s in (0, 1, 0, 1)]) == [2.0] * 4


def test_scope_in_the_spec_hands_over_groups_to_an_unmarked_batch_function():
    def size(completions, **kwargs):
        return [float(len(completions))] * len(completions)

    rollouts = [rollout(key=k, sample=s) for k in "pq" for s in (0, 1)]
    assert values(size, rollouts) == [4.0] * 4
    assert values({"func": size, "scope": "group"}, rollouts) == [2.0] * 4


def test_group_scope_for_a_function_of_one_completion_is_an_error():
    with pytest.raises(RewardError, match="takes one completion at a time"):
        load_rewards([{"func": lambda completion: 0, "name": "f", "scope": "group"}])


# Columns


def test_a_missing_column_is_an_error_that_lists_the_columns_before_anything_runs():
    def f(completion, answr):
        raise AssertionError("called")

    suite = load_rewards([f])
    with pytest.raises(RewardError) as caught:
        suite.check_columns(["prompt", "answer", "level"])
    message = str(caught.value)
    assert "'f' asks for 'answr'" in message
    assert "Did you mean 'answer'?" in message
    assert "prompt, answer, level" in message


def test_columns_maps_a_parameter_to_a_column_of_another_name():
    def f(completion, references):
        return float(completion in references)

    spec = {"func": f, "columns": {"references": "answer"}}
    assert values(spec, ["a"], {"answer": [["a"]]}) == [1.0]
    with pytest.raises(RewardError, match=r"'answer', which is not a column\. Did you mean 'answers'"):
        load_rewards([spec]).check_columns(["prompt", "answers"])


def test_columns_of_a_wrong_length_are_an_error():
    with pytest.raises(RewardError, match="'answer' has 1 values for 2 rollouts"):
        values(lambda completion: 0, ["a", "b"], {"answer": [1]})


def test_no_rollouts_give_an_empty_table():
    table = load_rewards(["exact_match"]).score([], {"prompt": []})
    assert (table.scored, table.values, table.failures) == ([], {"exact_match": []}, {"exact_match": 0})


# Names, weights, sums
