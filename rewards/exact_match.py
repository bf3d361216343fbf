"""Whether a completion is one of the references."""

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list


@reward(range=(0, 1))
def exact_match(completion: str, references: list[str] | str) -> float:
    """1 if the completion equals any reference, white space at both ends aside; else 0."""
    return float(completion.strip() in {target.strip() for target in as_list(references)})
