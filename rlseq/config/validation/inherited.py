"""Ranges, needs and conflicts of settings that TRL and transformers declare, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlseq.config.arguments import EvaluateArguments, RejectionArguments
from rlseq.config.fields import FROM_0_BELOW_1, Conflict, Need, OneOf, at_least, range_of
from rlseq.config.groups.precision import NEEDS_BITSANDBYTES
from rlseq.engine.model.load import is_adapter

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")  # those of TRL 1.16
WHOLE_LOSSES = ("cispo", "sapo", "vespo")  # of a token too; the others differ in how tokens become one number
EXACT_OBJECTIVES = ("expected_accuracy", "max_rl")  # computed from references alone, without rollouts

# What TRL, transformers and torch would refuse late, by a traceback, or not at all.
RANGES = {
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "steps_per_generation": at_least(1),
    "num_generations": at_least(1),
    "num_iterations": at_least(1),
    "max_completion_length": range_of(EvaluateArguments, "max_new_tokens"),
    "max_length": at_least(1),
    "save_total_limit": at_least(1),
    "seed": at_least(0),
    "learning_rate": at_least(0),
    "adam_epsilon": at_least(0),
    "adam_beta1": FROM_0_BELOW_1,
    "adam_beta2": FROM_0_BELOW_1,
    "epsilon": at_least(0),
    "beta": at_least(0),
    "temperature": range_of(RejectionArguments, "temperature"),
}
RANGES_OF_ROLLOUTS = {
    **RANGES,
    "loss_type": OneOf(LOSS_TYPES),
    "scale_rewards": OneOf(("group", "batch", "mean", "none", True, False)),
}
ADAPTER_RANGES = {
    "lora_r": at_least(1),
    "lora_alpha": at_least(1),
    "lora_dropout": FROM_0_BELOW_1,
}

# Names, or beginnings of names that end in _, and what they need or cannot stand beside.
Needs = tuple[tuple[tuple[str, ...], Need], ...]
Conflicts = tuple[tuple[tuple[str, ...], Conflict], ...]
_MEASURES = "the evaluator measures the rows and samples that it was made with"
_ORDER = "the order of the prompts follows from seed alone"


def _strategy(config: Any) -> str:
    return str(getattr(config.eval_strategy, "value", config.eval_strategy))


def saves_what_it_evaluates(config: Any) -> bool:
    """Whether a run evaluates, and saves whenever it does."""
    evaluates, saves = _strategy(config), str(getattr(config.save_strategy, "value", config.save_strategy))
    return evaluates != "no" and saves in (evaluates, "best")


_OF_ALL: Needs = (
    (("eval_steps",), Need("eval_strategy steps", lambda c: _strategy(c) == "steps")),
    (("eval_delay",), Need("eval_strategy steps or epoch", lambda c: _strategy(c) != "no")),
)
_ROLLOUTS = "an objective that samples (expected_accuracy and max_rl do not)"
SAMPLES = Need(_ROLLOUTS, lambda c: c.objective not in EXACT_OBJECTIVES)
OF_ROLLOUTS: Needs = (
    *_OF_ALL,
    (
        ("num_generations",),
        Need(
            _ROLLOUTS,
            lambda c: c.objective not in EXACT_OBJECTIVES or c.num_generations == 1,
        ),
    ),
    (("beta",), SAMPLES),
    (
        (
            *("scale_rewards", "loss_type", "importance_sampling_level", "advantage_baseline", "reference_prefix"),
            *("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "use_vllm", "delta"),
            *("off_policy_mask_threshold", "mask_truncated_completions"),
        ),
        Need("objective policy_gradient", lambda c: c.objective == "policy_gradient"),
    ),
    (
        ("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
        Need("rlseq's own losses (policy_loss has its own ratio and clip)", lambda c: c.policy_loss is None),
    ),
    (("pad_to_multiple_of",), Need("updates are packed, not padded as TRL pads them")),
    (("vllm_",), Need("use_vllm", lambda c: c.use_vllm)),
    (("vllm_server_", "vllm_group_port"), Need("vllm_mode server", lambda c: c.vllm_mode == "server")),
    (
        ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
        Need("vllm_mode colocate", lambda c: c.vllm_mode == "colocate"),
    ),
    (
        ("transformers_continuous_batching_config",),
        Need("use_transformers_continuous_batching", lambda c: c.use_transformers_continuous_batching),
    ),
    (
        ("cache_implementation",),
        Need("rlseq_sampler false, without vLLM", lambda c: not (c.rlseq_sampler or c.use_vllm)),
    ),
    (("sapo_",), Need("loss_type sapo", lambda c: c.loss_type == "sapo")),
    (("vespo_",), Need("loss_type vespo", lambda c: c.loss_type == "vespo")),
    (("entropy_coef_", "entropy_target"), Need("use_adaptive_entropy", lambda c: c.use_adaptive_entropy)),
    (("ref_model_",), Need("sync_ref_model", lambda c: c.sync_ref_model)),
    (("sync_ref_model", "use_bias_correction_kl"), Need("beta above 0", lambda c: c.beta)),
    (("use_bias_correction_kl",), Need("TRL's own KL (no kl_estimator)", lambda c: c.kl_estimator is None)),
    (("max_tool_calling_iterations",), Need("tools or an environment", lambda c: c.tools or c.environment)),
    (
        ("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
        Need("log_completions", lambda c: c.log_completions),
    ),
    (
        (
            "num_generations_eval",
            "per_device_eval_batch_size",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
            "label_names",
            "prediction_loss_only",
        ),
        Need(_MEASURES),
    ),
    (("data_seed", "train_sampling_strategy", "length_column_name"), Need(_ORDER)),
    (("label_smoothing_factor",), Need("the loss is no cross-entropy on labels")),
)
OF_PPO: Needs = ((("scale_rewards",), Need("PPO's advantages are against its critic, not within groups")),)
OF_SFT: Needs = (
    *_OF_ALL,
    (
        ("per_device_eval_batch_size", "eval_packing", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
        Need("eval_strategy steps or epoch", lambda c: _strategy(c) != "no" or c.eval_on_start),
    ),
    (("batch_eval_metrics", "include_for_metrics"), Need("the recipe computes no metrics of its own")),
    (("packing_strategy",), Need("packing", lambda c: c.packing or c.eval_packing)),
    (("label_smoothing_factor",), Need("loss_type nll", lambda c: c.loss_type == "nll")),
    (("data_seed",), Need("train_sampling_strategy random", lambda c: c.train_sampling_strategy != "group_by_length")),
    (("model_init_kwargs",), Need("the model is loaded by --dtype, --attn_implementation and --model_revision")),
    (("dataset_text_field",), Need("examples are prompts and completions (--prompt_column, --reference_column)")),
)


def _trains_adapter(config: Any) -> bool:
    return config.use_peft or is_adapter(config.model_name_or_path)


def _only_on_hub(config: Any) -> bool:
    return config.model_revision != "main" and not Path(config.model_name_or_path or "").is_dir()


OF_ADAPTERS: Needs = (
    (("merge_adapter", "use_dora", "use_rslora"), Need("an adapter (--use_peft true)", _trains_adapter)),
)
CONFLICTS_OF_ADAPTERS: Conflicts = (
    (
        ("model_revision",),
        Conflict(
            "is {model_revision}, but an adapter's folder names its base without one: the result would be evaluated "
            "and merged on another. Give a local copy as --model_name_or_path (hf download {model_name_or_path} "
            "--revision {model_revision} --local-dir DIR)",
            lambda c: c.use_peft and _only_on_hub(c),
        ),
    ),
    (
        ("load_in_4bit", "load_in_8bit"),
        Conflict(
            "rounds the weights, which cannot train then: train an adapter, --use_peft true",
            lambda c: not _trains_adapter(c),
        ),
    ),
    (
        ("load_in_4bit", "load_in_8bit"),
        NEEDS_BITSANDBYTES,
    ),
)
CONFLICTS_OF_ALL: Conflicts = (
    (("trust_remote_code",), Conflict("is not served: no code of a model's repository is run. Leave it out")),
)
CONFLICTS_OF_SFT: Conflicts = (
    *CONFLICTS_OF_ALL,
    (("chat_template_path",), Conflict("is read after the prompts were rendered; give --chat_template FILE instead")),
)
CONFLICTS_OF_ROLLOUTS: Conflicts = (
    *CONFLICTS_OF_ALL,
    (
        ("stop_strings",),
        Conflict(
            "are looked for by rlseq's sampler and by vLLM: leave rlseq_sampler on, or give --use_vllm true.",
            lambda c: c.sampled_by_trl and not c.use_vllm,
        ),
    ),
    (
        ("stop_strings",),
        Conflict(
            "end a completion, which has turns with tools or an environment. Leave them out.",
            lambda c: c.tools or c.environment,
        ),
    ),
    (
        ("think_end",),
        Conflict(
            "splits a completion, which has turns with tools or an environment. Leave it out.",
            lambda c: c.tools or c.environment,
        ),
    ),
    (
        ("scale_rewards",),
        Conflict(
            "mean divides the difference from the group's mean summed reward; leave out advantage_baseline and "
            "multi_objective_aggregation.",
            lambda c: (
                c.scale_rewards == "mean"
                and (c.advantage_baseline, c.multi_objective_aggregation) != ("mean", "sum_then_normalize")
            ),
        ),
    ),
    (
        ("ds3_gather_for_generation",),
        Conflict(
            "false leaves the weights of ZeRO-3 sharded while rlseq's sampler runs: processes whose completions end "
            "at different steps would wait for each other for ever. Leave it out, or sample by TRL (--rlseq_sampler "
            "false).",
            lambda c: not c.sampled_by_trl,
        ),
    ),
)
_OF_GRPO = Conflict("is of recipes/grpo.py: PPO's advantages are against its critic. Leave it out.")
CONFLICTS_OF_PPO: Conflicts = (
    (("objective", "advantage_baseline", "advantage"), _OF_GRPO),
    *CONFLICTS_OF_ROLLOUTS,
    (
        ("multi_objective_aggregation",),
        Conflict("normalises within groups, which PPO has none of. Leave it out."),
    ),
    (
        ("kl_estimator",),
        Conflict(
            "{kl_estimator} is for the loss; in the reward the KL is k1, whose sum is the sequence's. Leave it out, or "
            "give --kl_in_reward false.",
            lambda c: c.kl_in_reward and c.kl_estimator != "k1",
        ),
    ),
    (
        ("mask_truncated_completions",),
        Conflict(
            "leaves truncated completions out of the loss, truncated_completions {truncated_completions} judges them: "
            "give one of them",
            lambda c: c.truncated_completions != "reward",
        ),
    ),
    (
        ("use_vllm",),
        Conflict("sends every weight of the policy to vLLM, and PPO's policy holds the critic. Leave it out."),
    ),
    (
        ("sync_ref_model",),
        Conflict(
            "moves the reference to the policy parameter by parameter, and PPO's policy holds a critic. Leave it out."
        ),
    ),
)
