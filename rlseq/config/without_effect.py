"""Settings without effect: each is refused in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from rlseq.config.fields import default_of
from rlseq.errors import ConfigError

_MEASURES = "evaluation is the probe's, which measures what it was made with"
_ORDER = "the order of the prompts follows from seed alone"
_Row = tuple[tuple[str, ...], str, Callable[[Any], Any] | None]


def _strategy(config: Any) -> str:
    return str(getattr(config.eval_strategy, "value", config.eval_strategy))


# (names, or beginnings of names that end in _) -> what they need, and whether the settings have it. None: nothing here
# reads them, and the text says why.
_OF_ALL: tuple[_Row, ...] = (
    (("eval_steps",), "eval_strategy steps", lambda c: _strategy(c) == "steps"),
    (("eval_delay",), "eval_strategy steps or epoch", lambda c: _strategy(c) != "no"),
)
_OF_ROLLOUTS: tuple[_Row, ...] = (
    *_OF_ALL,
    (
        ("num_generations",),
        "an objective that draws (expected_accuracy does not)",
        lambda c: c.objective != "expected_accuracy" or c.num_generations == 1,
    ),
    (("scale_rewards",), "objective policy_gradient", lambda c: c.objective == "policy_gradient"),
    (("vllm_",), "use_vllm", lambda c: c.use_vllm),
    (("vllm_server_", "vllm_group_port"), "vllm_mode server", lambda c: c.vllm_mode == "server"),
    (
        ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
        "vllm_mode colocate",
        lambda c: c.vllm_mode == "colocate",
    ),
    (
        ("transformers_continuous_batching_config",),
        "use_transformers_continuous_batching",
        lambda c: c.use_transformers_continuous_batching,
    ),
    (("cache_implementation",), "rlseq_sampler false, without vLLM", lambda c: not (c.rlseq_sampler or c.use_vllm)),
    (("sapo_",), "loss_type sapo", lambda c: c.loss_type == "sapo"),
    (("vespo_",), "loss_type vespo", lambda c: c.loss_type == "vespo"),
    (("entropy_coef_", "entropy_target"), "use_adaptive_entropy", lambda c: c.use_adaptive_entropy),
    (("ref_model_",), "sync_ref_model", lambda c: c.sync_ref_model),
    (("sync_ref_model", "kl_estimator", "use_bias_correction_kl"), "beta above 0", lambda c: c.beta),
    (("use_bias_correction_kl",), "TRL's own KL (no kl_estimator)", lambda c: c.kl_estimator is None),
    (("max_tool_calling_iterations",), "tools or an environment", lambda c: c.tools or c.environment),
    (
        ("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
        "log_completions",
        lambda c: c.log_completions,
    ),
    (
        ("minimum_risk_sharpness", "minimum_risk_references"),
        "objective minimum_risk",
        lambda c: c.objective == "minimum_risk",
    ),
    (("truncation_penalty",), "truncated_completions penalty", lambda c: c.truncated_completions == "penalty"),
    (("critic_trunk_gradient",), "critic shared", lambda c: c.critic == "shared"),
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
        _MEASURES,
        None,
    ),
    (("data_seed", "train_sampling_strategy", "length_column_name"), _ORDER, None),
    (("label_smoothing_factor",), "the loss is no cross-entropy on labels", None),
)
_OF_PPO: tuple[_Row, ...] = ((("scale_rewards",), "PPO's advantages are against its critic, not within groups", None),)
_OF_SFT: tuple[_Row, ...] = (
    *_OF_ALL,
    (
        ("per_device_eval_batch_size", "eval_packing", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
        "eval_strategy steps or epoch",
        lambda c: _strategy(c) != "no" or c.eval_on_start,
    ),
    (("batch_eval_metrics", "include_for_metrics"), "the recipe computes no metrics of its own", None),
    (("packing_strategy",), "packing", lambda c: c.packing or c.eval_packing),
    (("label_smoothing_factor",), "loss_type nll", lambda c: c.loss_type == "nll"),
    (("data_seed",), "train_sampling_strategy random", lambda c: c.train_sampling_strategy != "group_by_length"),
    (("model_init_kwargs",), "the model is loaded by --dtype, --attn_implementation and --model_revision", None),
    (("dataset_text_field",), "examples are prompts and completions (--prompt_column, --reference_column)", None),
)
_TABLES = {"rollouts": _OF_ROLLOUTS, "ppo": _OF_PPO, "sft": _OF_SFT}


def refuse_without_effect(config: Any) -> None:
    """Refuse settings that nothing reads under the others; called before TRL fills any of them in.

    Raises:
        ConfigError: names the first, and what it needs.
    """
    for name, why in _without_effect(type(config), config).items():
        raise ConfigError(f"{name} is {getattr(config, name)}, which has no effect{why}. Leave it out.")


def overruled(settings: type, from_file: Mapping[str, Any], flags: Mapping[str, Any]) -> set[str]:
    """Names of what a file sets with an effect that flags, which override the file, take away: it is left out.

    Args:
        settings: the dataclass that is to be filled.
        from_file: values by name, of which some may be for other dataclasses.
        flags: likewise.
    """
    alone = {field.name: default_of(field) for field in dataclasses.fields(settings)} | dict(from_file)
    idle = [_without_effect(settings, SimpleNamespace(**values)) for values in (alone, alone | dict(flags))]
    return (idle[1].keys() - idle[0].keys()) & (from_file.keys() - flags.keys())


def _without_effect(settings: type, config: Any) -> dict[str, str]:
    """The settings that nothing reads under the others, and why."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(config, field.name)
        if value == default_of(field) or value is None:
            continue
        for kind in getattr(settings, "_tables_without_effect", ()):
            for names, needed, has in _TABLES[kind]:
                if not any(field.name == n or (n.endswith("_") and field.name.startswith(n)) for n in names):
                    continue
                if has is None or not has(config):
                    found.setdefault(field.name, f": {needed}" if has is None else f" without {needed}")
    return found
