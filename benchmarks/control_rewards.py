"""A control for docs/contrast-g2p.md: rewards that are real in their values, and tell nothing of their completions."""

from rlseq import reward
from rlseq.scoring.distance import accuracy, as_list, closest


@reward(range=(0, 1), scope="batch")
def shuffled_accuracy(
    completions: list[str], prompt_key: list[str], references: list[list[str]], sample: list[int]
) -> list[float]:
    """The phoneme accuracy of the completion of the same sample number of the next prompt of the batch."""
    values = {
        (key, number): accuracy(*closest(completion.split(), [text.split() for text in as_list(found)]))
        for completion, key, number, found in zip(completions, prompt_key, sample, references, strict=True)
    }
    keys = list(dict.fromkeys(prompt_key))
    following = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    return [values[following[key], number] for key, number in zip(prompt_key, sample, strict=True)]
