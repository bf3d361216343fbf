"""Details that a reward does not give are no zeros: a number says of how many completions it is, and what lacks."""

import math

import pytest
from tiny import tiny_model
from tiny_task import tiny_tokenizer

from rlseq.evaluation.report import tables
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import Ratio, load_rewards, reward

ROWS = [{"prompt": prompt, "references": ["a"], "known": known} for prompt, known in (("a b", 1), ("c", 0), ("d", 1))]


@reward(corpus={"errors": Ratio("wrong", "words"), "misspelt": Ratio("wrnog", "words")})
def counted(completions, known):
    """One error in two words where the row is known; elsewhere no details."""
    return [(0.5, {"wrong": 1, "words": 2} if k else {}) for k in known]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=2, resamples=20)
    with load_rewards([counted]) as suite:
        return contrast({"one": path}, ROWS, suite, settings=settings, quiet=True)


def test_a_metric_is_of_the_completions_that_have_details(results):
    # 2 of 3 rows have 1 error in 2 words: 2 / 4, not 2 / 6 of three rows
    block = results["models"]["one"]["strategies"]["greedy"]
    assert block["errors"] == {"value": 0.5, "ci95": [0.5, 0.5], "completions": 2, "of": 3}
    assert block["misspelt"]["value"] is None and block["misspelt"]["completions"] == 0


def test_notes_name_the_reward_and_its_statistics(results):
    said = [note for note in results["notes"] if "details" in note]
    assert said == [
        "errors of one under greedy is of 2 of 3 completions: on the others the details of reward counted lack "
        "wrong or words.",
        "misspelt of one under greedy is of 0 of 3 completions: on the others the details of reward counted lack "
        "wrnog or words.",
    ]


def test_a_table_says_of_how_many_completions_a_value_is_even_if_there_is_none(results):
    block = results["models"]["one"]["strategies"]["greedy"]
    shown = {
        name: tables.shown(tables.metric(results, name), block[name]) for name in ("errors", "misspelt", "counted")
    }
    assert shown["errors"].endswith(" (of 2 of 3 completions)")
    assert shown["misspelt"] == "n/a (of 0 of 3 completions)"
    assert "completions" not in shown["counted"] and math.isclose(block["counted"]["value"], 0.5)
