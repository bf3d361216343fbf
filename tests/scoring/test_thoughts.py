"""`think_end`: rewards may ask for the thought and the answer of a completion; no column is hidden by them."""

import json

import pytest
from tiny_rollouts import rollout

from rlseq.cli.main import main
from rlseq.errors import RewardError
from rlseq.scoring import load_rewards
from rlseq.scoring.thoughts import split_thought

COLUMNS = {"prompt": ["p"], "references": [["4"]]}
THOUGHT = "2 + 2 </think>\n 4 </think> 5"


def parts(completion, thought, answer):
    return 0.0, {"thought": thought, "answer": answer}


def right(answer, references):
    return float(answer == references[0])


def lengths(completions, answer):
    return [float(len(text)) for text in answer]


def column(completion, answer):
    return float(answer == "of the data")


def told(function, text, *, think_end="</think>", columns=None, **options):
    with load_rewards([{"func": function, **options}], think_end=think_end) as suite:
        (scored,) = suite.score([rollout(text)], COLUMNS | (columns or {})).scored
    return next(iter(scored.values.values())), next(iter(scored.details.values()))


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        (THOUGHT, "2 + 2 ", "4 </think> 5"),  # split at the first
        ("2 + 2", "2 + 2", ""),  # never closed
        ("</think>4 ", "", "4 "),
        ("a</think>", "a", ""),
        ("", "", ""),
    ],
)
def test_a_completion_is_split_at_the_first_end(text, thought, answer):
    assert split_thought(text, "</think>") == (thought, answer)
    assert told(parts, text)[1] == {"thought": thought, "answer": answer}


def test_every_signature_may_ask_and_only_by_name():
    assert told(right, "hm</think> 4")[0] == 1.0
    assert told(lengths, "hm</think> four")[0] == 4.0

    def any_column(completion, **columns):
        return float("answer" in columns or "thought" in columns)

    assert told(any_column, THOUGHT)[0] == 0.0


def test_a_worker_process_is_given_them_too(tmp_path):
    (tmp_path / "own.py").write_text("def own(answer, thought):\n    return 10.0 * len(thought) + len(answer)\n")
    assert told(f"{tmp_path}/own.py:own", "ab</think>c", timeout=20)[0] == 21.0


@pytest.mark.parametrize("function", [parts, right, lengths])
def test_without_think_end_they_are_refused_in_one_line_that_names_the_flag(function):
    with load_rewards([function]) as suite, pytest.raises(RewardError, match="give --think_end") as caught:
        suite.check_columns(["prompt", "references"])
    assert "\n" not in str(caught.value)


def test_a_misspelt_completion_beside_an_answer_is_still_noticed():
    def typo(compltion, answer):
        return 0.0

    with pytest.raises(RewardError, match="Did you mean 'completion'"):
        load_rewards([typo], think_end="</think>")


def test_a_default_stands_for_what_is_not_there():
    def graceful(completion, answer="none"):
        return float(answer == "none")

    assert told(graceful, THOUGHT, think_end=None)[0] == 1.0
    assert told(graceful, THOUGHT)[0] == 0.0


def test_a_column_of_the_data_is_as_before_without_think_end():
    assert told(column, "x", think_end=None, columns={"answer": ["of the data"]})[0] == 1.0


def test_a_reward_of_nothing_but_a_column_is_refused():
    with load_rewards([right]) as suite, pytest.raises(RewardError, match="give --think_end"):
        suite.check_columns(["prompt", "references", "answer"])


def test_a_column_and_a_part_of_one_name_are_refused_until_the_spec_says_which():
    columns = {"answer": ["of the data"]}
    with pytest.raises(RewardError, match=r"columns: \{answer: answer\} in its spec") as caught:
        told(column, THOUGHT, columns=columns)
    assert "\n" not in str(caught.value)
    with load_rewards([{"func": column, "columns": {"answer": "answer"}}], think_end="</think>") as suite:
        assert suite.score([rollout(THOUGHT)], COLUMNS | columns).totals == [1.0]

    def others(completion, **more):
        return float(more["answer"] == "of the data")

    assert told(others, THOUGHT, columns=columns)[0] == 1.0  # it asks for columns


def test_what_ends_thoughts_belongs_to_what_decides_the_values():
    def plain(completion):
        return 0.0

    with load_rewards([right, plain], think_end="</t>") as suite:
        one, other = suite.fingerprint().values()
    assert one["think_end"] == "</t>"
    assert "think_end" not in other


REWARD = """
def right(answer, references):
    return float(answer.strip() == references[0])
"""


def test_check_writes_references_as_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(REWARD)
    assert main(["reward", "check", "own.py:right"]) == 1
    assert "give --think_end" in " ".join(capsys.readouterr().out.split())
    assert main(["reward", "check", "own.py:right", "--think_end", "</think>"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out


def test_a_log_is_scored_as_the_run_split_its_completions(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(REWARD)
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    records = [
        {"prompt": "p", "completion": text, "references": ["4"], "total": 0.0, "sample": sample}
        for sample, text in enumerate(("2+2</think>\n4", "2+2|4", "4"))
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "rollouts" / "000000.jsonl").write_text(lines)

    def totals(*flags):
        out = tmp_path / "out.jsonl"
        assert main(["reward", "replay", "run", "--reward_funcs", "own.py:right", "--output", str(out), *flags]) == 0
        capsys.readouterr()
        return [json.loads(line)["total"] for line in out.read_text().splitlines()]

    assert main(["reward", "replay", "run", "--reward_funcs", "own.py:right"]) != 0
    assert "give --think_end" in capsys.readouterr().err
    assert totals("--think_end", "</think>") == [1.0, 0.0, 0.0]
    (tmp_path / "run" / "config.yaml").write_text("think_end: '|'\n")
    assert totals() == [0.0, 1.0, 0.0]
    assert totals("--think_end", "</think>") == [1.0, 0.0, 0.0]
