"""`where` in a reward's spec: it scores the rows whose columns fit, and abstains on the others."""

import pytest
from tiny_rollouts import rollout
from tiny_task import tiny_tokenizer

from rlseq.data.prompts import build_prompts
from rlseq.errors import RewardError
from rlseq.scoring import load_rewards
from rlseq.scoring.check.smoke_test import smoke_test_rewards, unused_values

TASKS = ["math", "code", "math", None, "names"]
COLUMNS = {"prompt": ["p"] * 5, "task": TASKS, "level": [1, 1, 2, 2, True]}
ROLLOUTS = [rollout("a" * n, key=str(n)) for n in range(5)]
ROWS = [{"prompt": "a", "task": task, "level": n} for n, task in enumerate(("math", "code", "math"))]
asked = []


def length(completion, task):
    asked.append(task)
    return float(len(completion))


def lengths(completions, **columns):
    assert set(columns["task"]) == {"math"}
    return [float(len(text)) for text in completions]


def found(where, function=length):
    asked.clear()
    with load_rewards([{"func": function, "where": where}]) as suite:
        return suite.score(ROLLOUTS, COLUMNS)


@pytest.mark.parametrize("function", [length, lengths])
def test_other_rows_are_abstained_from_without_a_call(function):
    table = found({"task": "math"}, function)
    assert table.values[function.__name__] == [0.0, None, 2.0, None, None]
    assert [scored.status[function.__name__] for scored in table.scored] == [
        "ok",
        "abstained",
        "ok",
        "abstained",
        "abstained",
    ]
    assert set(asked) <= {"math"}


def test_several_values_columns_and_types():
    assert found({"task": ["math", "code"]}).values["length"] == [0.0, 1.0, 2.0, None, None]
    assert found({"task": "math", "level": 2}).values["length"] == [None, None, 2.0, None, None]
    assert found({"level": 1.0}).values["length"] == [0.0, 1.0, None, None, None]  # true is not 1
    assert found({"level": True}).values["length"] == [None, None, None, None, 4.0]
    assert found({"task": None}).values["length"] == [None, None, None, 3.0, None]
    assert found({"task": "absent"}).totals == [None] * 5


def test_it_is_called_in_the_background_as_elsewhere(tmp_path):
    (tmp_path / "own.py").write_text("def own(completion):\n    return float(len(completion))\n")
    spec = {"func": f"{tmp_path}/own.py:own", "where": {"task": "math"}, "timeout": 20}
    with load_rewards([spec]) as suite:
        pending = suite.submit(ROLLOUTS, COLUMNS)
        assert suite.score(ROLLOUTS, COLUMNS, pending=pending).values["own"] == [0.0, None, 2.0, None, None]


def test_it_belongs_to_what_decides_the_values():
    with load_rewards([{"func": length, "where": {"task": ["math"]}}, length]) as suite:
        one, other = suite.fingerprint().values()
    assert one["where"] == {"task": ["math"]}
    assert "where" not in other


def test_an_unknown_column_and_a_value_that_no_row_has_are_refused():
    prompts = build_prompts(ROWS, tiny_tokenizer())
    for where, message in (
        ({"tsk": "math"}, r"where names 'tsk', which is not a column\. Did you mean 'task'"),
        ({"task": "mth"}, r"where asks for task 'mth', which none of the 3 rows has\. Did you mean 'math'"),
        ({"task": ["math", "names"]}, r"where asks for task 'names'"),
        ({"level": "1"}, r"where asks for level '1'"),
    ):
        with load_rewards([{"func": length, "where": where}]) as suite, pytest.raises(RewardError, match=message):
            smoke_test_rewards(suite, prompts)
    with load_rewards([{"func": length, "where": {"task": ["math", "names"]}}]) as suite:
        smoke_test_rewards(suite, prompts, all_used=False)
        (said,) = unused_values(suite, prompts)
        assert "task 'names'" in said
    for where in ("math", {"task": {}}, {"task": []}):
        with pytest.raises(RewardError, match="where"):
            load_rewards([{"func": length, "where": where}])


def test_the_first_row_that_it_is_for_is_tried():
    def fails(completion):
        raise ValueError("no")

    rows = [{"prompt": "a", "task": task} for task in ("math", "math", "code")]
    prompts = build_prompts(rows, tiny_tokenizer())
    suite = load_rewards([{"func": fails, "where": {"task": "code"}}])
    with pytest.raises(RewardError, match="tried on row 3 of 3"):
        smoke_test_rewards(suite, prompts)
