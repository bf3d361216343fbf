"""The sequence log-prob of the output as reward: a control that uses no information but the model."""

import math

from rlseq.scoring import reward


@reward(range=(-math.inf, 0))
def own_log_prob(completion_ids: list[int], logprobs: list[float], per_token: bool = True) -> float:
    """Return the log-prob (nats) of the completion under the distribution that it was sampled from.

    A gain that this reward gives as well is sharpening: it needs no information beyond the model.

    Args:
        completion_ids: the tokens of the completion.
        logprobs: their log-probs.
        per_token: the mean over tokens instead of the sum.
    """
    if len(logprobs) != len(completion_ids):  # vLLM and other generators may give none
        raise ValueError(f"{len(logprobs)} log-probs for {len(completion_ids)} tokens; sample by rlseq.engine.sampling")
    return sum(logprobs) / (max(1, len(logprobs)) if per_token else 1)
