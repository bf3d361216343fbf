"""What settings of training may not be, where no field can declare it; and what prompts, rewards and models refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trl
from transformers.integrations import integration_utils

from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.errors import ConfigError, did_you_mean
from rlseq.scoring import RewardSuite
from rlseq.types import Prompt


@contextmanager
def single_generation(config: trl.GRPOConfig) -> Iterator[None]:
    """Let TRL check its settings with num_generations 1, which it refuses though not all that it computes needs more.

    While it looks, the whole generation batch passes for one group, which divides it whatever its size. So does the
    batch of an evaluation by TRL, of which there is none here.
    """
    if config.num_generations is None:
        raise ConfigError("num_generations is null; expected a whole number")
    single, of_evaluation = config.num_generations == 1, config.per_device_eval_batch_size
    if single:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        steps = config.steps_per_generation or config.gradient_accumulation_steps
        batch = config.generation_batch_size or config.per_device_train_batch_size * processes * steps
        if batch < 2:
            raise ConfigError("one prompt with one sample a step gives nothing to compare; enlarge the batch")
        config.num_generations = batch
        config.num_generations_eval = config.num_generations_eval or 1
    config.per_device_eval_batch_size = max(config.num_generations, 1)
    yield
    config.per_device_eval_batch_size = of_evaluation
    if single:
        config.num_generations = 1


def validate_length(config: Any) -> None:
    """Refuse a run of no steps, of any recipe's settings.

    Raises:
        ConfigError: names the setting, with what it may be.
    """
    if config.max_steps == 0:  # transformers takes it for unset
        raise ConfigError("max_steps is 0; expected at least 1, or -1, where num_train_epochs says how long")
    if config.max_steps < 0 and not config.num_train_epochs > 0:
        raise ConfigError(f"num_train_epochs is {config.num_train_epochs}; expected a number above 0")


def validate_template_options(config: Any) -> None:
    """Refuse options of the chat template that teacher forcing sets itself.

    Raises:
        ConfigError: names the first.
    """
    for name in sorted({"add_generation_prompt", "continue_final_message"} & set(config.chat_template_kwargs or {})):
        raise ConfigError(
            f"chat_template_kwargs sets {name}, which teacher forcing sets itself: off where the answer is there, "
            "and on where its prompt ends. Leave it out"
        )


def validate_trackers(config: Any) -> None:
    """Refuse to report to what transformers does not know, or to what is not installed.

    Raises:
        ConfigError: names the first.
    """
    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    modules = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}  # where the name is another
    for name in config.report_to:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"--report_to is {name!r}; expected one of {', '.join(known)}, all or none.{near}")
        if not getattr(integration_utils, f"is_{modules.get(name, name)}_available")():
            extra = "rlseq[tracking]" if name in ("tensorboard", "trackio", "wandb") else name
            raise ConfigError(f"--report_to {name} needs {name}, which is not installed: pip install '{extra}'")


def validate_objective(config: Any) -> None:
    """Refuse settings of the objective that contradict each other, as far as no field declares it.

    Raises:
        ConfigError: says which, and what to do.
    """
    if config.num_generations < 2 and config.needs_group:
        what = config.objective if config.objective != "policy_gradient" else f"baseline {config.advantage_baseline!r}"
        raise ConfigError(
            f"num_generations is {config.num_generations}, but {what} compares a prompt's samples with each other. "
            "Give at least 2, or --advantage_baseline greedy or batch, or recipes/ppo.py, whose critic needs one."
        )
    if config.num_generations < 2 and config.advantage_baseline != "mean" and config.scale_rewards == "group":
        raise ConfigError(
            "num_generations is 1, but scale_rewards group divides by the deviation of a prompt's samples, of which "
            "there is one: every advantage would be 0. Give --scale_rewards batch or none."
        )
    updates = config.steps_per_generation * config.num_iterations
    if config.objective == "reference_exact" and config.gradient_accumulation_steps % updates:
        raise ConfigError(
            "reference_exact weighs rollouts by the chance of a reference under the policy that sampled them, and is "
            f"exact only on policy: each batch of rollouts makes one update, not {updates} (steps_per_generation × "
            "num_iterations). Leave both at their defaults."
        )
    if not 0 <= config.reference_prefix < config.max_completion_length:
        raise ConfigError(
            f"reference_prefix is {config.reference_prefix}; expected 0 to max_completion_length − 1 "
            f"({config.max_completion_length - 1}): the completion holds the prefix."
        )
    if config.objective == "minimum_risk" and config.per_device_train_batch_size % config.num_generations:
        size, G = config.per_device_train_batch_size, config.num_generations
        sizes = [n for n in (size // G * G, (size // G + 1) * G) if n]
        raise ConfigError(
            f"minimum_risk needs a prompt's {G} samples in one micro-batch, but per_device_train_batch_size is {size}. "
            f"With {G} generations, these work: {' or '.join(map(str, sizes))}."
        )


def describe_left_out(rows: int, batch: int, what: str, *, shuffled: bool = True) -> str | None:
    """Say how many rows an epoch of whole batches leaves out, in words; None where it leaves out none."""
    left = rows % batch
    if not left:
        return None
    which = "others in each" if shuffled else "the last, in every one"
    return f"{left:,} of {rows:,} {what} are left out of each epoch ({which}): a batch is of {batch:,}"


def check_prompts(config: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse settings that these prompts leave without effect.

    Raises:
        ConfigError: fewer prompts than a batch takes, or none with the references that a setting asks for.
    """
    wanted = config.generation_batch_size // config.num_generations
    if len(prompts) < wanted:
        raise ConfigError(
            f"a batch is of {wanted} prompts (generation_batch_size {config.generation_batch_size} over "
            f"num_generations {config.num_generations}), but there are {len(prompts)}: nothing would be trained. "
            "Give more prompts, or a smaller per_device_train_batch_size."
        )
    asks = {
        f"objective {config.objective}": config.objective in (*EXACT_OBJECTIVES, "reference_exact"),
        "reference_loss_coef": bool(config.reference_loss_coef),
        "reference_prefix": bool(config.reference_prefix),
        "minimum_risk_references": config.minimum_risk_references,
    }
    asking = [name for name, does in asks.items() if does]
    if asking and not any(prompt.columns.get("references") for prompt in prompts):
        raise ConfigError(
            f"{' and '.join(asking)} needs references, but no prompt has one. Name their column (--reference_column)."
        )


def check_router(config: Any, model_config: Any) -> None:
    """Refuse a router loss beside an objective that leaves it out; the model need not be loaded.

    Args:
        config: of a run on rollouts; its router_aux_loss_coef, where given, stands in for the model's.
        model_config: the model's.

    Raises:
        ConfigError: says what to do.
    """
    text, coefficient = model_config.get_text_config(), config.router_aux_loss_coef
    routed = hasattr(text, "output_router_logits")
    if coefficient and not routed:
        raise ConfigError(f"router_aux_loss_coef is {coefficient}, but this model has no router. Leave it out.")
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    mixed = config.reference_loss_coef or config.teacher_name_or_path
    own_losses = config.objective != "policy_gradient" or mixed or config.kl_estimator
    if routed and coefficient and (own_losses or not (config.needs_group or config.advantage)):
        raise ConfigError(
            "this mixture-of-experts model has a router loss, which is added to the policy gradient only: leave out "
            "objective, reference_loss_coef, teacher_name_or_path, kl_estimator and PPO, or set router_aux_loss_coef "
            "to 0."
        )


def check_group_rewards(config: Any, suite: RewardSuite) -> None:
    """Refuse a reward of whole groups where groups are split, or where a completion is scored by itself.

    Raises:
        ConfigError: says which reward, and what to do.
    """
    group_scope = [reward.name for reward in suite.rewards if reward.info.scope == "group"]
    if not group_scope:
        return
    local_rows = config.per_device_train_batch_size * config.steps_per_generation
    if local_rows % config.num_generations:
        raise ConfigError(
            f"{', '.join(group_scope)} scores whole groups (scope: group), but a process samples {local_rows} "
            f"completions, no multiple of num_generations ({config.num_generations}): groups would be split. Make "
            f"per_device_train_batch_size a multiple of {config.num_generations}."
        )
    alone = config.advantage_baseline == "greedy" or config.objective == "reference_exact"
    if alone or config.minimum_risk_references:
        raise ConfigError(
            f"{', '.join(group_scope)} scores whole groups (scope: group), but a greedy completion or a reference "
            "is scored by itself. Leave out the reward, or that baseline or objective."
        )


# Of generation_kwargs: each samples from another distribution than the one whose log-probs are optimised.
WARPING = (
    *("temperature", "do_sample", "num_beams", "num_return_sequences", "penalty_alpha", "guidance_scale"),
    *("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids", "bad_words"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "sequence_bias", "logit_bias"),
    *("min_length", "min_new_tokens", "min_tokens", "exponential_decay_length_penalty", "renormalize_logits"),
    *("presence_penalty", "frequency_penalty", "logits_processor", "allowed_token_ids"),
)


def validate_sampling(config: trl.GRPOConfig) -> None:
    """Refuse truncated sampling in training: a token that leaves the nucleus has log-prob −∞ and no gradient.

    Raises:
        ConfigError: top_k, top_p, min_p or repetition_penalty is set, or generation_kwargs does so or is not read.
    """
    more = config.generation_kwargs or {}
    if named := [name for name in ("stop_strings", "stop") if name in more]:
        raise ConfigError(f"generation_kwargs sets {named[0]}, which evaluation would not know: give --stop_strings")
    set_to = {
        "top_k": config.top_k not in (None, 0, -1),
        "top_p": config.top_p not in (None, 1.0),
        "min_p": config.min_p not in (None, 0.0),
        "repetition_penalty": config.repetition_penalty not in (None, 1.0),
    }
    wrong = [name for name, is_set in set_to.items() if is_set]
    plain = {"num_beams": 1, "num_return_sequences": 1, "do_sample": True}
    warping = [n for n in more if n in WARPING and (n not in plain or more[n] != plain[n])]
    wrong += [f"{name} (generation_kwargs)" for name in more if name in set_to or name in warping]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} cannot be used in training: the log-probs that are optimised would not be those of "
            "the distribution sampled from. Leave it out (--temperature is supported), or use it in evaluation "
            "(--strategies)."
        )
    if more and not (config.sampled_by_trl or config.tools or config.environment):
        raise ConfigError(
            f"generation_kwargs is {more}, which rlseq's sampler does not read. Leave it out, or let TRL sample "
            "(--rlseq_sampler false)."
        )


def validate_target_kl(config: Any) -> None:
    """Refuse, in PPO, a limit of the KL whose updates end between optimizer steps.

    Raises:
        ConfigError: says which settings do not divide.
    """
    updates = config.steps_per_generation * config.num_iterations
    if config.target_kl is not None and updates % config.gradient_accumulation_steps:
        raise ConfigError(
            f"target_kl ends the updates on rollouts between optimizer steps, but {updates} micro-batches "
            "(steps_per_generation × num_iterations) are no multiple of gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps})."
        )
