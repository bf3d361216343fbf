"""Rewards that give one value a token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError


def one(returned, ids, **spec):
    """(value, status, details, message) of a reward that returns this for a completion of these tokens."""
    suite = load_rewards([{"func": lambda completion: returned, "name": "f", "on_error": "abstain", **spec}])
    table = suite.score([rollout(ids=ids)], {"prompt": ["q"]})
    return table.values["f"][0], table.status["f"][0], table.details["f"][0], table.messages["f"].get(0, "")


def tensor(values):
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize("kind", [list, tuple, np.array, tensor])
def test_one_value_a_token_sums_to_the_value_and_is_kept(kind):
    # 0.5 - 0.25 + 1 = 1.25, exact in binary
    assert one(kind([0.5, -0.25, 1.0]), (7, 8, 9))[:3] == (1.25, "ok", {"token_rewards": [0.5, -0.25, 1.0]})


def test_details_stand_beside_values_a_token():
    assert one(([1.0, 2.0], {"why": "so"}), (7, 8))[:3] == (3.0, "ok", {"why": "so", "token_rewards": [1.0, 2.0]})


def test_an_empty_completion_has_no_values_and_the_value_0():
    assert one([], ())[:3] == (0.0, "ok", {"token_rewards": []})


def test_an_array_of_one_is_a_number_for_several_tokens_and_the_value_of_a_single_one():
    assert one(np.array([0.5]), (7, 8))[:3] == (0.5, "ok", {})
    assert one(tensor([[0.5]]), (7, 8))[:3] == (0.5, "ok", {})
    assert one(tensor([0.5]), (7,))[:3] == (0.5, "ok", {"token_rewards": [0.5]})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.5, 1.0], "returned 2 values for 3 tokens"),
        ([], "returned 0 values for 3 tokens"),
        (np.zeros(4), "returned 4 values for 3 tokens"),
        ([0.5], "returned 1 values for 3 tokens"),
        ([0.5, math.nan, 1.0], "returned nan for token 1 of 3"),
        ([0.5, 1.0, 10**400], "for token 2 of 3"),
        ([0.5, None, 1.0], "returned None for token 1 of 3"),
        (["a", 0.0, 1.0], "returned 'a' for token 0 of 3"),
        (np.zeros((3, 2)), "for token 0 of 3"),
        ("abc", "returned str 'abc'"),
        (10**400, "returned inf"),
        ((1.0, {"token_rewards": [1.0, 0.0, 0.0]}), "return the list itself"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_tokens_is_invalid_and_says_why(returned, message):
    value, status, details, said = one(returned, (7, 8, 9))
    assert (value, status, dict(details)) == (None, "invalid", {})
    assert message in said


def test_a_floor_stands_in_for_values_of_a_wrong_number():
    assert one([1.0], (7, 8), on_error="floor", floor=-2)[:3] == (-2.0, "invalid", {})


def test_the_batch_forms_give_a_list_a_completion():
    def trl(completion_ids, **kwargs):
        return [[float(i) for i in ids] for ids in completion_ids]

    def openrlhf(queries, prompts, labels):
        return {"rewards": [[1.0, 2.0], 3.0], "extra_logs": {"n": [5, 6]}}

    def verl(solution_str, ground_truth):
        return {"score": [1.0] * int(ground_truth), "why": "so"}

    rollouts = [rollout(ids=(1, 2), sample=0), rollout(ids=(3,), sample=1)]
    columns = {"prompt": ["q", "q"], "labels": ["", ""], "ground_truth": ["2", "1"]}
    table = load_rewards([trl, openrlhf, verl]).score(rollouts, columns)
    assert table.values == {"trl": [3.0, 3.0], "openrlhf": [3.0, 3.0], "verl": [2.0, 1.0]}
    assert table.details["trl"] == [{"token_rewards": [1.0, 2.0]}, {"token_rewards": [3.0]}]
    assert table.details["openrlhf"] == [{"n": 5, "token_rewards": [1.0, 2.0]}, {"n": 6}]
    assert table.details["verl"][0] == {"why": "so", "token_rewards": [1.0, 1.0]}
    # a batch of one completion: its list is no list of numbers for several
    alone = load_rewards([trl]).score(rollouts[:1], {"prompt": ["q"]})
    assert alone.details["trl"] == [{"token_rewards": [1.0, 2.0]}]


FILE = """
import math
from pathlib import Path


def per_token(completion_ids):
    return [i / 4 for i in completion_ids], {"n": len(completion_ids)}


def per_token_tensor(completion_ids):
    import torch
    return torch.tensor([i / 4 for i in completion_ids])


def by_text(completion):
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write("x")
    return [1.0] * len(completion)
"""


@pytest.mark.parametrize("function", ["per_token", "per_token_tensor"])
def test_workers_and_the_cache_carry_values_a_token(tmp_path, function):
    path = tmp_path / "f.py"
    path.write_text(FILE)
    rollouts = [rollout(ids=(1, 2, 5)), rollout(ids=(4,)), rollout()]
    tables = []
    for options in ({}, {"timeout": 30}, {"cache": str(tmp_path / "c")}, {"cache": str(tmp_path / "c")}):
        with load_rewards([{"func": f"{path}:{function}", **options}]) as suite:
            tables.append(suite.score(rollouts, {"prompt": ["q"] * 3}))
    for table in tables:
        assert table.values[function] == [2.0, 1.0, 0.0]
        assert [d["token_rewards"] for d in table.details[function]] == [[0.25, 0.5, 1.25], [1.0], []]


def test_a_cached_list_is_not_given_to_the_same_text_in_other_tokens(tmp_path):
    path = tmp_path / "f.py"
    path.write_text(FILE)
    spec = {"func": f"{path}:by_text", "cache": str(tmp_path / "c"), "on_error": "abstain"}
    two, three = rollout("ab", ids=(1, 2)), rollout("ab", ids=(1, 2, 3), sample=1)

    def score(*rollouts):
        table = load_rewards([spec], max_error_rate=1).score(rollouts, {"prompt": ["q"] * len(rollouts)})
        return table.values["by_text"], table.status["by_text"], len((tmp_path / "calls").read_text())

    assert score(two) == ([2.0], ["ok"], 1)
    assert score(two) == ([2.0], ["ok"], 1)  # kept
    assert score(three) == ([None], ["invalid"], 2)  # what is kept does not fit it: asked again
    assert score(two, three) == ([2.0, None], ["ok", "invalid"], 3)
    (tmp_path / "c").unlink()
    assert score(two, three) == ([2.0, None], ["ok", "invalid"], 4)  # one question, read for each


# Spread over tokens, for training


def spread(rewards, weights, ids, text=""):
    suite = load_rewards(rewards, weights=weights)
    scored = suite.score([rollout(text, ids=ids)], {"prompt": ["q"]}).scored[0]
    return suite.token_rewards(scored), scored.total


def per_token(completion_ids):
    return [float(i) for i in completion_ids]


def whole(completion):
    return 3.0


def silent(completion):
    return None


def test_values_stand_at_their_tokens_and_a_whole_value_at_the_last():
    # 2·(1, 2) and 0.5·3 at the end: (2, 5.5), total 2·3 + 0.5·3 = 7.5
    assert spread([per_token, whole], [2, 0.5], (1, 2)) == ([2.0, 5.5], 7.5)


def test_an_abstention_changes_no_scale_of_the_values_a_token():
    # weights 1 and 3, the second abstains: all is scaled by 4/1
    assert spread([per_token, silent], [1, 3], (1, 2)) == ([4.0, 8.0], 12.0)


def test_what_cannot_be_spread_is_an_error():
    assert spread([per_token], [1], ()) == ([], 0.0)
    with pytest.raises(ValueError, match="every reward abstained"):
        spread([silent], [1], (1, 2))
    with pytest.raises(ValueError, match=r"'whole' gave 3\.0 for a completion without tokens"):
        spread([whole], [1], ())


def test_by_default_a_wrong_number_of_values_ends_the_run_with_both_numbers():
    def f(completion):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match=r"reward 'f' gave no usable value: returned 2 values for 3 tokens"):
        load_rewards([f]).score([rollout(ids=(1, 2, 3))], {"prompt": ["q"]})
