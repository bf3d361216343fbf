"""The model's own confidence as its reward: a control without any outside information."""

import math

from rlseq.scoring import reward


@reward(range=(-math.inf, 0))
def own_log_prob(completion_ids: list[int], logprobs: list[float], per_token: bool = True) -> float:
    """Log-prob (nats) of the completion under the distribution it was drawn from, by default per token.

    A gain that this reward brings, too, is sharpening of what the model believed already.
    """
    if len(logprobs) != len(completion_ids):  # vLLM and other generators may give none
        raise ValueError(f"{len(logprobs)} log-probs for {len(completion_ids)} tokens; sample by rlseq.engine.sampling")
    return sum(logprobs) / (max(1, len(logprobs)) if per_token else 1)
