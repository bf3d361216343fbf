"""Ranges and needs of settings that TRL and transformers declare, by name."""

from __future__ import annotations

from typing import Any

from rlseq.config.fields import FINITE_ABOVE_0, FROM_0_BELOW_1, Need, at_least

# What TRL, transformers and torch would refuse late, by a traceback, or not at all.
RANGES = {
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "steps_per_generation": at_least(1),
    "num_generations": at_least(1),
    "num_iterations": at_least(1),
    "max_completion_length": at_least(1),
    "max_length": at_least(1),
    "save_total_limit": at_least(1),
    "seed": at_least(0),
    "learning_rate": at_least(0),
    "adam_epsilon": at_least(0),
    "adam_beta1": FROM_0_BELOW_1,
    "adam_beta2": FROM_0_BELOW_1,
    "epsilon": at_least(0),
    "beta": at_least(0),
    "temperature": FINITE_ABOVE_0,
}
ADAPTER_RANGES = {
    "lora_r": at_least(1),
    "lora_alpha": at_least(1),
    "lora_dropout": FROM_0_BELOW_1,
}

# Names, or beginnings of names that end in _, and what they need.
Needs = tuple[tuple[tuple[str, ...], Need], ...]
_MEASURES = "evaluation is the probe's, which measures what it was made with"
_ORDER = "the order of the prompts follows from seed alone"


def _strategy(config: Any) -> str:
    return str(getattr(config.eval_strategy, "value", config.eval_strategy))


_OF_ALL: Needs = (
    (("eval_steps",), Need("eval_strategy steps", lambda c: _strategy(c) == "steps")),
    (("eval_delay",), Need("eval_strategy steps or epoch", lambda c: _strategy(c) != "no")),
)
OF_ROLLOUTS: Needs = (
    *_OF_ALL,
    (
        ("num_generations",),
        Need(
            "an objective that draws (expected_accuracy does not)",
            lambda c: c.objective != "expected_accuracy" or c.num_generations == 1,
        ),
    ),
    (("scale_rewards",), Need("objective policy_gradient", lambda c: c.objective == "policy_gradient")),
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
