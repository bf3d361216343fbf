"""`rlseq reward compare A B --rollouts F`: two verifiers on the same rollouts, through the command line."""

import json

import numpy as np
import pytest
import yaml

from rlseq.cli.main import main
from rlseq.cli.reward_compare import advantage_signs, disagreements

NAN = np.nan
# The value of a completion is in it: "1 0" has 1 by `first` and 0 by `second`; "-" abstains, "!" raises.
VERIFIERS = """
def value(word):
    if word == "!":
        raise ValueError("cannot read it")
    return None if word == "-" else float(word)

def first(completion):
    return value(completion.split()[0])

def second(completion):
    return value(completion.split()[1])
"""


@pytest.fixture
def compare(tmp_path, capsys):
    """Runs the command on completions by group, (step, prompt): its exit code, numbers, stdout and stderr."""
    (tmp_path / "verifiers.py").write_text(VERIFIERS)
    run = tmp_path / "run"

    def compared(groups, *flags, a="verifiers.py:first", b="verifiers.py:second", where="run"):
        records = [
            {"step": step, "prompt_key": key, "sample": i, "prompt": f"say {key}", "references": [f"the {key}"],
             "completion": text, "total": 0.0}
            for (step, key), texts in groups.items() for i, text in enumerate(texts)
        ]  # fmt: skip
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
        (run / "rollouts/000001.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        out = tmp_path / "out/numbers.json"
        out.unlink(missing_ok=True)
        specs = [spec if spec.startswith("{") else str(tmp_path / spec) for spec in (a, b)]
        code = main(["reward", "compare", *specs, "--rollouts", str(tmp_path / where), "--output", str(out), *flags])
        said = capsys.readouterr()
        return code, json.loads(out.read_text()) if out.exists() else None, said.out, said.err

    return compared


# p, step 1: first 1 1 0 0 (advantages + + - -), second 1 0 0 1 (+ - - +): two change sign.
# p, step 2: first 1 1 (0 0), second 1 0 (+ -): two were 0.   q: first 0 1 (- +), second 0 0 (0 0): two become 0.
BINARY = {(1, "p"): ["1 1", "1 0", "0 0", "0 1"], (2, "p"): ["1 1", "1 0"], (1, "q"): ["0 0", "1 0"]}


def test_binary_verifiers_by_hand(compare):
    code, numbers, out, _ = compare(BINARY)
    assert code == 0
    assert numbers["table"] == {"both_pass": 2, "a_alone_passes": 3, "b_alone_passes": 1, "both_fail": 2}
    assert numbers["prompts"] == 2  # p's two steps are one prompt
    value = {name: found["value"] for name, found in numbers["statistics"].items()}
    # equal 4 of 8; by chance 5/8·3/8 + 3/8·5/8 = 30/64, kappa (32 − 30) / (64 − 30); 3 passes less 5, of 8
    expected = {"equal": 0.5, "kappa": 2 / 34, "pass_rate_difference": -0.25}
    assert value == pytest.approx({**expected, "reversed": 2 / 8, "gained": 2 / 8, "lost": 2 / 8})
    low, high = numbers["statistics"]["equal"]["ci95"]
    assert (low, high) == (0.5, 0.5)  # p: 3 of 6, q: 1 of 2, in any mixture
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "equal verdicts 50.0% 50.0% to 50.0%" in lines
    # of two prompts a resample is p p (2 of 6), p q (2 of 8) or q q (0 of 2), with chances 1/4, 1/2, 1/4
    assert "advantages that change sign from A to B 25.0% 0.0% to 33.3%" in lines
    assert "A passes 2 3" in lines and "A fails 1 2" in lines


def test_abstentions_and_failures_are_counted_and_never_0(compare):
    code, numbers, out, _ = compare({(1, "p"): ["1 1", "0 0", "- 0", "! 0", "0 -", "- !"]})
    assert code == 0
    assert {name: numbers["a"][name] for name in ("n", "mean", "abstained", "error")} == {
        "n": 3, "mean": pytest.approx(1 / 3), "abstained": 2, "error": 1,
    }  # fmt: skip
    assert numbers["counts"] == {"both": 2, "a_alone": 1, "b_alone": 2, "neither": 1}
    assert numbers["table"] == {"both_pass": 1, "a_alone_passes": 0, "b_alone_passes": 0, "both_fail": 1}
    assert numbers["statistics"]["equal"] == {"value": 1.0, "ci95": [None, None]}  # of one prompt
    assert "The first failure of first: " in out and "cannot read it" in out


@pytest.mark.parametrize("on_error", ["raise", "floor"])
def test_a_failure_is_no_value_whatever_the_spec_makes_of_it_in_training(compare, tmp_path, on_error):
    spec = json.dumps({"func": str(tmp_path / "verifiers.py:first"), "on_error": on_error, "floor": 0})
    code, numbers, _, _ = compare({(1, "p"): ["! 0", "! 0", "1 1"]}, a=spec)
    assert code == 0
    assert (numbers["a"]["n"], numbers["a"]["error"]) == (1, 2)
    assert numbers["table"] == {"both_pass": 1, "a_alone_passes": 0, "b_alone_passes": 0, "both_fail": 0}


def test_other_verifiers_are_correlated_and_the_largest_differences_come_first(compare):
    groups = {(1, "p"): ["0.1 0.2", "0.5 0.5", "0.9 0.1"], (1, "q"): ["0.2 0.6", "0.4 0.6"]}
    code, numbers, out, _ = compare(groups, "--limit", "3")
    assert code == 0 and numbers["table"] is None
    a, b = [0.1, 0.5, 0.9, 0.2, 0.4], [0.2, 0.5, 0.1, 0.6, 0.6]
    assert numbers["statistics"]["correlation"]["value"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert numbers["statistics"]["mean_difference"]["value"] == pytest.approx(-0.02)  # (2.0 − 2.1) / 5
    assert numbers["disagreements"]["count"] == 4
    assert [row["row"] for row in numbers["disagreements"]["listed"]] == [2, 3, 4]
    shown = [line for line in out.splitlines() if line.startswith(("A 0", "completion", "reference"))]
    assert shown[:3] == ["A 0.9, B 0.1  (step 1, sample 2)", "completion  0.9 0.1", "reference   the p"]
    assert "1 more: --limit 0 shows all." in out and "A 0.1, B 0.2" not in out
    assert "A 0.1, B 0.2" in compare(groups, "--limit", "0")[2]


def test_a_verifier_agrees_with_itself(compare):
    code, numbers, out, _ = compare(BINARY, b="verifiers.py:first")
    assert code == 0
    assert numbers["a"]["name"] != numbers["b"]["name"]
    assert numbers["disagreements"] == {"count": 0, "listed": []}
    assert "A and B differ on 0 of 8 rollouts." in out
    assert numbers["statistics"]["kappa"] == {"value": 1.0, "ci95": [1.0, 1.0]}


@pytest.mark.parametrize("where", ["run", "run/rollouts", "run/rollouts/000001.jsonl"])
def test_a_run_its_rollouts_and_a_file_of_them_are_read_with_the_columns_of_the_runs_data(compare, tmp_path, where):
    rows = "".join(json.dumps({"word": word, "level": level}) + "\n" for level, word in enumerate("pq", 2))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text(rows)
    how = {"prompt_template": "say {{ word }}", "reference_column": "word"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"dataset_name": str(tmp_path / "rows"), **how}))
    (tmp_path / "level.py").write_text("def level(completion, level):\n    return level\n")
    from rlseq import load_prompts
    from rlseq.scoring.check.rows import _WordTokenizer

    keys = [prompt.key for prompt in load_prompts(str(tmp_path / "rows"), _WordTokenizer(), split="train", **how)]
    code, numbers, _, err = compare({(1, keys[0]): ["1 0"], (1, keys[1]): ["1 0"]}, a="level.py:level", where=where)
    assert (code, err) == (0, "")
    assert numbers["a"]["mean"] == 2.5


def test_what_cannot_be_compared_is_said_in_one_line_with_exit_code_2(compare):
    code, numbers, out, err = compare({(1, "p"): ["- 0", "1 !"]})
    assert (code, numbers) == (2, None)
    assert err.startswith("error: A and B both give a value on none of the 2 rollouts") and err.count("\n") == 1
    assert "abstained" in out  # the table that the message speaks of
    code, _, _, err = compare(BINARY, "--limit", "-1")
    assert (code, err) == (2, "error: --limit is -1; expected at least 0\n")
    code, _, _, err = compare(BINARY, b="verifiers.py:secnd")
    assert code == 2 and "secnd" in err
    code, _, _, err = compare(BINARY, where="nowhere")
    assert code == 2 and "has no rollouts" in err


def test_signs_of_advantages_leave_out_abstentions_and_rounding():
    # mean of 0.1 0.2 0.3 is 0.2 but for rounding; of 1 (abstained) 0 it is 0.5; a group of one has no advantage
    values = np.array([0.1, 0.2, 0.3, 1.0, NAN, 0.0, 7.0])
    signs = advantage_signs(values, [[0, 1, 2], [3, 4, 5], [6]])
    assert signs[:6].tolist() == [-1, 0, 1, 1, 0, -1]
    assert np.isnan(signs[6])


def test_verdicts_are_compared_where_one_verifier_fails_with_minus_1():
    assert disagreements(np.array([-1.0, -1, 1, NAN]), np.array([0.0, 1, 1, 1])) == [1]
    assert disagreements(np.array([0.3, 0.5]), np.array([0.1 + 0.2, 0.6])) == [1]  # rounding is no difference
