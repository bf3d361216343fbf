"""The mathematics of sequence-level training, as pure functions: rewards -> advantages -> losses.

Tensors in, tensors out, in the dtype and on the device given. Terms of a token come back unreduced, of shape
(B, T), and 0 where the mask is False, whatever the inputs hold there (inf and NaN too); the trainer reduces
them, as `masked_mean` does or over a whole step, and says over what. Losses are to be minimised; advantages are
better when larger.

    P prompts    G samples per prompt    B = P·G    T completion tokens    masks: True = counted
"""

from rlseq.losses.advantages import (
    STD_EPSILON,
    gae,
    group_advantages,
    last_token_rewards,
    max_rl_advantages,
    normalize_then_sum,
    whiten,
)
from rlseq.losses.critic import error_by_position, explained_variance, value_loss
from rlseq.losses.divergence import DIVERGENCES, divergence, divergence_of_states, divergence_to_go
from rlseq.losses.expected_reward import (
    expected_accuracy,
    leave_one_prompt_out_baseline,
    max_rl,
    minimum_risk,
    reference_exact_references,
    reference_exact_weight,
)
from rlseq.losses.loss_types import (
    CLIPPED,
    MEANS_OVER_STEP,
    cispo,
    on_policy_mask,
    reduce_losses,
    sapo,
    vespo,
    vespo_weight,
)
from rlseq.losses.masking import masked_mean
from rlseq.losses.policy import (
    adapt_kl_coefficient,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
    probability_ratio,
)

__all__ = [
    "CLIPPED",
    "DIVERGENCES",
    "MEANS_OVER_STEP",
    "STD_EPSILON",
    "adapt_kl_coefficient",
    "cispo",
    "clipped_surrogate",
    "divergence",
    "divergence_of_states",
    "divergence_to_go",
    "error_by_position",
    "expected_accuracy",
    "explained_variance",
    "gae",
    "group_advantages",
    "importance_ratio",
    "kl_estimate",
    "last_token_rewards",
    "leave_one_prompt_out_baseline",
    "masked_mean",
    "max_rl",
    "max_rl_advantages",
    "minimum_risk",
    "normalize_then_sum",
    "on_policy_mask",
    "probability_ratio",
    "reduce_losses",
    "reference_exact_references",
    "reference_exact_weight",
    "sapo",
    "value_loss",
    "vespo",
    "vespo_weight",
    "whiten",
]
