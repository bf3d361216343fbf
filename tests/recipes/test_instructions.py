"""The instructions task's rows, and the reward for constraints that are met; values by hand."""

from __future__ import annotations

import json
import random

import pytest
from test_recipes import ROOT

from rlseq.data.rows import load_rows
from rlseq.errors import DataError, RewardError
from rlseq.scoring import load_rewards
from rlseq.types import Rollout

DATA = str(ROOT / "recipes" / "instructions" / "data.py")
SPLITS = ("train", "validation", "test", "unseen")


@pytest.fixture(scope="module")
def rows():
    return {split: load_rows(DATA, split) for split in SPLITS}


@pytest.fixture(scope="module")
def suite():
    with load_rewards(["constraints_met"]) as loaded:
        yield loaded


def score_all(suite, texts, constraints):
    rollouts = [Rollout(str(i), 0, (1,), (True,), (-0.1,), t, t, None, "stop", "s") for i, t in enumerate(texts)]
    table = suite.score(rollouts, {"prompt": ["?"] * len(texts), "constraints": constraints})
    return table.values["constraints_met"], table.details["constraints_met"]


def score(suite, completion, *constraints):
    (value,), (details,) = score_all(suite, [completion], [list(constraints)])
    return value, details


def identity(row):
    return row["topic"], frozenset(json.dumps(one, sort_keys=True) for one in row["constraints"])


def test_no_topic_with_its_constraints_is_in_two_splits_or_twice_in_one(rows):
    assert [len(rows[split]) for split in SPLITS] == [2000, 300, 300, 300]
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({identity(row) for row in everything}) == 2900
    assert len({row["prompt"][0]["content"] for row in everything}) == 2900


def test_the_kinds_of_the_unseen_split_are_in_no_other(rows):
    kinds = {split: {one["kind"] for row in rows[split] for one in row["constraints"]} for split in SPLITS}
    familiar = {"sentences", "use_words", "avoid_words", "lower_case", "upper_case", "closing_phrase", "max_words"}
    assert kinds["train"] == kinds["validation"] == kinds["test"] == familiar
    assert kinds["unseen"] == {"bullets", "opening_word", "no_commas", "quoted", "min_words"}
    prompts = [row["prompt"][0]["content"].lower() for split in SPLITS[:3] for row in rows[split]]
    assert not any(f" {word}" in text for text in prompts for word in ("comma", "quot", "line", "begin", "at least"))


def test_a_prompt_names_its_topic_and_every_value_of_its_constraints(rows):
    for row in (row for split in SPLITS for row in rows[split]):
        text = row["prompt"][0]["content"]
        assert row["topic"] in text
        assert len({one["kind"] for one in row["constraints"]}) == len(row["constraints"]) in (2, 3)
        for value in (value for one in row["constraints"] for key, value in one.items() if key != "kind"):
            assert all(str(part) in text for part in (value if isinstance(value, list) else [value])), row


def answer(constraints):
    """A text that meets the constraints, made of them: filler words, the words to use, and what the others ask for."""
    of = {one["kind"]: one for one in constraints}
    phrase = of["closing_phrase"]["phrase"] if "closing_phrase" in of else ""
    pieces = [of["opening_word"]["word"]] if "opening_word" in of else []
    pieces += of.get("use_words", {"words": []})["words"]
    pieces += ["zig"] * (of["min_words"]["count"] if "min_words" in of else 1)
    sentences = of["sentences"]["count"] - bool(phrase) if "sentences" in of else 1
    lines = of["bullets"]["count"] if "bullets" in of else 0
    text = " ".join([" ".join(pieces) + ".", *["zag."] * (sentences - 1), *([phrase] if phrase else [])])
    if lines:
        text = "\n".join(f"- {part}" for part in [text, *["zag"] * (lines - 1)])
    text = text.lower() if "lower_case" in of else text.upper() if "upper_case" in of else text
    return f'"{text}"' if "quoted" in of else text


def test_one_answer_can_meet_all_constraints_of_a_row(rows, suite):
    sample = [row for split in SPLITS for row in random.Random(split).sample(rows[split], 100)]
    texts = [answer(row["constraints"]) for row in sample]
    values, _ = score_all(suite, texts, [row["constraints"] for row in sample])
    assert [
        (text, row["constraints"]) for text, row, value in zip(texts, sample, values, strict=True) if value != 1
    ] == []


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test, unseen"):
        load_rows(DATA, "dev")


def sentences(count):
    return {"kind": "sentences", "count": count}


def at_most(count):
    return {"kind": "max_words", "count": count}


def at_least(count):
    return {"kind": "min_words", "count": count}


def use(*words):
    return {"kind": "use_words", "words": list(words)}


def avoid(*words):
    return {"kind": "avoid_words", "words": list(words)}


def end(phrase):
    return {"kind": "closing_phrase", "phrase": phrase}


def bullets(count):
    return {"kind": "bullets", "count": count}


LOWER, UPPER = {"kind": "lower_case"}, {"kind": "upper_case"}
WELL, QUOTED, NO_COMMAS = {"kind": "opening_word", "word": "Well"}, {"kind": "quoted"}, {"kind": "no_commas"}


@pytest.mark.parametrize(
    ("completion", "constraint", "met"),
    [
        ("Tea is hot. I like it!", sentences(2), True),
        ("Tea is hot. I like it!", sentences(1), False),
        ("Tea is hot. I like it!", sentences(3), False),
        ("Really?! Yes...", sentences(2), True),  # marks in a row end one sentence
        ("Well… tea it is.", sentences(2), True),
        ("Tea is hot. I like", sentences(2), True),  # what is left without an end is one
        ("It costs 3.5 euros.", sentences(1), True),
        ("Drink it, e.g. now.", sentences(2), True),  # an abbreviation counts as an end: no dictionary
        ('He said "Tea is hot." And left.', sentences(2), True),
        ("“Tea.” (It is hot.) **Yes.** No.", sentences(4), True),
        ("1. Tea is hot.\n2. It is dark.", sentences(2), True),  # the number of a list is no sentence
        ("My tea\n\nIt is hot", sentences(2), True),  # a line break ends one
        ("I like tea. 🙂", sentences(1), True),
        ("one two three", at_most(3), True),
        ("one two three", at_most(2), False),
        ("I don't, you don’t.", at_most(4), True),  # I, don't, you, don’t
        ("well-known 3.5", at_most(3), False),  # well, known, 3, 5
        ("- one * two \u2013 three!", at_most(3), True),  # marks are no words
        ("one two three", at_least(3), True),
        ("one two three", at_least(4), False),
        ("Hot TEA, in a cup.", use("tea", "cup"), True),
        ("Hot tea.", use("tea", "cup"), False),
        ("Teas in a teacup.", use("tea"), False),  # whole words only
        ("The tea's smell.", use("tea"), True),
        ("The tea’s smell.", avoid("tea"), False),
        ("Tea-time.", avoid("tea"), False),
        ("Teas in a teacup.", avoid("tea", "cup"), True),
        ("A cup.", avoid("tea", "cup"), False),
        ("tea is hot, 3 times", LOWER, True),
        ("tea is Hot", LOWER, False),
        ("3", LOWER, False),  # no letter
        ("TEA IS HOT, 3 TIMES", UPPER, True),
        ("TEA IS HOt", UPPER, False),
        ("3", UPPER, False),
        ("Tea is hot. That is all.", end("That is all."), True),
        ("TEA IS HOT. THAT IS ALL.\n", end("That is all."), True),
        ('Tea is hot. "That is all."', end("That is all."), True),
        ("Tea is hot. That is all", end("That is all."), False),
        ("That is all. Tea is hot.", end("That is all."), False),
        ("Tea is hot. That is alls", end("That is all."), False),
        ("Somewhat is all.", end("hat is all."), False),  # within a word
        ("- one\n\n  - two\n", bullets(2), True),
        ("- one\n- two", bullets(3), False),
        ("Two things:\n- one\n- two", bullets(2), False),  # another line
        ("- one\ntwo", bullets(2), False),
        ("* one\n* two", bullets(2), False),
        ("-one\n-two", bullets(2), False),
        ("Well, tea.", WELL, True),
        ('"WELL... tea."', WELL, True),
        ("Tea, well.", WELL, False),
        ("Well-known tea.", WELL, True),  # a hyphen parts words
        ("Tea is hot; I like it.", NO_COMMAS, True),
        ("Tea is hot, I like it.", NO_COMMAS, False),
        (' "Tea is hot."\n', QUOTED, True),
        ("“Tea\nis hot.”", QUOTED, True),
        ("Tea is hot.", QUOTED, False),
        ('"Tea" is "hot"', QUOTED, False),  # two pairs
        ('"Tea is hot.', QUOTED, False),
        ("'Tea is hot.'", QUOTED, False),  # single ones
    ],
)
def test_each_kind_by_hand(suite, completion, constraint, met):
    value, details = score(suite, completion, constraint)
    assert value == met
    assert details == {"all_met": int(met), "completions": 1, "missed": [] if met else [constraint["kind"]]}


def test_the_value_is_the_share_of_constraints_met(suite):
    value, details = score(suite, "tea is hot.", LOWER, sentences(2), use("tea"))
    assert value == pytest.approx(2 / 3)
    assert details == {"all_met": 0, "completions": 1, "missed": ["sentences"]}


@pytest.mark.parametrize("completion", ["", "\n ", '""', "...", "🙂"])
def test_a_completion_without_a_word_meets_nothing(suite, completion):
    assert score(suite, completion, NO_COMMAS, avoid("tea"), at_most(9), QUOTED)[0] == 0


def test_a_row_without_constraints_has_no_value(suite):
    assert score(suite, "Tea.") == (None, {"why": "the row has no constraints"})


@pytest.mark.parametrize("completion", ["Tea.", ""])
def test_an_unknown_kind_is_named(suite, completion):
    with pytest.raises(RewardError, match="unknown kind of constraint: 'rhyme'; the kinds are sentences, max_words"):
        score(suite, completion, LOWER, {"kind": "rhyme"})


def test_the_corpus_metric_is_the_share_of_completions_that_meet_all(suite):
    texts = ["tea.", "Tea.", "tea. tea.", ""]  # all; one of two; one of two; none
    values, details = score_all(suite, texts, [[LOWER, sentences(1)]] * 4)
    assert values == [1, 0.5, 0.5, 0]
    metric = suite.corpus["all_met"]
    assert metric.compute({key: sum(one[key] for one in details) for key in metric.statistics}) == 0.25
