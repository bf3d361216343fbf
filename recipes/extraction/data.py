"""Structured output: a short text in, one JSON object out. Rows for `--dataset_name recipes/extraction/data.py`.

A row is a text, after an instruction and one example of its kind, and the object that it should become:

    {"prompt": [..., {"role": "user", "content": "Text: Ana Silva, 34, works as a nurse in Porto."}],
     "record": {"name": "Ana Silva", "age": 34, "job": "nurse", "city": "Porto"},
     "schema": {"type": "object", ...}, "references": ['{"name": "Ana Silva", ...}'], "kind": "person"}

Rows are generated, from nothing but this file and a seed. Rewards compare a completion with `record` (`json_fields`,
`exact_object`) or `schema` (`json_schema`); no reward reads `references`, which are there for teacher forcing and for
measuring likelihood.

Three kinds of records: a person (four flat keys, a fifth key `email` only if the text names one), an order (numbers)
and an event (a nested object). Splits:

* `train` (4,000 rows), `validation` (500), `test` (500): the same sentences with other records. A record belongs to a
  split by its SHA-256, so no record is in two splits.
* `harder` (500): sentences, people, jobs, places, items and events that no other split has.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from rlseq.errors import DataError

ROWS = {"train": 4000, "validation": 500, "test": 500, "harder": 500}

FAMILIAR = {
    "first": (
        "Ana Ben Carla David Elena Felix Grace Hugo Iris Jonas "
        "Karin Liam Maria Nadia Oscar Paula Rosa Simon Tara Victor "
        "Aisha Bogdan Chiara Dmitri Esther Fatima Giorgos Hassan Ingrid Jun "
        "Keiko Lars Mei Nikhil Omar Pilar Ravi Soraya Tomasz Yusuf"
    ).split(),
    "last": (
        "Silva Meyer Rossi Novak Jensen Brown Garcia Kowalski Dubois Larsen "
        "Fischer Costa Moreau Peters Santos Weber "
        "Abebe Banerjee Castillo Diallo Eriksen Farouk Gupta Horvath Ivanova Johansson "
        "Kaplan Lopez Murphy Nguyen Omondi Popescu Quinn Suzuki Tran Yilmaz"
    ).split(),
    "job": ["nurse", "plumber", "teacher", "baker", "software engineer", "pilot", "lawyer", "gardener", "dentist",
            "electrician", "librarian", "chef", "bus driver", "accountant", "photographer", "cook", "police officer",
            "butcher", "hairdresser", "mechanic", "music teacher", "painter", "postman", "vet"],
    "city": ["Porto", "Perth", "Oslo", "Lyon", "Denver", "Milan", "Prague", "Toronto", "Hamburg", "Seville", "Boston",
             "Geneva", "Athens", "Santiago", "Hanoi", "Dakar", "Delhi", "Kyoto", "Ankara", "Dublin", "Quito", "Vilnius",
             "San Diego", "Cape Town", "Sofia", "Tunis"],
    "item": ["chairs", "lamps", "notebooks", "umbrellas", "bicycles", "mugs", "backpacks", "keyboards", "blankets",
             "tents", "candles", "printers", "gloves", "water bottles", "monitors", "towels", "guitars", "plates",
             "rain coats", "drills"],
    "event": ["jazz concert", "book fair", "chess tournament", "science lecture", "food festival", "art exhibition",
              "film night", "charity run", "job fair", "piano recital", "theatre play", "cooking class", "quiz night",
              "car rally", "summer fair", "coding course"],
    "venue": ["town hall", "central library", "city museum", "old theatre", "sports arena", "river park",
              "concert house", "castle yard", "university library", "football ground", "main square",
              "youth club", "grand hotel", "old factory"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"],
    "domain": ["mail.com", "post.net", "inbox.org"],
}  # fmt: skip
UNFAMILIAR = {
    "first": (
        "Amara Bashir Chen Devika Eun-ji Farid Goran Hana Ivar Jamila "
        "Kofi Leila Mateo Noor Olga Priya Quentin Rashid"
    ).split(),
    "last": (
        "Okafor Haddad Tanaka Iyer Park Nasser Petrovic Sato Lindqvist Mensah "
        "Ortiz Volkov Rao Bergstrom"
    ).split(),
    "job": ["carpenter", "surgeon", "journalist", "tailor", "data analyst", "firefighter", "translator", "welder",
            "pharmacist", "architect"],
    "city": ["Nairobi", "Osaka", "Lima", "Cairo", "Mumbai", "Tallinn", "Bogota", "Manila", "Accra", "Riga"],
    "item": ["desks", "kettles", "helmets", "curtains", "speakers", "ladders", "pillows", "cameras"],
    "event": ["poetry reading", "dance show", "robot workshop", "flower market", "history tour", "choir rehearsal"],
    "venue": ["harbour hall", "botanical garden", "railway station", "community centre", "north stadium"],
    "day": ["Saturday", "Sunday"],
    "domain": ["example.io", "letter.dev"],
}  # fmt: skip

PERSON = [
    "{name}, {age}, works as a {job} in {city}.",
    "{name} is {age} years old. After school in {city}, where {first} still lives, {first} became a {job}.",
    "Our new {job} is {name}, who is {age} and comes from {city}.",
    "In {city} I met {name}, a {job} of {age}.",
    "{first} moved to {city} last year. Full name: {name}. Age: {age}. Profession: {job}.",
    "At {age}, {name} is the youngest {job} in {city}.",
    "The {job} {name} ({age}) lives in {city} with two cats.",
    "{name} ({age}), {job}, {city}.",
    "Name: {name}; job: {job}; city: {city}; age: {age}.",
    "{name} left {city} at the age of {age} and never worked as a {job} again.",
    "Being {age} is no reason to stop, says {name}, {job} from {city}.",
    "Our guest today is a {job} from {city}: {name}. {first} is {age}.",
    "{city} is home to {name}. {first} has been a {job} for years and is now {age}.",
    "Last week {name} turned {age}. {first}, a {job}, celebrated in {city}.",
]
PERSON_HARDER = [
    "Meet {name} from {city}: {age} years of age, {job} by trade.",
    "Age {age}, residence {city}, occupation {job}: that is what the form says of {name}.",
    "{city} has a new {job}. The name is {name}, and {first} turned {age} in May.",
    "A {job} called {name}, aged {age}, was seen in {city}.",
]
EMAIL = [" Write to {email}.", " Contact: {email}.", " The address is {email}.", " {email} reaches {first}."]
EMAIL_HARDER = [" Mail goes to {email}."]
ORDER = [
    "{name} ordered {quantity} {item} at {price} dollars each.",
    "Please send {quantity} {item} to {name}. The price is {price} dollars a piece.",
    "Order from {name}: {quantity} {item}, {price} dollars each.",
    "For {price} dollars each, {name} bought {quantity} {item}.",
    "We sold {quantity} {item} to {name} yesterday; each cost {price} dollars.",
    "{quantity} {item} for {name}, {price} dollars per item.",
    "Customer: {name}. Item: {item}. Quantity: {quantity}. Price: {price} dollars.",
    "{name} wants {item}. We agreed on {quantity} of them and {price} dollars for one.",
    "At {price} dollars each, {quantity} {item} went to {name}.",
    "The {item} cost {price} dollars each and {name} took {quantity}.",
]
ORDER_HARDER = [
    "The invoice lists {quantity} {item} at {price} dollars apiece, billed to {name}.",
    "Shipment for {name}: {item}, {quantity} of them, unit price {price} dollars.",
    "{name} paid {price} dollars for each of the {quantity} {item}.",
]
EVENT = [
    "The {event} takes place on {day} at the {venue} in {city}.",
    "On {day} there is a {event} in {city}, at the {venue}.",
    "Come to the {venue} in {city} on {day} for the {event}!",
    "{city}: the {event} was moved to {day}. It is held at the {venue}.",
    "This {day}, the {venue} in {city} hosts a {event}.",
    "{event}, {day}, {venue}, {city}.",
    "What: {event}. Where: {venue}, {city}. When: {day}.",
    "The {venue} of {city} is closed on {day} because of the {event}.",
    "We meet at the {venue} on {day}; the {event} is the best in {city}.",
    "If you are in {city} on {day}, go to the {event} at the {venue}.",
]
EVENT_HARDER = [
    "Do not miss the {event} in {city}: {day}, {venue}.",
    "Tickets for the {event} on {day} at the {venue}, {city}, are on sale.",
    "{day} brings a {event} to the {venue} of {city}.",
]

INSTRUCTION = {
    "person": 'Answer with one JSON object and nothing else. Leave "email" out if the text names none.',
    "order": "Answer with one JSON object and nothing else.",
    "event": "Answer with one JSON object and nothing else.",
}
# Each prompt begins with one of these, so that the keys are shown and not described; no split has their words.
EXAMPLE: dict[str, tuple[str, dict[str, Any]]] = {
    "person": (
        "Zoe Adams, 50, works as a farmer in Rome. Contact: zoe@farm.it.",
        {"name": "Zoe Adams", "age": 50, "job": "farmer", "city": "Rome", "email": "zoe@farm.it"},
    ),
    "order": (
        "Tom Clark ordered 7 pencils at 2 dollars each.",
        {"customer": "Tom Clark", "item": "pencils", "quantity": 7, "price": 2},
    ),
    "event": (
        "The garden party takes place on Sunday at the tea house in Rome.",
        {"event": "garden party", "day": "Sunday", "place": {"venue": "tea house", "city": "Rome"}},
    ),
}
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [key for key in properties if key not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMA = {
    "person": _object({"name": TEXT, "age": NUMBER, "job": TEXT, "city": TEXT, "email": TEXT}, optional=("email",)),
    "order": _object({"customer": TEXT, "item": TEXT, "quantity": NUMBER, "price": NUMBER}),
    "event": _object({"event": TEXT, "day": TEXT, "place": _object({"venue": TEXT, "city": TEXT})}),
}


def split_of(record: dict[str, Any]) -> str:
    """Name the split of a record of familiar words, by its hash: 80% train, 10% validation, 10% test.

    The optional `email` is left out, so that a person with it and the same person without it are in one split.
    """
    text = json.dumps({key: value for key, value in record.items() if key != "email"}, sort_keys=True)
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, always the same ones in the same order; no record comes twice.

    Raises:
        DataError: an unknown split.
    """
    if split not in ROWS:
        raise DataError(f"the extraction data has no split {split!r}; it has {', '.join(ROWS)}")
    rng = random.Random(f"extraction {split}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS[split]:
        kind = rng.choice(("person", "person", "order", "event"))
        record, text = _MAKERS[kind](rng, split == "harder")
        if split != "harder" and split_of(record) != split:
            continue
        reference = json.dumps(record)
        rows.setdefault(reference, _row(kind, record, text, reference))
    return list(rows.values())


def _row(kind: str, record: dict[str, Any], text: str, reference: str) -> dict[str, Any]:
    example, answer = EXAMPLE[kind]
    return {
        "prompt": [
            {"role": "user", "content": f"{INSTRUCTION[kind]}\n\nText: {example}"},
            {"role": "assistant", "content": json.dumps(answer)},
            {"role": "user", "content": f"Text: {text}"},
        ],
        "record": record,
        "schema": SCHEMA[kind],
        "references": [reference],
        "kind": kind,
    }


def _person(rng: random.Random, harder: bool) -> tuple[dict[str, Any], str]:
    words = UNFAMILIAR if harder else FAMILIAR
    first, last = rng.choice(words["first"]), rng.choice(words["last"])
    record = {
        "name": f"{first} {last}",
        "age": rng.randint(19, 79),
        "job": rng.choice(words["job"]),
        "city": rng.choice(words["city"]),
    }
    text = rng.choice(PERSON_HARDER if harder else PERSON).format(first=first, **record)
    if rng.random() < 0.25:
        record["email"] = f"{first}.{last}@{rng.choice(words['domain'])}".lower()
        text += rng.choice(EMAIL_HARDER if harder else EMAIL).format(first=first, **record)
    return record, text


def _order(rng: random.Random, harder: bool) -> tuple[dict[str, Any], str]:
    words = UNFAMILIAR if harder else FAMILIAR
    record = {
        "customer": f"{rng.choice(words['first'])} {rng.choice(words['last'])}",
        "item": rng.choice(words["item"]),
        "quantity": rng.randint(2, 60),
        "price": rng.randint(3, 250),
    }
    return record, rng.choice(ORDER_HARDER if harder else ORDER).format(name=record["customer"], **record)


def _event(rng: random.Random, harder: bool) -> tuple[dict[str, Any], str]:
    words = UNFAMILIAR if harder else FAMILIAR
    place = {"venue": rng.choice(words["venue"]), "city": rng.choice(words["city"])}
    record = {"event": rng.choice(words["event"]), "day": rng.choice(words["day"]), "place": place}
    flat = {key: value for key, value in record.items() if key != "place"}
    return record, rng.choice(EVENT_HARDER if harder else EVENT).format(**flat, **place)


_MAKERS: dict[str, Callable[[random.Random, bool], tuple[dict[str, Any], str]]] = {
    "person": _person,
    "order": _order,
    "event": _event,
}
