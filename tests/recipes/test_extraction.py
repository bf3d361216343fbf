"""The extraction task's rows, and the reward for the fields of an object; values by hand."""

from __future__ import annotations

import functools
import json

import jsonschema
import pytest
from test_recipes import ROOT

from rlseq.data.rows import load_rows
from rlseq.errors import DataError
from rlseq.scoring import load_rewards
from rlseq.types import Rollout

DATA = str(ROOT / "recipes" / "extraction" / "data.py")
SPLITS = ("train", "validation", "test", "harder")
ANA = {"name": "Ana", "age": 34, "home": {"city": "Porto"}}


@pytest.fixture(scope="module")
def rows():
    return {split: load_rows(DATA, split) for split in SPLITS}


def leaves(value):
    return {leaf for inner in value.values() for leaf in (leaves(inner) if isinstance(inner, dict) else {inner})}


def test_no_record_is_in_two_splits_or_twice_in_one(rows):
    records = [json.dumps({**row["record"], "email": None}, sort_keys=True) for s in SPLITS[:3] for row in rows[s]]
    by_split = [{json.dumps({**r["record"], "email": None}, sort_keys=True) for r in rows[s]} for s in SPLITS]
    assert [len(rows[split]) for split in SPLITS] == [4000, 500, 500, 500]
    assert len(set(records)) == sum(len(found) for found in by_split[:3])  # no two splits share one
    assert all(len({row["references"][0] for row in rows[split]}) == len(rows[split]) for split in SPLITS)


def test_the_harder_split_shares_no_text_value_with_the_others(rows):
    texts = {s: {leaf for row in rows[s] for leaf in leaves(row["record"]) if isinstance(leaf, str)} for s in SPLITS}
    assert not texts["harder"] & (texts["train"] | texts["validation"] | texts["test"])


@functools.cache
def validator_of(schema):
    """A validator of a schema, which is found to be one itself."""
    kind = jsonschema.validators.validator_for(json.loads(schema))
    kind.check_schema(json.loads(schema))
    return kind(json.loads(schema))


def test_every_value_stands_in_its_text_and_every_record_follows_its_schema(rows):
    for row in (row for split in SPLITS for row in rows[split]):
        text = row["prompt"][-1]["content"].partition("Text: ")[2]
        assert all(str(leaf) in text for leaf in leaves(row["record"])), row
        assert json.loads(row["references"][0]) == row["record"]
        validator_of(json.dumps(row["schema"])).validate(row["record"])


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test, harder"):
        load_rows(DATA, "dev")


def score(completion, record=ANA, **kwargs):
    rollout = Rollout("k", 0, (1, 2), (True, True), (-0.1, -0.1), completion, completion, None, "stop", "s")
    with load_rewards([{"func": "json_fields", "kwargs": kwargs}]) as suite:
        table = suite.score([rollout], {"prompt": ["?"], "record": [record]})
    return table.values["json_fields"][0], table.details["json_fields"][0]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"name": "Ana", "age": 34, "home": {"city": "Porto"}}', 1),
        (' {"home":{"city":"Porto"},"age":34.0,"name":"Ana"}\n', 1),  # order, white space and 34.0 do not matter
        ('Here: {"name": "Ana", "age": 34, "home": {"city": "Porto"}}', 1 / 2),  # text around it
        ('```json\n{"name": "Ana", "age": 34, "home": {"city": "Porto"}}\n```', 1 / 2),
        ('{"name": "Ana", "age": "34", "home": {"city": "Porto"}}', 2 / 3),  # text is no number
        ('{"name": "Ana", "age": 34}', 2 / 3),  # a field is missing
        ('{"name": "Ana", "age": 34, "home": {"city": "Porto"}, "job": null}', 3 / 4),  # one is invented
        ('{"name": "Ana", "age": 34, "home": "Porto"}', 2 / 4),  # home where home.city should be
        ('{"name": "Ana", "name": "Ana", "age": 34, "home": {"city": "Porto"}}', 3 / 4),  # given twice
        ('{"name": "Ben", "name": "Ana", "age": 34, "home": {"city": "Porto"}}', 2 / 4),
        ('{"name": "Ana", "age": true, "home": {"city": "Porto"}}', 2 / 3),
        ("{}", 0),
        ('{"name": "Ana", "age": 34', 0),  # cut: there is no object
        ("", 0),
        ('[{"name": "Ana", "age": 34, "home": {"city": "Porto"}}]', 1 / 2),
        ("{" * 5000, 0),
        ('{"a":' * 5000, 0),
    ],
)
def test_json_fields_by_hand(completion, value):
    got, details = score(completion)
    assert got == pytest.approx(value)
    assert details["exact"] == (value == 1)


def test_true_is_not_one_and_lists_are_compared_in_order():
    assert score('{"n": true}', {"n": 1})[0] == 0
    assert score('{"n": [1, {"a": 2}]}', {"n": [1, {"a": 2}]})[0] == 1
    assert score('{"n": [{"b": {"c": true}}]}', {"n": [{"b": {"c": True}}]})[0] == 1
    assert score('{"n": [{"b": {"c": 1}}]}', {"n": [{"b": {"c": True}}]})[0] == 0
    assert score('{"n": [2, 1]}', {"n": [1, 2]})[0] == 0
    assert score("{}", {})[0] == 1


def test_text_around_the_object_costs_what_the_recipe_says():
    assert score('Sure! {"n": 1}', {"n": 1}, surrounded=0.25)[0] == 0.25


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"name": "Ana", "age": 34, "home": {"city": "Porto"}}', 1),
        ('{"name": "Ben", "age": 34, "home": {"city": "Oslo"}}', (0.5 + 1 + 0.5) / 3),
        ('{"name": "Ben", "age": 34, "home": "Porto"}', (0.5 + 1) / 4),  # home where home.city should be
        ('{"name": "Ben", "name": "Ana", "age": 34, "home": {"city": "Porto"}}', (0.5 + 1 + 1) / 4),  # given twice
        ('Here: {"name": "Ben", "age": 34, "home": {"city": "Porto"}}', (0.5 + 1 + 1) / 3 / 2),
    ],
)
def test_a_field_with_the_right_keys_and_another_value_earns_what_the_recipe_says(completion, value):
    got, details = score(completion, named=0.5)
    assert got == pytest.approx(value)
    assert details["exact"] == (value == 1)


def test_few_shot_prompts_begin_with_training_rows_of_their_kind(rows):
    shown = load_rows(str(ROOT / "recipes" / "extraction" / "few_shot.py"), "harder")
    train = {row["prompt"][-1]["content"]: row for row in rows["train"]}
    for row, plain in zip(shown, rows["harder"], strict=True):
        *turns, last = row["prompt"]
        assert [*turns[:2], last] == plain["prompt"] and row["record"] == plain["record"]
        assert [message["role"] for message in turns] == ["user", "assistant"] * 4
        for asked, answered in zip(turns[2::2], turns[3::2], strict=True):
            example = train[asked["content"]]
            assert example["kind"] == row["kind"] and answered["content"] == example["references"][0]


def test_the_example_of_a_kind_is_a_right_answer_and_its_words_are_of_no_row(rows):
    for kind in ("person", "order", "event"):
        mine = [row for split in SPLITS for row in rows[split] if row["kind"] == kind]
        asked, answered, _ = mine[0]["prompt"]
        record = json.loads(answered["content"])
        assert all(row["prompt"][:2] == [asked, answered] for row in mine)
        assert all(str(leaf) in asked["content"].partition("Text: ")[2] for leaf in leaves(record))
        validator_of(json.dumps(mine[0]["schema"])).validate(record)
        texts = {leaf for leaf in leaves(record) if isinstance(leaf, str) and leaf != "Sunday"}
        assert not texts & {leaf for row in mine for leaf in leaves(row["record"])}


def sequence_reward(name, completion):
    suite = load_rewards([f"{ROOT / 'recipes' / 'extraction' / 'sequence.py'}:{name}"])
    table = suite.score([Rollout.from_ids("row", [1, 2], completion)], {"prompt": ["?"], "record": [ANA]})
    (values,) = table.values.values()
    return float(values[0])


def test_the_budget_is_the_object_without_spaces():
    tight = '{"name":"Ana","age":34,"home":{"city":"Porto"}}'
    assert sequence_reward("short", tight) == 1.0
    assert sequence_reward("short", tight.replace(":", ": ")) == pytest.approx(0.6)  # four characters of ten too many
    assert sequence_reward("short", tight + " " * 10) == 0.0
    assert sequence_reward("short", tight + "x" * 50) == 0.0


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"name": "Ana", "city": "Porto", "age": 3}', 1.0),
        ('{"name": "Ana", "home": {"city":"Ana"}}', 0.0),  # given twice, nested and without a space
        ('{"name": "Ana", "age": 3, "price": 3}', 0.0),  # one text alone; numbers may repeat
        ('{"name": "A \\"B\\"", "city": "B", "price": 3, "quantity": 3}', 1.0),  # an escaped quote ends no text
        ("no object", 0.0),
    ],
)
def test_a_text_given_twice(completion, value):
    assert sequence_reward("distinct", completion) == value
