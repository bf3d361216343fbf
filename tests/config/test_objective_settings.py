"""What the settings of the objectives may be: what contradicts itself, or would be ignored, is refused."""

from __future__ import annotations

import pytest
from test_grpo_family import LONG, WEIGHTS, family_trainer, logged, weights, weights_after
from tiny_task import ROWS, tiny_tokenizer

import rlseq
from rlseq.config.training import GRPOConfig
from rlseq.config.validation.checks import check_prompts
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError

REFUSED = {
    "one sample against its group": ({"num_generations": 1}, "baseline 'mean' compares"),
    "one sample left out": ({"num_generations": 1, "advantage_baseline": "leave_one_out"}, "'leave_one_out' compares"),
    "one sample of a set": ({"num_generations": 1, "objective": "minimum_risk"}, "minimum_risk compares"),
    "one sample over its deviation": ({"num_generations": 1, "advantage_baseline": "batch"}, "scale_rewards"),
    "an unknown loss": ({"loss_type": "dpo"}, "loss_type is 'dpo'; expected one of 'grpo', .*Did you mean 'dapo'?"),
    "no samples": ({"num_generations": 0}, "num_generations is 0; expected at least 1"),
    "no tokens": ({"max_completion_length": 0}, "max_completion_length is 0; expected at least 1"),
    "no rows": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected at least 1"),
    "no passes": ({"num_iterations": 0}, "num_iterations is 0; expected at least 1"),
    "steps uphill": ({"learning_rate": -1.0}, "learning_rate is -1.0; expected at least 0"),
    "a seed that numpy refuses": ({"seed": -1}, "seed is -1; expected at least 0"),
    "a moment that grows": ({"adam_beta1": 2.0}, r"adam_beta1 is 2.0; expected a number in \[0, 1\)"),
    "no temperature": ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
    "k1 in the loss": ({"kl_estimator": "k1", "beta": 0.1}, "gradient zero"),
    "a loss type of TRL's": (
        {"objective": "reference_exact", "loss_type": "grpo"},
        "loss_type is grpo, which has no",
    ),
    "GSPO": ({"objective": "minimum_risk", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    "a baseline": ({"objective": "reference_exact", "advantage_baseline": "batch"}, "advantage_baseline"),
    "a prefix": ({"objective": "reference_exact", "reference_prefix": 1}, "reference_prefix"),
    "an entropy bonus": ({"objective": "minimum_risk", "entropy_coef": 0.1}, "entropy_coef"),
    "adaptive entropy": ({"objective": "minimum_risk", "use_adaptive_entropy": True}, "use_adaptive_entropy"),
    "an entropy quantile": ({"objective": "minimum_risk", "top_entropy_quantile": 0.2}, "top_entropy_quantile"),
    "two-sided clipping": ({"objective": "minimum_risk", "delta": 2.0}, "delta"),
    "an off-policy mask": ({"objective": "minimum_risk", "off_policy_mask_threshold": 0.5}, "off_policy_mask"),
    "truncation masked": ({"objective": "minimum_risk", "mask_truncated_completions": True}, "mask_truncated"),
    "references' share off policy": ({"objective": "reference_exact", "num_iterations": 2}, "exact only on policy"),
    "a KL without rollouts": (
        {"objective": "expected_accuracy", "beta": 0.1},
        "beta is 0.1, which has no effect",
    ),
    "a KL of references alone": (
        {"objective": "max_rl", "max_rl_order": 2, "beta": 0.1},
        "beta is 0.1, which has no effect",
    ),
    "a series without its length": ({"objective": "max_rl"}, "objective max_rl needs .* give --max_rl_order"),
    "a series of no terms": ({"objective": "max_rl", "max_rl_order": 0}, "max_rl_order is 0; expected at least 1"),
    "a length without its series": (
        {"objective": "expected_accuracy", "max_rl_order": 2},
        "max_rl_order is 2, which has no effect without objective max_rl",
    ),
    "more terms than samples": (
        {"scale_rewards": "mean", "max_rl_order": 5},
        "max_rl_order is 5, but of 4 samples at most 4 terms are estimated",
    ),
    "an unknown scale": ({"scale_rewards": "std"}, "scale_rewards is 'std'; expected one of 'group', 'batch', 'mean'"),
    "the group's mean under another baseline": (
        {"scale_rewards": "mean", "advantage_baseline": "leave_one_out"},
        "scale_rewards mean divides .* leave out advantage_baseline",
    ),
    "the mean of separate rewards": (
        {"scale_rewards": "mean", "multi_objective_aggregation": "normalize_then_sum"},
        "scale_rewards mean divides .* multi_objective_aggregation",
    ),
    "no sharpness": ({"minimum_risk_sharpness": 0.0}, "minimum_risk_sharpness is 0.0"),
    "references among no samples": ({"minimum_risk_references": True}, "no effect without objective minimum_risk"),
    "a prefix as long as the completion": ({"reference_prefix": 6}, r"expected 0 to .*\(5\)"),
    "a negative prefix": ({"reference_prefix": -1}, "reference_prefix is -1"),
    "a prefix with TRL's sampler": ({"reference_prefix": 1, "rlseq_sampler": False}, "rlseq's sampler"),
    "greedy with TRL's sampler": ({"advantage_baseline": "greedy", "rlseq_sampler": False}, "rlseq's sampler"),
    "weights of ZeRO-3 left sharded": ({"ds3_gather_for_generation": False}, "for ever.*--rlseq_sampler false"),
    "a baseline of separate rewards": (
        {"advantage_baseline": "batch", "multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation",
    ),
    "split groups": (
        {"objective": "minimum_risk", "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
        "these work: 4 or 8",
    ),
    "a micro-batch below a group": (
        {"objective": "minimum_risk", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        r"these work: 4\.",
    ),
}


@pytest.mark.parametrize("settings, message", [pytest.param(*case, id=name) for name, case in REFUSED.items()])
def test_what_contradicts_itself_or_would_be_ignored_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        family_trainer(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_baseline": "greedy", "scale_rewards": "none"},
        {"advantage_baseline": "batch", "scale_rewards": "batch"},
        {"objective": "reference_exact"},
        {"objective": "minimum_risk", "minimum_risk_references": True},
    ],
    ids=str,
)
def test_one_sample_a_prompt_learns_where_it_is_compared_with_something_else(tmp_path, settings):
    trainer = family_trainer(tmp_path, num_generations=1, per_device_train_batch_size=8, **WEIGHTS, **settings)
    start = weights(trainer.model)
    assert (weights_after(trainer) - start).abs().max() > 1e-4
    assert len(logged(tmp_path)) == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_baseline": "greedy"},
        {"objective": "reference_exact"},
        {"objective": "minimum_risk", "minimum_risk_references": True},
    ],
    ids=str,
)
def test_a_reward_of_whole_groups_cannot_score_a_completion_by_itself(tmp_path, settings):
    @rlseq.reward(scope="group")
    def diversity(prompts, completions, **_):
        return [float(len(set(completions)))] * len(completions)

    with pytest.raises(ConfigError, match=r"diversity scores whole groups .*by itself"):
        family_trainer(tmp_path, rewards=[diversity], **settings)


@pytest.mark.parametrize("settings", [{"objective": "expected_accuracy"}, {"objective": "max_rl", "max_rl_order": 2}])
def test_an_exact_objective_needs_a_reference_that_can_be_sampled(tmp_path, settings):
    with pytest.raises(ConfigError, match=f"objective {settings['objective']} .*no prompt has one"):
        family_trainer(tmp_path, rows=LONG[2:], per_device_train_batch_size=2, **settings)


def test_a_batch_of_more_prompts_than_there_are_is_refused(tmp_path):
    # TRL loads whole batches alone, and would end at once without a step.
    with pytest.raises(ConfigError, match=r"a batch is of 4 prompts .*there are 3"):
        family_trainer(tmp_path, rows=ROWS[:3])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"per_device_train_batch_size": 8, "num_generations": 2}, "a batch is of 4 prompts .* but there are 3"),
        ({"reference_loss_coef": 0.1}, "reference_loss_coef needs references"),
        ({"reference_prefix": 1}, "reference_prefix needs references"),
        ({"objective": "reference_exact"}, "objective reference_exact needs references"),
        ({"objective": "minimum_risk", "minimum_risk_references": True}, "minimum_risk_references needs references"),
    ],
)
def test_what_the_prompts_leave_without_effect_is_refused_before_anything_starts(tmp_path, settings, message):
    prompts = build_prompts([{"prompt": row["prompt"]} for row in ROWS[:3]], tiny_tokenizer())
    common = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 4, "num_generations": 4}
    config = GRPOConfig(**{**common, "max_completion_length": 6, **settings})
    with pytest.raises(ConfigError, match=message):
        check_prompts(config, prompts)
