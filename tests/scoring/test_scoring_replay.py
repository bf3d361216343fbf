"""`rlseq reward score | replay`: logged rollouts scored again, and compared with what was optimised."""

from __future__ import annotations

import json
import math
import random

import pytest
import yaml
from scipy import stats

from rlseq import load_prompts
from rlseq.cli.main import main
from rlseq.errors import RewardError, RunDirectoryError
from rlseq.scoring import load_rewards
from rlseq.scoring.replay import compare, read_rollouts, score_by_step, spearman
from rlseq.training.run.rollout_log import RolloutLog, rollout_records
from rlseq.types import Prompt, Rollout


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(step, key, sample, completion, total, **more):
    return {
        "step": step, "prompt_key": key, "sample": sample, "prompt": f"say {key}", "completion": completion,
        "references": ["one two"], "values": {"old": total}, "total": total, "length": len(completion.split()), **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    jsonl(
        tmp_path / "run" / "rollouts" / "000001.jsonl",
        [
            record(1, "p", 0, "one two", 1.0),
            record(1, "p", 1, "one", 0.0),
            record(1, "p", 2, "", 0.5),
            record(1, "q", 0, "two", 1.0),
            record(1, "q", 1, "one two", 0.0),
        ],
    )
    jsonl(
        tmp_path / "run" / "rollouts" / "000002.jsonl",
        [record(2, "p", 0, "one two", None), record(2, "p", 1, "x", 0.2)],
    )
    return tmp_path / "run"


def test_replay_compares_with_what_was_optimised_by_hand(run):
    # exact_match gives p: 1 0 0, q: 0 1, then (no logged total), 0
    # logged advantages p: + - 0, q: + -;   new p: + - -, q: - +
    # reversed: the two of q; gained: the third of p; step 2 has one rollout left, whose advantage is 0 on
    # both sides
    logged = read_rollouts(run)
    with load_rewards(["exact_match"]) as suite:
        totals = score_by_step(suite, logged).totals
    assert totals == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    found = compare(logged, totals)
    assert (found.rollouts, found.groups, found.varying) == (6, 2, 2)
    assert found.reversed == pytest.approx(2 / 6)
    assert found.gained == pytest.approx(1 / 6)
    assert found.lost == 0
    old = [1.0, 0.0, 0.5, 1.0, 0.0, 0.2]
    new = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert found.rank_correlation == pytest.approx(stats.spearmanr(old, new).statistic)
    by_group = [stats.spearmanr([1, 0, 0.5], [1, 0, 0]).statistic, -1.0]
    assert found.group_correlation == pytest.approx(sum(by_group) / 2)


def test_replaying_the_same_reward_changes_nothing(tmp_path):
    texts = ["one two", "one", "x", "one two three"]
    with load_rewards(["token_f1"]) as suite:
        first = [record(1, "p", i, text, 0.0) for i, text in enumerate(texts)]
        totals = score_by_step(suite, read_rollouts(jsonl(tmp_path / "a.jsonl", first))).totals
        again = read_rollouts(
            jsonl(tmp_path / "b.jsonl", [{**r, "total": t} for r, t in zip(first, totals, strict=True)])
        )
        found = compare(again, score_by_step(suite, again).totals)
    assert (found.reversed, found.gained, found.lost) == (0, 0, 0)
    assert found.rank_correlation == pytest.approx(1.0)


def test_replay_prints_the_comparison_and_writes_the_records(run, tmp_path, capsys):
    out = tmp_path / "new.jsonl"
    flags = ["--reward_funcs", "exact_match", "token_f1", "--reward_weights", "1", "0.5", "--output", str(out)]
    assert main(["reward", "replay", str(run), *flags]) == 0
    printed = capsys.readouterr().out
    assert "of advantages change sign" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[0]["values"] == {"exact_match": 1.0, "token_f1": 1.0}
    assert written[0]["total"] == 1.5
    assert written[0]["prompt"] == "say p"


def test_replay_scores_a_prompts_group_step_by_step(tmp_path):
    # the same prompt in two steps: the vote is taken within each
    records = [record(s, "p", i, text, 0.0) for s, texts in enumerate(["aab", "bbb"]) for i, text in enumerate(texts)]
    with load_rewards(["majority_vote"]) as suite:
        totals = score_by_step(suite, read_rollouts(jsonl(tmp_path / "r.jsonl", records))).totals
    assert totals == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_score_prints_moments_and_corpus_metrics(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # narrower, headings are wrapped
    rows = [
        {"prompt": "a", "completion": "A B C D", "references": ["A B C E"]},
        {"prompt": "b", "completion": "A", "references": ["A"]},
    ]
    path = jsonl(tmp_path / "r.jsonl", rows)
    assert main(["reward", "score", "phoneme_accuracy", "--rollouts", str(path)]) == 0
    out = capsys.readouterr().out
    assert "per = 0.2 " in out  # 1 edit of 5 phonemes
    assert "wer = 0.5 " in out
    (row,) = [line for line in out.splitlines() if line.split()[:1] == ["phoneme_accuracy"]]
    assert row.split()[:7] == ["phoneme_accuracy", "1", "2", "0.875", "0.125", "0.75", "1"]


def test_a_log_without_ids_refuses_by_name_the_rewards_that_ask_for_what_it_lacks(tmp_path):
    def distinct(completion_ids):
        return len(set(completion_ids))

    def maybe(completion, logprobs=None, finish_reason="stop"):
        return 0.0

    def scheduled(completions, trainer_state):
        return [0.0] * len(completions)

    def any_name(completion, **kwargs):
        assert not {"completion_ids", "raw_completion", "logprobs", "finish_reason"} & kwargs.keys()
        return 1.0

    logged = read_rollouts(jsonl(tmp_path / "r.jsonl", [record(1, "p", 0, "one two", 1.0, length=4, logprob=-2.0)]))
    for reward, names in (
        (distinct, "'completion_ids'"),
        (maybe, "'logprobs', 'finish_reason'"),
        (scheduled, "'trainer_state'"),
    ):
        with pytest.raises(
            RewardError, match=f"{reward.__name__!r} asks for {names}, which these rollouts do not hold"
        ):
            score_by_step(load_rewards([reward]), logged)
    assert score_by_step(load_rewards([any_name]), logged).totals == [1.0]


def test_what_training_logs_is_scored_again_bit_for_bit(tmp_path):
    calls = ({"role": "assistant", "content": "", "tool_calls": [1]}, {"role": "assistant", "content": "b"})
    rollouts = [
        Rollout("p", 0, (5, 5, 7), (True,) * 3, (-0.1, -1 / 3, -2e-17), "a b", "a b<end>", None, "length", "s"),
        Rollout("p", 1, (), (), (), "", "", None, "stop", "s"),
        Rollout("q", 0, (9,), (True,), (-0.5,), "b", "b\u202e<end>", calls, "stop", "s"),
    ]
    prompts = [Prompt(key, "?", (1,), {"references": ["a"]}) for key in "ppq"]

    def everything(completion_ids, logprobs, raw_completion, finish_reason, sample, prompt_key, messages):
        given = (completion_ids, logprobs, raw_completion, finish_reason, sample, prompt_key, messages)
        seen.append(given)
        return sum(logprobs) + len(set(completion_ids))

    seen = []
    suite = load_rewards([everything])
    table = suite.score(rollouts, {"prompt": ["?"] * 3})
    RolloutLog(tmp_path / "rollouts").write(1, rollout_records(1, prompts, table.scored, [0.0] * 3))
    again = score_by_step(suite, read_rollouts(tmp_path))
    assert again.values == table.values
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rollout_columns", 3, "rollout_columns is 3; expected values by column"),
        ("completion_ids", "xy", "line 2 is not a rollout: completion_ids is 'xy'; expected a list of token ids"),
        ("completion_ids", 7, "line 2 is not a rollout"),
        ("length", "3", "line 2 is not a rollout"),
        ("logprobs", 0.5, "line 2 is not a rollout"),
    ],
)
def test_a_line_whose_fields_make_no_rollout_is_named(tmp_path, field, value, words):
    good = {"prompt": "a", "completion": "b"}
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in (good, {**good, field: value})))
    with pytest.raises(RewardError, match=words):
        read_rollouts(tmp_path)


def test_log_probs_without_token_ids_say_how_many_tokens_there_are(tmp_path):
    record = {"prompt": "a", "completion": "one word more", "logprobs": [-1.0, -2.0, -0.5, -0.25, -1.5]}
    (tmp_path / "log.jsonl").write_text(json.dumps(record))
    (rollout,) = read_rollouts(tmp_path).rollouts
    assert len(rollout.completion_ids) == 5 and rollout.logprob == -5.25


def test_bad_logs_are_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="has no rollouts"):
        read_rollouts(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    with pytest.raises(RewardError, match="line 2 is not valid JSON"):
        read_rollouts(tmp_path / "bad.jsonl")
    with pytest.raises(RewardError, match="line 1 has prompt; expected prompt and completion"):
        read_rollouts(jsonl(tmp_path / "short.jsonl", [{"prompt": "a"}]))
    with pytest.raises(RewardError, match=r"none of the 1 rollouts has a reward \('total'\) in the log"):
        compare(read_rollouts(jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}])), [1.0])
    two = read_rollouts(jsonl(tmp_path / "t.jsonl", [record(1, "p", 0, "x", 1.0), record(1, "p", 1, "y", None)]))
    with pytest.raises(RewardError, match="abstained or failed on all 2 rollouts"):
        compare(two, [None, None])
    with pytest.raises(RewardError, match="a reward both in the log and now"):
        compare(two, [None, 1.0])


def test_rank_correlation_agrees_with_scipy_ties_included():
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randrange(4) for _ in range(9)] for _ in range(2))
        expected = stats.spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected) or (math.isnan(expected) and math.isnan(spearman(a, b)))
    assert math.isnan(spearman([1.0], [1.0]))


def strict(text):
    """JSON as everybody reads it: without NaN and Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_json_whatever_the_details_hold(tmp_path):
    source = "import math\ndef odd(completion):\n    return 1.0, {'a': math.nan, 'b': [math.inf], 'c': {1, }, 2: 'x'}\n"
    (tmp_path / "odd.py").write_text(source + "def none(completion):\n    return None\n")
    rollouts, out = jsonl(tmp_path / "r.jsonl", [record(1, "p", 0, "x", 1.0)]), tmp_path / "out.jsonl"
    specs = [f"{tmp_path}/odd.py:odd", f"{tmp_path}/odd.py:none"]
    assert main(["reward", "score", *specs, "--rollouts", str(rollouts), "--output", str(out)]) == 0
    written = strict(out.read_text())
    assert written["details"]["odd"] == {"a": None, "b": [None], "c": "{1}", "2": "x"}
    assert written["values"] == {"odd": 1.0, "none": None}


# Columns that a log lacks


class Words:
    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [list(range(len(one.split()))) for one in text]}


@pytest.fixture
def run_with_data(tmp_path):
    """A run on rows with a column `level` that the log does not keep; the prompt is made by a template."""
    rows = [{"word": word, "answer": word.upper(), "level": level} for level, word in enumerate("abc", 2)]
    data = jsonl(tmp_path / "rows" / "train.jsonl", rows).parent
    jsonl(data / "validation.jsonl", rows[:1])
    how = {"prompt_template": "say {{ word }}", "reference_column": "answer"}
    run = tmp_path / "run"
    prompts = load_prompts(str(data), Words(), split="train", **how)
    records = [
        {"step": 1, "prompt_key": p.key, "sample": s, "prompt": p.text, "references": p.columns["references"],
         "completion": "A" * (s + 1), "total": float(s), "length": 1}
        for p in reversed(prompts) for s in (0, 1)
    ]  # fmt: skip
    jsonl(run / "rollouts" / "000001.jsonl", records)
    config = {"dataset_name": str(data), "train_split": "train", "learning_rate": 1e-3, "reward_funcs": ["x"], **how}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "by_level.py").write_text("def by_level(completion, level):\n    return level * len(completion)\n")
    return run


def test_replay_finds_columns_that_the_log_lacks_in_the_runs_data(run_with_data, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--reward_funcs", f"{tmp_path}/by_level.py", "--output", str(out)]
    assert main(["reward", "replay", str(run_with_data), *flags]) == 0
    # levels c 4, b 3, a 2 (the log is in reverse), times 1 and 2 letters
    assert [json.loads(line)["total"] for line in out.read_text().splitlines()] == [4, 8, 3, 6, 2, 4]


def test_without_the_runs_data_the_missing_column_and_the_flag_are_named(run_with_data, tmp_path, capsys):
    (run_with_data / "config.yaml").unlink()
    flags = ["--reward_funcs", f"{tmp_path}/by_level.py"]
    assert main(["reward", "replay", str(run_with_data), *flags]) == 2
    said = capsys.readouterr().err
    assert "asks for 'level'" in said
    assert "--dataset_name" in said
    data = ["--dataset_name", str(tmp_path / "rows"), "--prompt_template", "say {{ word }}"]
    assert main(["reward", "replay", str(run_with_data), *flags, *data, "--reference_column", "answer"]) == 0
    capsys.readouterr()
    assert main(["reward", "replay", str(run_with_data), *flags, *data]) == 2  # other references, other keys
    assert "6 of 6 rollouts are on prompts that are not in" in capsys.readouterr().err


@pytest.fixture
def trained_run(run_with_data, tmp_path):
    """The same run with the log that training writes, of rollouts scored by level."""
    config = yaml.safe_load((run_with_data / "config.yaml").read_text())
    how = {"prompt_template": config["prompt_template"], "reference_column": config["reference_column"]}
    prompts = load_prompts(config["dataset_name"], Words(), split="train", **how)
    rollouts = [Rollout(p.key, 0, (5,), (True,), (-0.1,), "A", "A", None, "stop", "s") for p in prompts]
    with load_rewards([f"{tmp_path}/by_level.py"]) as suite:
        columns = {name: [p.columns[name] for p in prompts] for name in ("level", "references")}
        table = suite.score(rollouts, columns | {"prompt": [p.text for p in prompts]})
    RolloutLog(run_with_data / "rollouts").write(1, rollout_records(1, prompts, table.scored, [0.0] * 3))
    return run_with_data


def replayed(run, tmp_path, *flags, reward="by_level"):
    out = tmp_path / "out.jsonl"
    code = main(
        ["reward", "replay", str(run), "--reward_funcs", f"{tmp_path}/{reward}.py", "--output", str(out), *flags]
    )
    return code, [json.loads(line)["total"] for line in out.read_text().splitlines()] if code == 0 else None


def edit_level(tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "rows/train.jsonl").read_text().splitlines()]
    rows[1]["level"] = 30
    rows[2]["other"] = "added"
    jsonl(tmp_path / "rows/train.jsonl", rows)


def test_a_column_that_was_edited_since_is_refused_by_name_where_a_reward_reads_it(trained_run, tmp_path, capsys):
    assert replayed(trained_run, tmp_path) == (0, [2.0, 3.0, 4.0])
    (tmp_path / "by_word.py").write_text("def by_word(completion, word):\n    return float(ord(word))\n")
    assert replayed(trained_run, tmp_path, reward="by_word") == (0, [97.0, 98.0, 99.0])
    edit_level(tmp_path)
    assert replayed(trained_run, tmp_path, reward="by_word") == (0, [97.0, 98.0, 99.0])
    capsys.readouterr()
    assert replayed(trained_run, tmp_path)[0] == 2
    said = capsys.readouterr().err
    assert "the column 'level' of 1 of 3 rollouts is not what the run scored" in said and "--dataset_name" in said
    data = ["--dataset_name", str(tmp_path / "rows")]
    assert replayed(trained_run, tmp_path, *data) == (0, [2.0, 30.0, 4.0])
    assert "the column 'level' of 1 of 3 rollouts is not what the run scored" in capsys.readouterr().err


def test_a_column_with_a_default_is_read_again_or_its_lack_refused(trained_run, tmp_path, capsys):
    (tmp_path / "maybe.py").write_text("def maybe(completion, level=100):\n    return float(level)\n")
    (tmp_path / "any_name.py").write_text(
        "def any_name(completions, **columns):\n    return [float(x) for x in columns.get('level', [0] * 3)]\n"
    )
    for reward in ("maybe", "any_name"):
        assert replayed(trained_run, tmp_path, reward=reward) == (0, [2.0, 3.0, 4.0])
    (trained_run / "config.yaml").unlink()
    capsys.readouterr()
    assert replayed(trained_run, tmp_path, reward="maybe")[0] == 2
    assert "'maybe' reads 'level', which the run had and the log does not hold" in capsys.readouterr().err
    assert replayed(trained_run, tmp_path, reward="any_name") == (0, [0.0, 0.0, 0.0])
    assert "warning: reward 'any_name' takes any column, and the log does not hold" in capsys.readouterr().err


def test_what_a_rollout_func_told_is_logged_or_refused_by_name(tmp_path):
    def told(completion, env_reward, where):
        return env_reward + len(where)

    def by_shape(completion, shape):
        return float(shape[0])

    rollouts = [Rollout("p", i, (5,), (True,), (-0.1,), "a", "a", None, "stop", "s") for i in range(2)]
    prompts = [Prompt("p", "?", (1,), {"references": ["a"], "where": ["of the data set"]})] * 2
    more = [{"env_reward": 0.1 + i, "where": ["x"] * i, "step": 7, "shape": (i, 2)} for i in range(2)]
    columns = {name: [row[name] for row in more] for name in more[0]}
    suite = load_rewards([told])
    table = suite.score(rollouts, columns | {"prompt": ["?"] * 2})
    records = rollout_records(3, prompts, table.scored, [0.0] * 2, more)
    RolloutLog(tmp_path / "rollouts").write(3, records)
    logged = read_rollouts(tmp_path)
    assert [record["step"] for record in logged.records] == [3, 3] and logged.columns["step"] == [7, 7]
    assert score_by_step(suite, logged).totals == table.totals == [0.1, 2.1]
    with pytest.raises(RewardError, match="'by_shape' asks for 'shape', which these rollouts do not hold"):
        score_by_step(load_rewards([by_shape]), logged)
