"""Files that lm-eval 0.4.13 and inspect_ai 0.3.285 wrote, compared: SmolLM2-135M-Instruct on ten questions.

lm_eval/plain and chat differ by the chat template, inspect/plain and terse by a system message. Events and messages are
taken out of inspect's logs by its own writer. The expected values are what the harnesses reported themselves.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from rlseq.cli.main import main
from rlseq.errors import ConfigError, DataError
from rlseq.evaluation.other_harnesses.compare import compare, harness_of
from rlseq.evaluation.other_harnesses.inspect_logs import read_inspect

FILES = Path(__file__).parent / "other_harnesses"
LM = [f"{name}={FILES / 'lm_eval' / name}" for name in ("plain", "chat")]
INSPECT = [str(FILES / "inspect" / f"{name}.json") for name in ("plain", "terse")]


def by_metric(results):
    return {(found["task"], found["metric"]): found for found in results["comparisons"]}


def compared(*evaluations):
    return compare(evaluations, seed=0, resamples=1000)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lm_file(folder, change, *, source="chat"):
    """A copy of the multiple-choice task's file with its records changed."""
    (original,) = (FILES / "lm_eval" / source).glob("samples_capitals_choice_*.jsonl")
    folder.mkdir(exist_ok=True)
    records = change(lines_of(original))
    (folder / original.name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / original.name


def log_file(path, change, *, source="terse"):
    log = json.loads((FILES / "inspect" / f"{source}.json").read_text())
    change(log)
    path.write_text(json.dumps(log))
    return str(path)


def test_values_are_those_that_lm_eval_reported():
    found = by_metric(compared(*LM))
    assert {place: (one["value_a"], one["value_b"]) for place, one in found.items()} == {
        ("capitals", "exact_match,first_word"): (0.0, 0.8),
        ("capitals", "exact_match,none"): (0.0, 0.0),
        ("capitals_choice", "acc"): (0.8, 0.6),
        ("capitals_choice", "acc_norm"): (0.8, 0.7),
    }
    acc = found["capitals_choice", "acc"]
    assert acc["difference"] == pytest.approx(-0.2) and acc["rows"] == 10
    low, high = acc["ci95"]
    assert low < -0.2 < high
    # By hand: chat wins row 3 and loses rows 6, 7, 8. Of the 16 signs of these four, 1 + 4 + 4 + 1 sum to 2 or more.
    assert acc["p_value"] == pytest.approx(10 / 16, abs=0.05)
    # Row differences 1, −1, −1, −1 and six zeros: σ² = (4 − 10 · 0.2²) / 9 = 0.4, and 2.8016 · √(0.4 / 10).
    assert acc["power"]["detectable_difference"] == pytest.approx(0.56032, abs=1e-4)
    assert acc["power"]["rows_for_unit"] == math.ceil((2.80159 / 0.01) ** 2 * 0.4)


def test_grades_and_epochs_give_the_values_that_inspect_reported():
    results = compared(*INSPECT)
    assert list(results["evaluations"]) == ["plain", "terse"]
    for side, name in (("value_a", "plain"), ("value_b", "terse")):
        log = json.loads((FILES / "inspect" / f"{name}.json").read_text())
        reported = {
            score["name"]: (score["metrics"].get("accuracy") or score["metrics"]["mean"])["value"]
            for score in log["results"]["scores"]
        }
        found = {one["metric"].removeprefix("shape/"): one[side] for one in results["comparisons"]}
        assert found == pytest.approx(reported) and set(found) == {"includes", "graded", "words", "named"}
    graded = by_metric(results)["capitals", "graded"]
    assert (graded["value_a"], graded["value_b"]) == pytest.approx((0.2, 0.075))  # PARTIAL counts half
    assert (graded["rows"], graded["repeats"]) == (10, 20)


def test_repeats_of_a_row_do_not_count_as_rows(tmp_path):
    """Each epoch ten times over: the same means, and an interval as wide as before."""

    def tenfold(log):
        log["samples"] = [s | {"epoch": s["epoch"] + 2 * i} for s in log["samples"] for i in range(10)]

    many = [log_file(tmp_path / f"{name}.json", tenfold, source=name) for name in ("plain", "terse")]
    once, ten = (by_metric(compared(*pair))["capitals", "graded"] for pair in (INSPECT, many))
    assert ten["repeats"] == 200
    assert ten["ci95"] == pytest.approx(once["ci95"]) and ten["p_value"] == pytest.approx(once["p_value"])
    assert ten["power"] == once["power"]


def test_an_eval_log_gives_what_its_json_gives():
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")
    packed, plain = (read_inspect(FILES / "inspect" / name).tasks for name in ("plain.eval", "plain.json"))
    assert packed == plain


def test_without_inspect_ai_an_eval_log_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai.log", None)
    with pytest.raises(ConfigError, match="pip install inspect_ai"):
        read_inspect(FILES / "inspect" / "plain.eval")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[:7],
            r"acc of capitals_choice is not .* plain \(10 scores\) and b \(7 scores\): 3 only in plain",
        ),
        (lambda rows: [*rows, rows[0] | {"doc_id": 10}], r"1 only in b \(first row 10\)"),
        (
            lambda rows: [r | {"doc_hash": r["doc_id"] % 2 * "x" + r["doc_hash"]} for r in rows],
            "5 rows ask something el",
        ),
        (lambda rows: [*rows, rows[0]], r"acc of row 0 \(repeat 1\) twice"),
        (lambda rows: [{k: v for k, v in r.items() if k != "doc_id"} for r in rows], "line 1: not a line of lm-eval's"),
        (lambda rows: [r | {"acc": math.nan} for r in rows], "acc of row 0 is not finite"),
    ],
)
def test_rows_that_do_not_match_are_refused_with_their_number(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        compared(LM[0], f"b={lm_file(tmp_path / 'b', change)}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log: log.update(samples=log["samples"][:-1]), r"1 only in plain \(first row 'capital-9', epoch 2\)"),
        (
            lambda log: [s.update(input="Why?") for s in log["samples"] if s["id"] in ("capital-1", "capital-2")],
            "2 rows ask something else under the same",
        ),
        (lambda log: log.update(status="cancelled"), "has the status 'cancelled'"),
        (lambda log: log["samples"][3].pop("scores"), "no scores in 1 of 20 samples"),
        (lambda log: log.pop("samples"), "has no samples"),
    ],
)
def test_logs_that_do_not_match_are_refused_with_their_number(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        compared(INSPECT[0], log_file(tmp_path / "b.json", change))


def test_what_is_no_number_or_on_one_side_alone_is_said(tmp_path):
    results = compared(*LM)
    assert "Not compared, bleu,none of capitals: not every score of a row is a number." in results["notes"]
    file = lm_file(tmp_path / "b", lambda rows: [r | {"metrics": ["acc"]} for r in rows])
    results = compared(LM[0], f"b={file}")
    assert [found["metric"] for found in results["comparisons"]] == ["acc"]
    assert results["notes"] == [
        "Not compared, task of plain alone: capitals.",
        "Not compared, metrics of plain (capitals_choice) alone: acc_norm.",
    ]


def test_perplexities_are_ratios_over_documents(tmp_path):
    """Documents of 2 and 8 words with log-likelihoods −4 and −6: exp(10 / 10), not the mean of exp(2) and exp(3/4)."""

    def documents(second):
        def change(rows):
            values = ([-4.0, 2], [second, 8])
            return [
                r | {"metrics": ["word_perplexity"], "word_perplexity": v} for r, v in zip(rows, values, strict=False)
            ]

        return change

    a, b = (lm_file(tmp_path / name, documents(value)) for name, value in (("a", -6.0), ("b", -16.0)))
    (found,) = compared(f"a={a}", f"b={b}")["comparisons"]
    assert (found["value_a"], found["value_b"]) == pytest.approx((math.e, math.e**2))
    assert found["difference"] == pytest.approx(math.e**2 - math.e) and not found["rate"]


def test_two_files_of_a_task_or_two_harnesses_are_refused(tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(FILES / "lm_eval" / "plain", folder / "model")
    for path in (FILES / "lm_eval" / "chat").iterdir():
        shutil.copy(path, folder)
    with pytest.raises(DataError, match="holds 2 files of the task 'capitals'"):
        compared(str(folder), LM[0])
    with pytest.raises(ConfigError, match=r"evaluations of one harness: .* is of lm-eval, .* is of inspect"):
        compared(LM[0], INSPECT[0])
    with pytest.raises(ConfigError, match="two evaluations are called 'plain'"):
        compared(LM[0], LM[0])


def test_the_command_writes_and_prints_the_comparison(tmp_path, capsys):
    assert main(["evaluate", "--compare", *LM, "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "+80.00 pp" in printed and "37.35 pp" in printed
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["adjustment"] == {"method": "holm", "comparisons": 4}
    assert (
        "| capitals | exact_match,first_word | 10 | 0.0% | 80.0% | +80.00 pp |"
        in (tmp_path / "comparison.md").read_text()
    )
    assert main(["evaluate", "--compare", *LM, "--reward_funcs", "exact_match", "--output_dir", str(tmp_path)]) == 2
    assert "leave --reward_funcs out" in capsys.readouterr().err


def test_a_folder_of_rlseq_is_none_of_another_harness(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert harness_of(str(tmp_path)) is None and harness_of(f"x={tmp_path / 'results.json'}") is None
    assert harness_of(LM[0]) == "lm-eval" and harness_of(INSPECT[0]) == "inspect"
