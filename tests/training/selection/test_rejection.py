"""Rejection-sampling fine-tuning: what is kept, by hand; what is refused; and both sources end to end."""

from __future__ import annotations

import json

import pytest

from rlseq.config.training import RejectionArguments
from rlseq.errors import ConfigError, DataError, RlseqError
from rlseq.training.selection.rejection import best_completions, read_candidates, require_survivors


def record(prompt, completion, total, **more):
    return {
        "prompt_key": prompt,
        "prompt": prompt,
        "completion": completion,
        "total": total,
        "finish_reason": "stop",
    } | more


def kept(records, **options):
    return [(r["prompt"], r["completion"], r["total"]) for r in best_completions(records, **options)]


LOG = [
    record("p", "two", 0.5),
    record("q", "low", -1.0),
    record("p", "cut", 9.0, finish_reason="length"),
    record("p", "one", 0.9),
    record("q", "silent", None),
    record("p", "tie", 0.9),
    record("p", "two", 0.7),  # again, worth more this time
    record("r", "silent", None),
]


def test_each_prompt_keeps_its_best_whole_completion():
    assert kept(LOG) == [("p", "one", 0.9), ("q", "low", -1.0)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 2}, [("p", "one", 0.9), ("p", "tie", 0.9), ("q", "low", -1.0)]),
        ({"keep": 9}, [("p", "one", 0.9), ("p", "tie", 0.9), ("p", "two", 0.7), ("q", "low", -1.0)]),
        ({"min_total": 0.9}, [("p", "one", 0.9)]),
        ({"keep": 9, "min_total": 0.6}, [("p", "one", 0.9), ("p", "tie", 0.9), ("p", "two", 0.7)]),
        ({"min_total": 0.91}, []),
    ],
)
def test_more_are_kept_in_the_order_of_their_totals_and_none_below_the_least(options, expected):
    assert kept(LOG, **options) == expected


def test_the_first_of_a_tie_is_kept_whatever_its_duplicates_earn():
    assert kept([record("p", "a", 1.0), record("p", "b", 2.0), record("p", "a", 2.0)]) == [("p", "a", 2.0)]
    assert kept([record("p", "b", 2.0), record("p", "a", 2.0)]) == [("p", "b", 2.0)]


def test_prompts_are_told_apart_by_key_else_by_themselves():
    rows = [record("p", "a", 1.0, prompt_key="1"), record("p", "b", 2.0, prompt_key="2")]
    assert kept(rows) == [("p", "a", 1.0), ("p", "b", 2.0)]
    bare = [{key: value for key, value in r.items() if key != "prompt_key"} for r in rows]
    assert kept(bare) == [("p", "b", 2.0)]
    chat = [{"prompt": [{"role": "user", "content": c}], "completion": "a", "total": 1.0} for c in ("x", "y", "x")]
    assert len(best_completions(chat)) == 2


def test_no_survivor_is_an_error_with_the_best_total_seen():
    require_survivors(LOG[:1], LOG, None)
    with pytest.raises(
        DataError, match=r"none of 8 .* best total seen is 9, 0.9 of those not cut; --min_reward is 0.95"
    ):
        require_survivors([], LOG, 0.95)
    with pytest.raises(DataError, match=r"best total seen is none; 0 were cut at the length limit, 1 have no total"):
        require_survivors([], [record("p", "a", None)], None)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_candidates_come_from_runs_and_files_in_order(tmp_path):
    write_lines(tmp_path / "run/rollouts/000002.jsonl", [record("p", "later", 1.0)])
    write_lines(tmp_path / "run/rollouts/000001.jsonl", [record("p", "first", 1.0)])
    write_lines(tmp_path / "run/metrics.jsonl", [{"step": 1}])
    file = write_lines(tmp_path / "more.jsonl", [record("q", "own", None)])
    found = read_candidates([str(file), str(tmp_path / "run")])
    assert [r["completion"] for r in found] == ["own", "first", "later"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "line 2 is not valid JSON"),
        ({"prompt": "p"}, "line 2 has prompt; expected prompt and completion"),
        ({"prompt": "p", "completion": "c"}, "record 2: total is 'nothing'"),
        ({"prompt": "p", "completion": "c", "total": "1"}, "record 2: total is '1'"),
        ('{"prompt": "p", "completion": "c", "total": NaN}', "record 2: total is nan"),
        ({"prompt": "p", "completion": ["c"], "total": 1.0}, r"line 2: the completion is \['c'\]; expected text"),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": "c", "total": 1.0}, "mix text prompts and chat"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path, bad, message):
    file = write_lines(tmp_path / "log.jsonl", [record("p", "a", 1.0), bad])
    with pytest.raises(RlseqError, match=message):
        read_candidates([str(file)])


@pytest.mark.parametrize("missing", ["nowhere.jsonl", "empty"])
def test_a_path_without_rollouts_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RlseqError, match=f"{missing} has no rollouts"):
        read_candidates([str(tmp_path / missing)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"from_rollouts": ["a"], "rejection_samples": 2}, "give one of them"),
        ({"from_rollouts": []}, "names nothing"),
        (
            {"min_reward": 0.5},
            "--min_reward is 0.5, which has no effect without --from_rollouts or",
        ),
        ({"rejection_keep": 2}, "--rejection_keep is 2, which has no effect without --from_rollouts or"),
        (
            {"from_rollouts": ["a"], "temperature": 0.5},
            "--temperature is 0.5, which has no effect without --rej",
        ),
        ({"rejection_samples": 2}, "needs --reward_funcs"),
        ({"reward_weights": [1.0]}, "and nothing else here"),
        ({"rejection_samples": 0, "reward_funcs": ["a"]}, "--rejection_samples is 0"),
        ({"from_rollouts": ["a"], "rejection_keep": 0}, "--rejection_keep is 0"),
        ({"rejection_samples": 2, "reward_funcs": ["a"], "temperature": 0.0}, "--temperature is 0.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RejectionArguments(**fields)
