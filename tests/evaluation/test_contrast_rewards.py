"""Rewards in a contrast: names that meet, and rows or checkpoints on which a reward abstains."""

import dataclasses
import json
import math
import re

import pytest
from test_contrast import ROWS, SETTINGS, checkpoints, letters, lines, quick, says_a, silent  # noqa: F401

from rlseq.evaluation.run import contrast_and_report
from rlseq.scoring import load_rewards


def test_two_rewards_of_one_name_stay_two_series(checkpoints):  # noqa: F811
    specs = [{"func": letters, "name": "first"}, {"func": says_a, "name": "second"}]
    both = quick({"one": checkpoints["one"]}, specs)["models"]["one"]["strategies"]["greedy"]
    twice = quick({"one": checkpoints["one"]}, [letters, letters])["models"]["one"]["strategies"]["greedy"]
    own = {"exact_match", "length", "truncated", "logprob", "logprob_per_token", "length_ratio", "repetition"}
    assert set(both) - own == {"first", "second"} and both["first"]["value"] != both["second"]["value"]
    assert len(set(twice) - own) == 2 and {twice[name]["value"] for name in set(twice) - own} == {
        both["first"]["value"]
    }


def test_a_reward_with_the_name_of_a_metric_keeps_a_series_of_its_own(checkpoints):  # noqa: F811
    def length(completion: str) -> float:
        return 17.0

    found = quick({"one": checkpoints["one"]}, [length, "exact_match"])["models"]["one"]["strategies"]["greedy"]
    assert found["reward/length"]["value"] == 17 and 1 <= found["length"]["value"] <= 5
    assert {"reward/exact_match", "exact_match"} <= set(found)


def test_an_aggregate_that_a_row_abstains_from_is_over_the_others(checkpoints):  # noqa: F811
    def shy(completion: str, prompt: str) -> float | None:
        return None if prompt.startswith("c") else 2.0

    found = quick({"one": checkpoints["one"]}, [shy])["models"]["one"]["strategies"]["sample"]
    # 3 samples of each of 5 rows, of which one abstains
    assert found["shy"] == {"value": 2.0, "ci95": [2.0, 2.0], "completions": 12, "of": 15}


def test_a_reward_that_abstains_everywhere_is_null_on_file_and_the_report_says_so(checkpoints, tmp_path, capsys):  # noqa: F811
    settings = dataclasses.replace(SETTINGS, resamples=20, strategies=("greedy", "sample"), primary="shyness:greedy")
    options = {"settings": settings, "prompt_options": {}}
    for name, rewards in (("alone", [silent]), ("beside", [silent, letters])):
        out = tmp_path / name
        with load_rewards(rewards) as suite:
            results = contrast_and_report(checkpoints, ROWS, suite, output_dir=out, **options)

        def refuse(constant):
            pytest.fail(f"{constant} is not valid JSON")

        assert json.loads((out / "results.json").read_text(), parse_constant=refuse) == results
        for file in ("per_example.jsonl", "samples.jsonl"):
            for line in (out / file).read_text().split("\n")[:-1]:
                json.loads(line, parse_constant=refuse)
        for model in results["models"].values():
            for metric in ("silent", "shyness"):
                assert model["strategies"]["greedy"][metric] == {
                    "value": None,
                    "ci95": [None, None],
                    "completions": 0,
                    "of": len(ROWS),
                }
        for c in results["comparisons"]:
            if c["metric"] in ("silent", "shyness"):
                assert (c["difference"], c["ci95"], c["p_value"]) == (None, [None, None], None)
            else:
                assert math.isfinite(c["difference"]) and 0 < c["p_value"] <= 1
        printed = " ".join(capsys.readouterr().out.split())
        nothing = "n/a (of 0 of 5 completions)"
        assert f"Not measured: shyness under greedy is {nothing} for two, against {nothing} for one." in printed
        for text in (printed, (out / "report.html").read_text(), (out / "report.md").read_text()):
            assert "n/a" in text and not re.search(r"\bnan\b", text, re.IGNORECASE)
