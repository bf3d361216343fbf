"""Where references do not list the right answers, the report leaves out what would be a chance of a right answer."""

import pytest
from tiny_report import METRICS, compared

from rlseq.evaluation.measure.quality import quality_rows
from rlseq.evaluation.report import tables
from rlseq.evaluation.report.headline import make_headline
from rlseq.evaluation.report.write import print_summary, write_report
from rlseq.evaluation.right_answers import JUDGED, answers_note, judges_of, right_answers
from rlseq.scoring import load_rewards, reward
from rlseq.types import Prompt, Rollout

OPEN = {"listed": False, "by": "measured", "rewards": {"same_sum": {"rows": 4, "unlisted": 3}}}


@reward(range=(0, 1))
def same_sum(completions, references):
    return [float(sum(ids(c)) == sum(ids(r[0]))) if r else None for c, r in zip(completions, references, strict=True)]


@reward(range=(0, 1))
def digits(completions):
    return [float(c.isdigit()) for c in completions]


def unbounded(completions, references):
    return [1.0] * len(completions)


def ids(text):
    return tuple(map(int, text))


def measured(*rows, funcs=(same_sum, digits, unbounded)):
    """Statistics of rows (reference, *completions)."""
    prompts = [Prompt(str(i), "p", (0,), {"references": (row[0],) if row[0] else ()}) for i, row in enumerate(rows)]
    groups = [
        [Rollout.from_ids(str(i), ids(text), text, logprobs=[0.0] * len(text)) for text in row[1:]]
        for i, row in enumerate(rows)
    ]
    with load_rewards(list(funcs)) as suite:
        return quality_rows(prompts, groups, [[ids(row[0])] if row[0] else [] for row in rows], suite)[0]


def test_rewards_that_read_a_column_and_declare_their_range_judge():
    with load_rewards([same_sum, digits, unbounded]) as suite:
        assert judges_of(suite, ["prompt", "references"]) == {"same_sum": 1.0}


def test_a_row_counts_with_a_right_completion_and_is_unlisted_with_one_that_is_no_reference():
    rows = measured(("12", "12", "99"), ("12", "12", "21"), ("12", "99"), ("", "12"))
    judged = [{key.name: value for key, value in row.items() if key.source == JUDGED.source} for row in rows]
    assert judged == [{"right": 1, "unlisted": 0}, {"right": 1, "unlisted": 1}, {}, {}]
    assert right_answers(rows, "auto") == {
        "listed": False,
        "by": "measured",
        "rewards": {"same_sum": {"rows": 2, "unlisted": 1}},
    }


@pytest.mark.parametrize(("unlisted", "listed"), [(1, True), (2, False)])
def test_up_to_a_twentieth_of_the_rows_may_have_other_right_answers(unlisted, listed):
    rows = measured(*[("12", "21")] * unlisted, *[("12", "12")] * (20 - unlisted))
    assert right_answers(rows, "auto")["listed"] is listed


def test_references_count_as_listed_where_nothing_was_right_and_the_setting_decides():
    wrong, open_ = measured(("12", "99")), measured(("12", "21"))
    assert right_answers(wrong, "auto") == {"listed": True, "by": "measured", "rewards": {}}
    assert right_answers(wrong, "open")["listed"] is False and right_answers(open_, "listed")["listed"] is True
    assert answers_note(right_answers(open_, "listed")) is None
    assert "(right_answers: open)" in answers_note(right_answers(wrong, "open"))
    assert "in 1 of the 1 rows" in answers_note(right_answers(open_, "auto"))


def without(results, capsys, samples, tmp_path):
    """Headline, tiles, terminal and both files of the report."""
    headline = make_headline(results)
    write_report(results, samples, tmp_path, metrics=METRICS)
    print_summary(results)
    texts = [headline.cost, capsys.readouterr().out]
    return headline, "\n".join([*texts, *((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))])


def test_open_answers_take_chances_of_references_out_of_the_report(results, samples, capsys, tmp_path):
    results["comparisons"] += [compared("exact_pass_at_k.4", None, 0.01, [0.005, 0.03])]
    for entry in results["models"].values():
        entry["likelihood"]["teacher_forced_exact_match"] = {"value": 0.5, "ci95": [0.4, 0.6]}
    said = (
        "The exact chance",
        "xpected accuracy",
        "pass@k",
        "Coverage rose",
        "Exact match",
        "orced exact match",
        "Unreach",
    )
    _, listed = without(results, capsys, samples, tmp_path)
    assert [words for words in said if words not in listed] == []
    results["right_answers"] = OPEN
    headline, text = without(results, capsys, samples, tmp_path)
    assert [words for words in said if words in text] == []
    assert [tile.metric.name for tile in headline.tiles] == ["wer", "wer", "nll_per_token"]
    assert headline.cost.startswith("The references became less likely: NLL per token 0.210 → 0.250 nats")


def test_the_primary_metric_is_shown_whatever_the_references_are(results):
    results["right_answers"] = OPEN
    results["comparisons"] += [compared("exact_match", "greedy", 0.02, [0.01, 0.03])]
    assert not any(c.metric.name == "exact_match" for c in tables.comparisons(results))
    results["primary"] = {"metric": "exact_match", "strategy": "greedy", "a": "base", "b": "rl"}
    assert tables.comparisons(results)[0].metric.name == "exact_match"
