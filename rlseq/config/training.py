"""The settings of the recipes, as dataclasses that `RecipeParser` reads from YAML and flags.

Here are those that extend TRL's, whose fields keep TRL's names and meaning. Where a default differs from TRL's, it
differs in `DefaultsMixin` and the config classes here, and nowhere else. rlseq's own settings, which need no
trl, come from `rlseq.config.arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import trl

from rlseq.config.arguments import (
    DataArguments,
    EvaluateArguments,
    EvaluationArguments,
    NewModelArguments,
    RejectionArguments,
    RewardArguments,
    RolloutRunArguments,
    RunArguments,
    TrainingEvaluationArguments,
)
from rlseq.config.as_in_evaluation import AsInEvaluation
from rlseq.config.defaults import DefaultsMixin
from rlseq.config.fields import (
    ABOVE_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NATS_ABOVE_0,
    Conflict,
    Need,
    as_declared,
    at_least,
    setting,
)
from rlseq.config.groups.adapters import ModelArguments
from rlseq.config.groups.curriculum import TrainingDataArguments, validate_online_curriculum
from rlseq.config.groups.teacher import NO_ORDER, NO_TEACHER, TeacherArguments
from rlseq.config.validation import checks, inherited
from rlseq.config.validation.validate import validate, validate_given

__all__ = [
    "DataArguments",
    "EvaluateArguments",
    "EvaluationArguments",
    "GRPOConfig",
    "ModelArguments",
    "NewModelArguments",
    "PPOConfig",
    "RejectionArguments",
    "RewardArguments",
    "RolloutRunArguments",
    "RunArguments",
    "SFTConfig",
    "TrainingDataArguments",
    "TrainingEvaluationArguments",
]


@dataclass
class SFTConfig(DefaultsMixin, trl.SFTConfig):
    """TRL's SFTConfig with rlseq's defaults: the loss is on the completion only."""

    _argument_group_name = "training (rlseq)"
    needs_of_inherited = inherited.OF_SFT
    conflicts_of_inherited = inherited.CONFLICTS_OF_SFT
    checks_filled_in = (*DefaultsMixin.checks_filled_in, checks.validate_template_options)

    completion_only_loss: bool | None = setting(True, "Loss on the completion only.")
    chat_template_kwargs: dict | str | None = as_declared(EvaluateArguments, "chat_template_kwargs")
    early_stopping_patience: int | None = setting(
        None,
        "Stop when validation NLL (or metric_for_best_model) has not got better for N evaluations; the best "
        "checkpoint is the result.",
        range=at_least(1),
        conflicts=Conflict(
            "counts evaluations and ends with the best checkpoint, but eval_strategy is {eval_strategy} and "
            "save_strategy {save_strategy}. Give both the same: epoch, or steps (with --eval_steps and --save_steps).",
            lambda config: not inherited.saves_what_it_evaluates(config),
        ),
    )

    def __post_init__(self) -> None:
        validate_given(self)
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        super().__post_init__()
        validate(self)


_POLICY_GRADIENT = Need("objective policy_gradient", lambda config: config.objective == "policy_gradient")
_MINIMUM_RISK = Need("objective minimum_risk", lambda config: config.objective == "minimum_risk")


@dataclass
class GRPOConfig(DefaultsMixin, AsInEvaluation, TeacherArguments, trl.GRPOConfig):
    """TRL's GRPOConfig with rlseq's defaults.

    * disable_dropout: on, else the ratio of a recomputed log-prob to the sampled one is not 1 on policy.
    * remove_unused_columns: off, rewards read them.
    * use_liger_kernel, log_completions: off as in TRL; rollouts/ holds every completion.
    """

    _argument_group_name = "training (rlseq)"
    ranges_of_inherited = inherited.RANGES_OF_ROLLOUTS
    needs_of_inherited = inherited.OF_ROLLOUTS
    conflicts_of_inherited = inherited.CONFLICTS_OF_ROLLOUTS
    checks_filled_in = (
        *DefaultsMixin.checks_filled_in,
        validate_online_curriculum,
        checks.validate_sampling,
        checks.validate_objective,
    )

    disable_dropout: bool = setting(True, "Disable dropout in the model.")
    remove_unused_columns: bool | None = setting(
        False, "Remove columns that the model does not take; rewards read them, so keep false."
    )
    objective: Literal[
        "policy_gradient", "minimum_risk", "expected_accuracy", "max_rl", "reference_exact", "distillation"
    ] = setting(
        "policy_gradient",
        "What is optimised: policy_gradient (TRL's losses, see loss_type), minimum_risk, expected_accuracy (exact, "
        "no rollouts; where references enumerate success), max_rl (as exact; from expected accuracy to likelihood by "
        "max_rl_order), reference_exact (any reward; the references' share exactly), or distillation (a teacher's "
        "divergence alone; rewards are optional, and measured). docs/objectives.md explains each.",
        conflicts=(NO_ORDER, NO_TEACHER),
    )
    max_rl_order: int | None = setting(
        None,
        "Terms K of MaxRL's series of log p: a prompt weighs its pass@K in the gradient of the log-likelihood. Of the "
        "exact objective max_rl, or with scale_rewards mean of rollouts with rewards 0 or 1 (K up to the samples).",
        range=at_least(1),
        needs=Need(
            "objective max_rl or scale_rewards mean", lambda c: c.objective == "max_rl" or c.scale_rewards == "mean"
        ),
        conflicts=Conflict(
            "is {max_rl_order}, but of {num_generations} samples at most {num_generations} terms are estimated",
            lambda c: c.scale_rewards == "mean" and c.max_rl_order > (c.num_generations or c.max_rl_order),
        ),
    )
    advantage_baseline: Literal["mean", "leave_one_out", "greedy", "batch"] = setting(
        "mean",
        "What a reward is compared with: its group's mean (GRPO), the group's others (RLOO), the reward of the "
        "greedy completion (self-critical), or the mean of the batch.",
        conflicts=(
            Conflict(
                "greedy is sampled by rlseq's sampler; leave it on.",
                lambda config: config.sampled_by_trl and config.advantage_baseline == "greedy",
            ),
            Conflict(
                "is of the summed reward; leave out multi_objective_aggregation.",
                lambda config: config.multi_objective_aggregation != "sum_then_normalize",
            ),
        ),
    )
    advantage: str | None = setting(
        None,
        "Own advantages, path/to/file.py:function or package.module:function: a function of the rewards of the step, "
        "(prompts, samples), NaN where abstained, in place of advantage_baseline and scale_rewards.",
        metavar="FILE.py:FUNCTION",
        conflicts=Conflict(
            "takes the place of advantage_baseline, scale_rewards and multi_objective_aggregation: leave these out.",
            lambda config: (
                (config.advantage_baseline, config.multi_objective_aggregation) != ("mean", "sum_then_normalize")
                or config.scale_rewards not in ("group", True)
            ),
        ),
        needs=_POLICY_GRADIENT,
    )
    policy_loss: str | None = setting(
        None,
        "Own loss of the tokens, path/to/file.py:function or package.module:function: a function of log-probs, old "
        "log-probs, advantages and mask, (rows, tokens) each; loss_type says how it becomes one number.",
        metavar="FILE.py:FUNCTION",
        conflicts=Conflict(
            "takes the place of the clipped surrogate, and loss_type {loss_type} is a loss of its own: give "
            "grpo, dr_grpo, dapo, bnpo or luspo, which say how the tokens' losses become one number.",
            lambda config: config.loss_type in inherited.WHOLE_LOSSES,
        ),
        needs=_POLICY_GRADIENT,
    )
    scale_rewards: str = setting(
        "group",
        "What divides an advantage: the standard deviation of the group's rewards (group) or of the batch's (batch), "
        "the mean of the group's rewards (mean: MaxRL, for rewards from 0 up), or nothing (none).",
    )
    resample_equal_groups: int = setting(
        0,
        "Dynamic sampling: prompts whose samples all earned the same give way to other prompts, at most N times a "
        "batch; 0: never.",
        range=at_least(0),
        conflicts=Conflict(
            "compares the samples of a prompt, by rlseq's sampler: it goes with objective policy_gradient and "
            "advantage_baseline mean or leave_one_out or an own advantage, and without vLLM, continuous batching, "
            "tools and environment.",
            lambda config: config.resample_equal_groups and not config.can_resample,
        ),
    )
    online_curriculum: str | None = setting(
        None,
        "Prompts whose running mean reward is outside this range, as 0.1-0.9, give way to others in most epochs.",
        metavar="LOW-HIGH",
        needs=inherited.SAMPLES,
    )
    reference_loss_coef: float = setting(
        0.0, "Weight of the teacher-forced cross-entropy on the references, mixed into the loss of each step."
    )
    reference_prefix: int = setting(
        0,
        "Rollouts continue from the first N reference tokens, which are not trained; 0: from the prompt.",
        conflicts=Conflict("is sampled by rlseq's sampler; leave it on.", lambda config: config.sampled_by_trl),
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = setting(
        None,
        "Estimator of the KL to the start that beta weighs. Default in the loss: TRL's (k3 times the ratio), and k3 in "
        "rlseq's objectives; in PPO's reward it is k1.",
        needs=Need("beta above 0", lambda config: config.beta),
        conflicts=Conflict(
            "k1 in the loss has gradient zero on average and regularises nothing. Take k2 or k3, or recipes/ppo.py, "
            "which puts k1 into the reward.",
            lambda config: config.kl_estimator == "k1" and not getattr(config, "kl_in_reward", False),
        ),
    )
    minimum_risk_sharpness: float = setting(
        0.005,
        "Sharpness α of minimum risk training: samples weigh p^α, renormalised.",
        range=ABOVE_0,
        needs=_MINIMUM_RISK,
    )
    minimum_risk_references: bool = setting(
        False, "Put the references among the samples of minimum risk training.", needs=_MINIMUM_RISK
    )
    ema_decay: float = setting(
        0.0,
        "Keep an exponential moving average of the weights with this decay as the result; 0: the last weights.",
        range=FROM_0_BELOW_1,
    )
    interpolation_weight: float = setting(
        0.0,
        "Weight interpolation with the start (WiSE-FT): the start's share in the result (needs ema_decay); 0: none.",
        range=FROM_0_BELOW_1,
        needs=Need("ema_decay above 0", lambda config: config.ema_decay),
    )
    pack_updates: bool = setting(
        True,
        "In the update, compute a prompt once for all its completions; exact. It is off for models that do not "
        "allow it.",
    )
    tools: list[str] | None = setting(
        None,
        "Functions that the model may call while it answers: package.module:function or path/to/file.py:function; its "
        "turns are sampled by TRL, and results are not trained (docs/models.md).",
    )
    environment: str | None = setting(
        None,
        "Class or factory of an environment, one per rollout, whose methods the model calls as it does tools: "
        "package.module:name or path/to/file.py:name. What its get_reward says is the reward environment_reward.",
    )
    rlseq_sampler: bool = setting(
        True, "Sample rollouts with rlseq's sampler (shared prefill, noise by position); false: with TRL's generate."
    )

    @property
    def sampled_by_trl(self) -> bool:
        """Whether TRL samples the completions, not rlseq's sampler."""
        return self.use_vllm or self.use_transformers_continuous_batching or not self.rlseq_sampler

    @property
    def named_functions(self) -> list[str]:
        """Functions and classes beside rewards that the run calls, as they are named."""
        single = (self.environment, self.advantage, self.policy_loss)
        return [*(self.tools or []), *(spec for spec in single if spec)]

    @property
    def uses_references(self) -> bool:
        """Whether the loss needs the references' log-probs."""
        mixed = self.reference_loss_coef != 0 or self.minimum_risk_references
        return mixed or self.objective in (*inherited.EXACT_OBJECTIVES, "reference_exact")

    @property
    def counts_equal_groups(self) -> bool:
        """Whether a group whose rewards are all equal teaches nothing."""
        scaled = self.objective == "policy_gradient" and self.scale_rewards == "group" and self.num_generations > 1
        return self.needs_group or (scaled and self.advantage is None)

    @property
    def scores_references(self) -> bool:
        """Whether the loss needs what the references would earn."""
        return self.objective == "reference_exact" or self.minimum_risk_references

    @property
    def needs_group(self) -> bool:
        """Whether a prompt needs several samples: they are compared with each other."""
        if self.objective == "policy_gradient":
            return self.advantage is None and self.advantage_baseline in ("mean", "leave_one_out")
        return self.objective == "minimum_risk" and not self.minimum_risk_references

    @property
    def can_resample(self) -> bool:
        """Whether groups can give way to others."""
        compared = self.objective == "policy_gradient" and (self.needs_group or self.advantage is not None)
        return compared and not (self.sampled_by_trl or self.tools or self.environment)

    def __post_init__(self) -> None:
        validate_given(self)
        if self.objective in inherited.EXACT_OBJECTIVES:
            self.num_generations = 1  # no rollouts: a batch is of this many prompts
        with checks.single_generation(self):
            super().__post_init__()
        validate(self)


@dataclass
class PPOConfig(GRPOConfig):
    """Settings of PPO: those of GRPO, with a critic in place of the group as what a reward is compared with.

    * num_generations: 1, since a critic needs no group.
    * TRL's names of what PPO calls otherwise: num_iterations is its epochs over a batch of rollouts,
      steps_per_generation its minibatches, epsilon its policy clip, beta its KL coefficient, loss_type dapo its mean
      over tokens.
    """

    needs_of_inherited = (*inherited.OF_PPO, *inherited.OF_ROLLOUTS)
    conflicts_of_inherited = inherited.CONFLICTS_OF_PPO
    checks_filled_in = (*GRPOConfig.checks_filled_in, checks.validate_target_kl)

    num_generations: int | None = setting(1, "Completions per prompt; with a critic, 1 is enough.")
    critic: Literal["separate", "shared"] = setting(
        "separate", "The critic: separate (its own backbone) or shared (a head on the policy's trunk)."
    )
    critic_name_or_path: str | None = setting(
        None, "What the critic starts from: a critic that a run saved, or any model (default: the policy's start)."
    )
    critic_learning_rate: float | None = setting(
        None, "Learning rate of the critic (default: the policy's).", range=at_least(0)
    )
    critic_warmup_steps: int = setting(
        0, "Steps that train the critic alone, before the policy moves.", range=at_least(0)
    )
    critic_trunk_gradient: bool = setting(
        False,
        "Let the value loss of a shared critic train the policy's trunk.",
        needs=Need("critic shared", lambda config: config.critic == "shared"),
    )
    vf_coef: float = setting(0.5, "Weight of the value loss.", range=at_least(0))
    value_clip: float | None = setting(
        None, "Clip of the value's change per update, in units of reward (default: no clip).", range=at_least(0)
    )
    gamma: float = setting(1.0, "Discount γ.", range=FROM_0_TO_1)
    lam: float = setting(
        0.95, "λ of generalised advantage estimation; 1: returns, 0: one-step differences.", range=FROM_0_TO_1
    )
    whiten_advantages: bool = setting(True, "Give advantages mean 0 and deviation 1 over all trained tokens.")
    kl_in_reward: bool = setting(
        True, "Put the KL to the start (k1, weighed by beta) into each token's reward; false: into the loss (k2, k3)."
    )
    kl_target: float | None = setting(
        None,
        "Adapt beta so that the KL to the start stays near this many nats per completion (default: beta is fixed).",
        range=NATS_ABOVE_0,
        conflicts=Conflict(
            "adapts beta, the KL penalty in the reward: give --beta, a start above 0",
            lambda config: not config.kl_in_reward or not config.beta,
        ),
    )
    target_kl: float | None = setting(
        None,
        "Skip the remaining updates on a batch of rollouts once the KL to the policy that sampled it exceeds this many "
        "nats per token (default: no limit).",
        range=NATS_ABOVE_0,
        conflicts=Conflict(
            "leaves updates out, which the loss scaling of fp16 does not allow; take bf16", lambda config: config.fp16
        ),
    )
    truncated_completions: Literal["reward", "bootstrap", "penalty"] = setting(
        "reward",
        "A completion cut at the limit is scored as it is (reward), has the critic's value of what would follow in "
        "place of a reward (bootstrap), or loses truncation_penalty (penalty).",
    )
    truncation_penalty: float = setting(
        1.0,
        "What a truncated completion loses under penalty, in units of reward.",
        range=at_least(0),
        needs=Need("truncated_completions penalty", lambda config: config.truncated_completions == "penalty"),
    )

    @property
    def needs_group(self) -> bool:
        """PPO compares with its critic."""
        return False

    @property
    def counts_equal_groups(self) -> bool:
        """A group of equal rewards still differs from the critic's values."""
        return False
