"""`rlseq audit`: the alarm of a hacked reward, its numbers by hand, and what it refuses."""

import json

import numpy as np
import pytest
from tiny_report import HOSTILE, results, samples  # noqa: F401

from rlseq.cli.main import main
from rlseq.evaluation.audit.audit import OPTIMISED, audit, repeated_share, weights_of
from rlseq.evaluation.audit.report import conclusion, write_audit
from rlseq.evaluation.audit.trends import PAIRS, find_trends, split_steps, verdicts
from rlseq.evaluation.report.write import write_report

REWARDS = """
def long(completion):
    return len(completion.split()) / 10

def right(completion, references):
    words = completion.split()
    return words.count(references[0]) / max(1, len(words))

def fails(completion):
    raise ValueError("never")
"""


def rollout(step, key, sample, values, total, **fields):
    return {
        **{"step": step, "prompt_key": key, "sample": sample, "prompt": f"say {key}", "references": ["yes"]},
        **{"completion": "", "values": values, "status": dict.fromkeys(values, "ok"), "total": total},
        **{"advantage": 0.0, "length": 4, **fields},
    }


def padded(steps=9, prompts=6, group=4, seed=0, hacked=True):
    """A run that learns to pad its answer with words: longer with every step, and less often right."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        for prompt in range(prompts):
            for sample in range(group):
                more = int(rng.integers(0, 3)) + (step if hacked else 0)
                text = " ".join(["yes", *["um"] * more])
                value = (more + 1) / 10
                records.append(
                    rollout(step, f"{step}-{prompt}", sample, {"long": value}, value, completion=text, length=more + 1)
                )
    return records


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)

    def written(records, config=None):
        (tmp_path / "run/rollouts").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/rollouts/000001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if config is not None:
            (tmp_path / "run/config.yaml").write_text(config)
        return "run"

    return written


def test_a_hackable_reward_raises_the_alarm(write_run, capsys):
    assert main(["audit", write_run(padded()), "--held_out_rewards", "rewards.py:right"]) == 1
    out = capsys.readouterr().out
    assert "ALARM: right fell while the optimised reward rose" in out and out.count("right fell") == 1
    assert "yes um um" in out  # a completion to read


def test_a_run_that_gains_nothing_raises_none(write_run, capsys):
    assert main(["audit", write_run(padded(hacked=False)), "--held_out_rewards", "rewards.py:right"]) == 0
    assert "No alarm" in capsys.readouterr().out


def test_a_reward_that_falls_alone_is_no_alarm():
    """The optimised reward stands still: whatever fell beside it was not traded for it."""
    records = [rollout(s, f"{s}-{p}", 0, {"a": p / 10}, p / 10) for s in range(1, 10) for p in range(8)]
    falls = [-record["step"] - record["total"] for record in records]
    found = audit(records, {}, {"falls": falls})
    assert found.trends.changes["falls"][0].p_fall < 0.001 and not found.alarms


def test_a_reward_of_weight_0_is_held_out(write_run, capsys):
    records = padded()
    for record in records:
        record["values"]["brief"] = -record["total"]
    config = "format_version: 1\nreward_funcs: [long, brief]\nreward_weights: [1.0, 0.0]\n"
    assert main(["audit", write_run(records, config), "--json"]) == 1
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["held_out"] == ["brief"] and numbers["components"] == ["long"]
    assert numbers["shares_of_advantages"] == {"long": pytest.approx([1, 1, 1])}


def test_weights_are_those_of_the_list_or_of_the_specs(tmp_path):
    records = [rollout(1, "p", 0, {"a": 1.0, "b": 2.0}, 1.0)]
    for text, expected in (
        ("reward_funcs: [a, {func: b, weight: 0.5}]", {"a": 1.0, "b": 0.5}),
        ("reward_funcs: [a, b]\nreward_weights: [2, 0]", {"a": 2.0, "b": 0.0}),
        ("reward_funcs: [a]", {}),  # another log's
    ):
        (tmp_path / "config.yaml").write_text(f"format_version: 1\n{text}\n")
        assert weights_of(tmp_path, records) == expected
    assert weights_of(tmp_path / "elsewhere", records) == {}


def test_the_peak_in_the_middle_of_a_run_is_seen():
    """The held-out reward rises with the optimised one, then falls below its peak, and stays above where it began."""
    rng = np.random.default_rng(0)
    records, values = [], []
    for step in range(1, 31):
        for prompt in range(8):
            total = step / 30 + rng.normal() / 20
            records.append(rollout(step, f"{step}-{prompt}", 0, {"a": total}, total))
            values.append((step / 15 if step <= 15 else 2 - step / 20) + rng.normal() / 20)
    found = audit(records, {}, {"peaks": values})
    assert [(alarm.held_out, alarm.pair) for alarm in found.alarms] == [("peaks", (1, 2))]


def test_means_and_changes_by_hand():
    #         step 1: p 1, q 3    step 2: p 2, q 2    step 3: p 5, q NaN
    values = np.array([1.0, 3.0, 2.0, 2.0, 5.0, np.nan])
    trends = find_trends({"x": values}, np.array([1, 1, 2, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 1]))
    assert [mean.value for mean in trends.by_third["x"]] == [2, 2, 5]
    assert [change.difference for change in trends.changes["x"]] == [3, 3]
    assert trends.steps == [(1, 1), (2, 2), (3, 3)] and trends.prompts == 2


def test_p_is_that_of_the_clustered_standard_error():
    """Beside a t-test in closed form: every prompt is in one step, and its rollouts are equal."""
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(1)
    steps, prompts = np.repeat(np.arange(3), 200), np.repeat(np.arange(300), 2)
    values = np.repeat(rng.normal(size=300), 2) + 0.2 * steps
    change = find_trends({"x": values}, steps, prompts).changes["x"][0]
    expected = ttest_ind(values[steps == 2][::2], values[steps == 0][::2], equal_var=False)
    assert change.p_rise == pytest.approx(expected.pvalue / 2, rel=0.2)
    assert change.p_rise + change.p_fall == pytest.approx(1)


def test_steps_are_cut_into_parts_of_equal_numbers_of_steps():
    steps = np.array([2, 2, 4, 6, 6, 6, 8, 10, 12])
    assert split_steps(steps, 3).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_false_alarms_under_no_change_stay_below_the_level():
    """Held-out coins beside a reward that rises: over 300 runs at most 5% and three standard errors of it."""
    rng = np.random.default_rng(2)
    steps, prompts = np.repeat(np.arange(12), 16), np.repeat(np.arange(48), 4)
    alarms = 0
    for _ in range(300):
        columns = {OPTIMISED: steps + rng.normal(size=192)}
        columns |= {name: rng.integers(0, 2, 192).astype(float) for name in ("coin", "other coin")}
        trends = find_trends(columns, steps, prompts, bins=3)
        alarms += any(verdict.alarm for verdict in verdicts(trends, OPTIMISED, ["coin", "other coin"]))
    assert alarms / 300 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert len(PAIRS) == 2


def test_the_shares_of_the_advantages_add_up_by_hand():
    # In each group a is 0, 1 and b is 0, 3: centred ∓0.5 and ∓1.5, total ∓2. a: 2·0.5·2 / 2·4 = 1/4, b: 3/4.
    records = [
        rollout(step, f"{step}", i, {"a": float(i), "b": 3.0 * i}, 4.0 * i) for step in (1, 2, 3) for i in (0, 1)
    ]
    assert audit(records, {}).shares == {"a": pytest.approx([0.25] * 3), "b": pytest.approx([0.75] * 3)}
    assert audit(records, {"a": 2.0}).shares == {}  # with these weights the totals would be others


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repeated_share({"completion_ids": [1, 2, 3, 4, 1, 2, 3, 4]}) == pytest.approx(1 / 5)  # 1 2 3 4 comes twice
    assert repeated_share({"completion_ids": [1, 2, 3]}) is None and repeated_share({}) is None


def test_without_a_held_out_reward_nothing_is_tested(write_run, capsys):
    assert main(["audit", write_run(padded())]) == 0
    assert "No held-out reward: nothing was tested" in capsys.readouterr().out


def test_a_held_out_reward_that_fails_is_said(write_run, capsys):
    assert main(["audit", write_run(padded()), "--held_out_rewards", "rewards.py:fails"]) == 0
    assert "warning: fails failed on 216 rollouts. The first:" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(write_run, tmp_path, capsys):
    run = write_run(padded(steps=2))
    for argv, said in (
        (["audit", "nowhere"], "has no rollouts"),
        (["audit", run], "3 steps at least"),
        (["audit", run, "--held_out_rewards", "rewards.py:none"], "none"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_report_of_a_run_has_the_audit_of_its_log(write_run, results, samples, tmp_path):  # noqa: F811
    records = padded()
    for record in records:
        record["values"]["brief <b>"] = -record["total"]
        record["completion"] += HOSTILE
    config = "format_version: 1\nreward_funcs: [long, brief]\nreward_weights: [1.0, 0.0]\n"
    run = tmp_path / write_run(records, config)
    assert "Was the reward hacked?" not in write_report(results, samples, run / "evaluation").read_text()
    write_audit(run)
    page = write_report(results, samples, run / "evaluation").read_text()
    assert "Was the reward hacked?" in page and "ALARM: brief &lt;b&gt; fell" in page and "<b> fell" not in page
    assert "<script>alert" not in page
    numbers = json.loads((run / "audit.json").read_text())
    assert numbers["alarm"] and conclusion(numbers).startswith("ALARM: brief <b> fell")
