"""Edit distance to the closest reference, in words, characters or a tokenizer's tokens."""

from functools import lru_cache

from rlseq.scoring import Ratio, reward
from rlseq.scoring.distance import accuracy, as_list, closest


@reward(
    range=(0, 1),
    corpus={
        "corpus_error_rate": Ratio(
            "edits",
            "length",
            description="error rate: Σ edits / Σ units of the closest reference",
        )
    },
)
def error_rate(
    completion: str, references: list[str] | str, unit: str = "word", tokenizer: str | None = None
) -> tuple[float, dict]:
    """One minus the error rate against the closest reference, at least 0; so higher is better.

    `unit` is "word" (split at white space), "character" or "token" (of `tokenizer`, a model id or path,
    without special tokens). The error rate is edits (substitutions, insertions, deletions) over the
    reference's length.
    """
    targets = as_list(references)
    edits, length = closest(_split(completion, unit, tokenizer), [_split(t, unit, tokenizer) for t in targets])
    return accuracy(edits, length), {"edits": edits, "length": length}


def _split(text: str, unit: str, tokenizer: str | None) -> list:
    if unit == "word":
        return text.split()
    if unit == "character":
        return list(text)
    if unit != "token" or tokenizer is None:
        raise ValueError(
            f"unit is {unit!r} and tokenizer {tokenizer!r}; expected word, character, or token with a tokenizer"
        )
    return _tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=4)
def _tokenizer(name: str):
    from rlseq.engine.model.load import load_tokenizer

    return load_tokenizer(name, "the tokenizer of error_rate")
