"""benchmarks/record.py: five short runs make what they made when the record was written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "record.json"
LARGEST = 20_000  # bytes of the committed record


@pytest.fixture(scope="module")
def program():
    found = importlib.util.spec_from_file_location("benchmark_record", ROOT / "benchmarks" / "record.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["benchmark_record"] = module
    found.loader.exec_module(module)
    return module


def made(**changed):
    one = {
        "values": {"step 1 loss": 0.5, "step 1 tokens": 800.0},
        "completions": {"1": [[3, 4]]},
        "digests": {"w": "a"},
    }
    return one | changed


def test_equal_records_are_equal_bit_for_bit(program):
    assert program.compare({"grpo": made()}, {"grpo": made()}) == (True, ["grpo: bit for bit equal"])
    without = made(digests={})
    assert program.compare({"grpo": without}, {"grpo": made()}) == (True, ["grpo: equal in every value"])


def test_the_largest_difference_is_named_and_is_relative_above_1(program):
    # 0.5 - 0.25 = 0.25; (800 - 400) / 800 = 0.5
    other = made(values={"step 1 loss": 0.25, "step 1 tokens": 400.0})
    said = "grpo: 2 of 2 values differ, at most by 0.5 (step 1 tokens: 800.0 and 400.0)"
    for tolerance, agree in ((0.0, False), (0.49, False), (0.5, True)):
        assert program.compare({"grpo": made()}, {"grpo": other}, tolerance) == (agree, [said])


@pytest.mark.parametrize(
    ("other", "said", "within_a_tolerance"),
    [
        (made(completions={"1": [[3, 5]]}), "other completions: 1", False),
        (made(completions={"1": [[3, 4]], "2": []}), "other completions: 2", False),
        (made(values={"step 1 loss": 0.5}), "only in one record: step 1 tokens", False),
        (made(values={"step 1 loss": float("nan"), "step 1 tokens": 800.0}), "at most by inf (step 1 loss", False),
        (made(digests={"w": "b"}), "grpo: other bits: w", True),
    ],
)
def test_what_differs_is_said(program, other, said, within_a_tolerance):
    agree, (line,) = program.compare({"grpo": made()}, {"grpo": other})
    assert not agree and said in line
    assert program.compare({"grpo": made()}, {"grpo": other}, 0.9)[0] == within_a_tolerance


def test_records_without_a_run_in_common_do_not_agree(program, tmp_path, capsys):
    agree, lines = program.compare({"grpo": made()}, {"ppo": made()})
    assert not agree and sorted(lines) == ["grpo: only in one record", "ppo: only in one record"]
    for name, record in (("a", made()), ("b", made(digests={"w": "b"}))):
        (tmp_path / name).write_text(json.dumps({"grpo": record}))
    assert program.main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert program.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out.splitlines() == ["grpo: bit for bit equal", "grpo: other bits: w"]


def test_times_paths_and_versions_are_no_values(program, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time": 3.0, "format_version": 1}\n')
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    record = program.of_training(tmp_path)
    assert record["values"] == {"step 1 loss": 0.5}
    assert list(record["digests"]) == ["model.safetensors"]


def test_a_record_is_written_as_json_with_its_values_at_9_digits(program):
    record = {"grpo": made(values={"a": 1 / 3, "b": 2.0, "c": float("inf")}), "sft": made(completions={})}
    assert json.loads(program.as_text(record)) == record
    kept = program.values_only(record["grpo"])
    assert kept == made(values={"a": 0.333333333, "b": 2.0, "c": float("inf")}, digests={})


def test_the_record_is_small_and_has_every_run(program):
    assert KEPT.stat().st_size <= LARGEST
    kept = json.loads(KEPT.read_text())
    assert list(kept) == list(program.RUNS) and not any(record["digests"] for record in kept.values())
    assert all(record["values"] and (record["completions"] or name == "sft") for name, record in kept.items())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["grpo", "ppo", "sft", "evaluate", "extraction"])
def test_a_run_makes_the_completions_of_the_record_and_its_values(program, tmp_path, name):
    needed = program.NEEDS.get(name)
    if needed is not None and not (ROOT / needed).exists():
        pytest.skip(f"there is no {needed} (make model)")
    kept = json.loads(KEPT.read_text())[name]
    agree, lines = program.compare({name: kept}, {name: program.record(name, tmp_path / "run")}, 1e-5)
    assert agree, lines
