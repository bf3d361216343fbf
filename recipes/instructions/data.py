"""Instructions with constraints that can be checked. Rows for `--dataset_name recipes/instructions/data.py`.

A row asks for a short text about a topic that meets two or three constraints:

    {"prompt": [{"role": "user", "content": "Tell me about tea. Use the word \\"cup\\". Write exactly 2 sentences."}],
     "constraints": [{"kind": "use_words", "words": ["cup"]}, {"kind": "sentences", "count": 2}], "topic": "tea"}

There is no reference. The reward `constraints_met` checks a completion against `constraints`; its docstring says how a
word and a sentence are counted. Rows are generated, from nothing but this file and a seed.

* `train` (2,000 rows), `validation` (300), `test` (300): the constraints of `KINDS`. A row belongs to a split by the
  SHA-256 of its topic and its constraints, in whatever order, so no two splits share one.
* `unseen` (300): the constraints of `UNSEEN`, of which the other splits have none. The topics are the same ones.

No two constraints of a row contradict each other: `EXCLUSIVE` names the pairs of kinds that are never together, the
words to use are none of those to avoid, and the numbers leave room for each other.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from rlseq.errors import DataError

ROWS = {"train": 2000, "validation": 300, "test": 300, "unseen": 300}

KINDS = ("sentences", "use_words", "avoid_words", "lower_case", "upper_case", "closing_phrase", "max_words")
UNSEEN = ("bullets", "opening_word", "no_commas", "quoted", "min_words")
EXCLUSIVE = ({"lower_case", "upper_case"}, {"bullets", "quoted"}, {"bullets", "opening_word"})

# Six words for each topic, to use or to avoid.
TOPICS = {
    topic: words.split()
    for topic, words in {
        "bread": "flour oven warm slice bakery crust",
        "tea": "cup leaf hot water drink morning",
        "coffee": "bean cup dark smell milk strong",
        "the sea": "wave salt blue deep sand ship",
        "the moon": "night light round sky bright tide",
        "a rainy day": "umbrella cloud wet window puddle grey",
        "snow": "white cold winter soft sled flake",
        "cats": "fur paw sleep mouse quiet play",
        "dogs": "loyal walk bark friend tail ball",
        "bees": "honey flower hive wing busy garden",
        "elephants": "trunk large grey memory herd gentle",
        "penguins": "ice swim bird cold fish colony",
        "a garden": "soil seed plant green water spring",
        "a forest": "tree path shade bird green quiet",
        "mountains": "peak climb high snow rock view",
        "a river": "bank flow stone bridge fish fresh",
        "trains": "rail station fast window ticket journey",
        "bicycles": "wheel ride pedal helmet road healthy",
        "ships": "sail harbour captain wave wind cargo",
        "aeroplanes": "fly wing cloud airport pilot fast",
        "books": "page read story author quiet paper",
        "music": "song dance sound melody rhythm sing",
        "the piano": "key play note sound hand practice",
        "painting": "colour brush paper artist draw picture",
        "football": "ball team goal run kick score",
        "swimming": "water pool float breath arm splash",
        "chess": "board king move queen game patient",
        "cooking": "pan taste recipe salt kitchen fresh",
        "pizza": "cheese tomato oven dough slice share",
        "soup": "bowl spoon hot vegetable salt winter",
        "apples": "red sweet tree juice crisp fruit",
        "chocolate": "sweet dark cocoa milk gift melt",
        "ice cream": "cold summer cone vanilla spoon sweet",
        "school": "teacher learn friend lesson book class",
        "friendship": "trust help laugh share kind honest",
        "a birthday": "cake gift candle party year family",
        "holidays": "rest travel sun beach family plan",
        "summer": "sun hot beach long swim sky",
        "autumn": "leaf wind gold cool harvest rain",
        "a city": "street crowd light tall noise busy",
        "a village": "small farm quiet church road field",
        "a farm": "cow field corn barn early animal",
        "the stars": "night sky bright far shine dark",
        "dinosaurs": "bone old huge museum extinct tooth",
        "robots": "machine metal work arm program future",
        "clocks": "time hand tick hour wall late",
        "shoes": "foot walk leather lace pair comfort",
        "a good night's sleep": "bed dream rest dark pillow health",
    }.items()
}
COMMON = ["and", "the", "very", "because", "many", "can", "it", "also"]  # to avoid, beside those of the topic
CLOSING = ["That is all.", "See you soon!", "Thanks for reading.", "Have a nice day.", "Now you know.",
           "What do you think?", "Try this yourself!", "No more questions, please."]  # fmt: skip
OPENING = ["Well", "Today", "Honestly", "Once", "Imagine", "Often", "Yes", "Everyone"]

ASK = [
    "Write a short text about {topic}.",
    "Tell me about {topic}.",
    "What is special about {topic}?",
    "Describe {topic}.",
    "Why do people like {topic}?",
    "Write a short message to a friend about {topic}.",
]
PHRASES = {
    "sentences": ["Write exactly {count}.", "Your answer must have exactly {count}."],
    "use_words": ["Use the {words}.", "Your answer must contain the {words}."],
    "avoid_words": ["Do not use the {words}.", "Your answer must not contain the {words}."],
    "lower_case": ["Write in lower case only, without any capital letter.", "Use only lower-case letters."],
    "upper_case": ["Write in capital letters only.", "Use only capital letters, as in HELLO."],
    "closing_phrase": ['End with: "{phrase}"', 'The last words of your answer must be: "{phrase}"'],
    "max_words": ["Use at most {count} words.", "Do not write more than {count} words."],
    "bullets": ['Answer with exactly {count} lines, each of them starting with "- ", and nothing else.'],
    "opening_word": ['Begin with the word "{word}".', 'The first word of your answer must be "{word}".'],
    "no_commas": ["Do not use any commas.", "Your answer must not contain a comma."],
    "quoted": ["Put your whole answer in double quotation marks.", "Wrap your answer in double quotation marks."],
    "min_words": ["Use at least {count} words.", "Write {count} words or more."],
}


def key_of(topic: str, constraints: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of a topic and its constraints, which their order does not change."""
    text = json.dumps([topic, sorted(json.dumps(one, sort_keys=True) for one in constraints)])
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(key: str) -> str:
    """Name the split of a key of rows with the constraints of `KINDS`: 80% train, 10% validation, 10% test."""
    return {0: "validation", 1: "test"}.get(int(key, 16) % 10, "train")


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, always the same ones in the same order; no topic with its constraints comes twice.

    Raises:
        DataError: an unknown split.
    """
    if split not in ROWS:
        raise DataError(f"the instructions data has no split {split!r}; it has {', '.join(ROWS)}")
    rng = random.Random(f"instructions {split}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS[split]:
        topic = rng.choice(list(TOPICS))
        constraints = _constraints(rng, topic, UNSEEN if split == "unseen" else KINDS)
        asked = " ".join([rng.choice(ASK).format(topic=topic), *(_phrase(rng, one) for one in constraints)])
        key = key_of(topic, constraints)
        if split == "unseen" or split_of(key) == split:
            prompt = [{"role": "user", "content": asked}]
            rows.setdefault(key, {"prompt": prompt, "constraints": constraints, "topic": topic})
    return list(rows.values())


def _constraints(rng: random.Random, topic: str, among: tuple[str, ...]) -> list[dict[str, Any]]:
    """Two or three constraints of different kinds, which one answer can meet."""
    kinds = rng.sample(among, rng.choice((2, 3)))
    while any(pair <= set(kinds) for pair in EXCLUSIVE):
        kinds = rng.sample(among, rng.choice((2, 3)))
    words = rng.sample(TOPICS[topic], 6)  # the first three may be used, the last three avoided
    sentences = rng.randint(2 if "closing_phrase" in kinds else 1, 3)  # a closing phrase is a sentence of its own
    room = 8 * sentences if "sentences" in kinds else 0
    values: dict[str, dict[str, Any]] = {
        "sentences": {"count": sentences},
        "use_words": {"words": sorted(words[: rng.randint(1, 3)])},
        "avoid_words": {"words": sorted([*words[3 : rng.randint(4, 5)], *rng.sample(COMMON, rng.randint(0, 1))])},
        "closing_phrase": {"phrase": rng.choice(CLOSING)},
        "max_words": {"count": rng.choice([count for count in (10, 15, 20, 25, 30) if count >= room])},
        "bullets": {"count": rng.randint(2, 4)},
        "opening_word": {"word": rng.choice(OPENING)},
        "min_words": {"count": rng.choice((15, 20, 25))},
    }
    return [{"kind": kind, **values.get(kind, {})} for kind in kinds]


def _phrase(rng: random.Random, constraint: dict[str, Any]) -> str:
    values = dict(constraint)
    if values["kind"] == "sentences":
        values["count"] = "1 sentence" if values["count"] == 1 else f"{values['count']} sentences"
    if "words" in values:
        *before, last = (f'"{word}"' for word in values["words"])
        joined = f"{', '.join(before)} {'and' if values['kind'] == 'use_words' else 'or'} {last}" if before else last
        values["words"] = f"word{'s' if before else ''} {joined}"
    return rng.choice(PHRASES[values["kind"]]).format(**values)
