"""`--dry_run`: what a run would do and need, in numbers, after every check that costs little and before a model loads.

Nothing is written, claimed or trained. The sizes are those of a run from its start to its last step: early stopping
and a signal end it sooner. How memory and disk are reckoned: `rlseq.training.plan.memory`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from rlseq.common.disk import readable_size
from rlseq.common.tables import render_table
from rlseq.config.training import ModelArguments, RunArguments
from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.data.chat import reference_ids
from rlseq.training.plan.memory import (
    PEAK,
    ModelSize,
    checkpoint_bytes,
    critic_parameters,
    memory,
    size_of,
    weightless_model,
)
from rlseq.training.plan.teacher import teacher_memory, teacher_size
from rlseq.training.run.directory import check_available
from rlseq.training.run.recipe import Task, check_checkpoint
from rlseq.types import Prompt

REFERENCES_READ = 1_000  # prompts whose references tell the usual length


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, derived from its settings and data.

    Attributes:
        examples: prompts, or for teacher forcing (prompt, reference) pairs, that are trained on.
        processes: that train.
        examples_a_step: of all processes; below 1 where a prompt's samples make several steps.
        rollouts_a_step: completions whose loss makes a step; 0 without rollouts.
        generations_a_process: completions that a process samples together, in a rollout batch.
        longest: tokens of the longest prompt and completion together, at most.
        usual: tokens of a prompt and of a completion in the mean, and where the latter is from; None where they are
            known to be the longest.
        tokens_a_step: at most, padding included.
        steps: of the optimizer, in all.
        steps_an_epoch: of the optimizer.
        epochs: passes over the data.
        rollouts: sampled in all.
    """

    examples: int
    processes: int
    examples_a_step: float
    rollouts_a_step: int
    generations_a_process: int
    longest: int
    usual: tuple[float, float, str] | None
    tokens_a_step: int
    steps: int
    steps_an_epoch: int
    epochs: float
    rollouts: int


def plan_rollouts(config: Any, prompts: Sequence[Prompt], processes: int, tokenizer: Any = None) -> Plan:
    """The sizes of a run of recipes/grpo.py or ppo.py.

    Completions are expected to be as long as the references, of which a tokenizer tells the length, or where there are
    none half as long as they may be.

    A rollout batch has generation_batch_size completions, and gives every process num_iterations ×
    steps_per_generation micro-batches; an epoch has as many rounds as the prompts fill, the rest is left out.
    """
    is_stochastic = config.objective not in EXACT_OBJECTIVES
    samples, accumulation = config.num_generations, config.gradient_accumulation_steps
    micro_batches_a_round = config.num_iterations * config.steps_per_generation
    micro_batches = len(prompts) // (config.generation_batch_size // samples) * micro_batches_a_round
    steps, an_epoch = count_steps(config, micro_batches)
    whole_epochs, left = divmod(steps, an_epoch)
    used = whole_epochs * micro_batches + min(left * accumulation, micro_batches)
    rows = config.per_device_train_batch_size * processes * accumulation
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + config.max_completion_length
    return Plan(
        examples=len(prompts),
        processes=processes,
        examples_a_step=rows / samples,
        rollouts_a_step=rows if is_stochastic else 0,
        generations_a_process=config.generation_batch_size // processes if is_stochastic else 0,
        longest=longest,
        usual=(sum(len(p.prompt_ids) for p in prompts) / len(prompts), *_usual_completion(config, prompts, tokenizer)),
        tokens_a_step=rows * longest,
        steps=steps,
        steps_an_epoch=an_epoch,
        epochs=steps / an_epoch,
        rollouts=math.ceil(used / micro_batches_a_round) * config.generation_batch_size if is_stochastic else 0,
    )


def _usual_completion(config: Any, prompts: Sequence[Prompt], tokenizer: Any) -> tuple[float, str]:
    """The mean length of the completions to be expected, in tokens, and what it is taken from."""
    longest = config.max_completion_length
    lengths = []
    if tokenizer is not None:
        for prompt in prompts[:REFERENCES_READ]:
            lengths += [len(ids) for ids in reference_ids(prompt, tokenizer, [tokenizer.eos_token_id])]
    if not lengths:
        return longest / 2, "half of the longest"
    return min(longest, sum(lengths) / len(lengths)), "as references are"


def plan_examples(config: Any, lengths: Sequence[int], processes: int, *, rollouts: int = 0) -> Plan:
    """The sizes of a run of recipes/sft.py.

    Args:
        lengths: tokens of each example, prompt and completion with its EOS; max_length cuts them.
        rollouts: samples that are made before training.
    """
    limit = config.max_length or max(lengths)
    lengths = [min(length, limit) for length in lengths]
    packs, drops = getattr(config, "packing", False), config.dataloader_drop_last
    rows = len(lengths) if not packs else math.ceil(sum(lengths) / limit)
    longest = max(lengths) if not packs else limit
    a_micro_batch = config.per_device_train_batch_size * processes
    whole, left = divmod(rows, a_micro_batch)
    steps, an_epoch = count_steps(config, whole + (left > 0 and not drops))
    rows_a_step = a_micro_batch * config.gradient_accumulation_steps
    return Plan(
        examples=len(lengths),
        processes=processes,
        examples_a_step=rows_a_step * len(lengths) / rows,
        rollouts_a_step=0,
        generations_a_process=0,
        longest=longest,
        usual=None,
        tokens_a_step=rows_a_step * longest,
        steps=steps,
        steps_an_epoch=an_epoch,
        epochs=steps / an_epoch,
        rollouts=rollouts,
    )


def count_steps(config: Any, micro_batches: int) -> tuple[int, int]:
    """Optimizer steps in all and an epoch, from a process's micro-batches an epoch, as transformers counts them."""
    an_epoch = max(1, math.ceil(micro_batches / config.gradient_accumulation_steps))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * an_epoch)
    return steps, an_epoch


def count_checkpoints(config: Any, plan: Plan) -> int:
    """Checkpoints that are on disk when the run has ended, at most."""
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "steps":
        every = config.save_steps if config.save_steps >= 1 else math.ceil(plan.steps * config.save_steps)
        written = math.ceil(plan.steps / every)  # the last step too
    else:  # by epoch; "best" saves at evaluations, which are not more
        written = math.ceil(plan.epochs)
    limit = config.save_total_limit or written
    spared = limit == 1 and bool(config.metric_for_best_model)  # the best beside the newest
    return min(written, limit + spared)


def describe_rollouts(config: Any, run: RunArguments, model_args: ModelArguments, task: Task) -> str:
    """Check the run directory and the model's configuration, and return the sizes of a run on rollouts as a table.

    Raises:
        RlseqError: the run could not start; it says why.
    """
    size = size_of_run(config, model_args)
    plan = plan_rollouts(config, task.prompts, PartialState().num_processes, task.tokenizer)
    cached = plan.generations_a_process * plan.longest
    lines = [_describe(config, run, model_args, size, plan, cached, task.shared)]
    if config.think_end is not None:
        lines.append(f"  {_describe_thoughts(config.think_end, task)}")
    own = {name: getattr(config, name) for name in ("advantage", "policy_loss")}
    lines += [f"  {name} {spec}: tried on a small batch" for name, spec in own.items() if spec]
    return "\n".join(lines)


def size_of_run(config: Any, model_args: ModelArguments) -> ModelSize:
    """The sizes of the policy and of its critic, where the settings have one."""
    model = weightless_model(model_args)
    critic = 0
    if hasattr(config, "critic"):
        critic = critic_parameters(model, config.critic, config.critic_name_or_path)
    return size_of(model, critic)


def _describe_thoughts(think_end: str, task: Task) -> str:
    tokens = len(task.tokenizer(text=think_end, add_special_tokens=False)["input_ids"])
    suites = filter(None, (task.suite, task.eval_suite))
    readers = list(dict.fromkeys(reward.name for suite in suites for reward in suite.rewards if reward.reads_thoughts))
    read = f"{' and '.join(readers)} read{'s' * (len(readers) == 1)} them" if readers else "no reward reads them"
    return f"Thoughts end with {think_end!r} ({tokens} token{'s' * (tokens != 1)}); {read}."


def describe_examples(
    config: Any,
    run: RunArguments,
    model_args: ModelArguments,
    model: Any,
    lengths: Sequence[int],
    *,
    shared: str = "",
    rollouts: int = 0,
    cached_tokens: int = 0,
) -> str:
    """The same of teacher forcing; `model` is on the meta device.

    Args:
        lengths, rollouts: as `plan_examples` takes them.
        shared: how many prompts are both evaluated and trained on, in words.
        cached_tokens: of the samples that a process generates together, before training.

    Raises:
        RlseqError: the run could not start; it says why.
    """
    plan = plan_examples(config, lengths, PartialState().num_processes, rollouts=rollouts)
    return _describe(config, run, model_args, size_of(model), plan, cached_tokens, shared)


def _describe(
    config: Any,
    run: RunArguments,
    model_args: ModelArguments,
    size: ModelSize,
    plan: Plan,
    cached_tokens: int,
    shared: str,
) -> str:
    asked = {"resume": config.resume_from_checkpoint, "overwrite": run.overwrite_output_dir}
    checkpoint = check_available(config.output_dir, **asked)
    if checkpoint is not None:
        check_checkpoint(checkpoint, [model_args])
    held = reckon_memory(config, model_args, size, plan, cached_tokens)
    averaged = bool(getattr(config, "ema_decay", 0))
    each = checkpoint_bytes(
        size, optim=optimizer_name(config), average=averaged, save_only_model=config.save_only_model
    )
    return _table(plan, held, each, count_checkpoints(config, plan), shared)


def optimizer_name(config: Any) -> str:
    """The optimizer's name, of a setting that may be an enumeration."""
    return str(getattr(config.optim, "value", config.optim))


def reckon_memory(
    config: Any, model_args: ModelArguments, size: ModelSize, plan: Plan, cached_tokens: int
) -> dict[str, tuple[int, str]]:
    """Bytes of a process by what they hold, as `rlseq.training.plan.memory.memory` returns them, for completions as
    long as they may be; and the peak for those of the usual length."""
    ema = bool(getattr(config, "ema_decay", 0))
    half = config.bf16 or config.fp16 or size.weight_bytes <= 2 * size.parameters
    settings = {
        "optim": optimizer_name(config),
        "reference": bool(getattr(config, "beta", 0)) and not size.adapter,
        "averages": ema + bool(ema and config.interpolation_weight),
        "quantized_bits": 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        "compute_bytes": 2 if half else 4,
        "checkpointing": bool(config.gradient_checkpointing),
        "logits": not hasattr(config, "max_completion_length"),
        "cpu": config.device.type == "cpu",
    }
    teacher = teacher_size(config, model_args)

    def of_teacher(completion: float) -> dict[str, tuple[int, str]]:
        if teacher is None:
            return {}
        tokens = round(plan.generations_a_process * completion)
        return teacher_memory(*teacher, tokens=tokens, compute_bytes=settings["compute_bytes"])

    more = of_teacher(getattr(config, "max_completion_length", 0))
    tokens = update_tokens(config, plan)
    held = memory(size, update_tokens=tokens, cached_tokens=cached_tokens, more=more, **settings)
    if plan.usual is not None:
        prompt, completion, source = plan.usual
        tokens = round(_update_tokens(config, prompt, completion))
        cached = round(plan.generations_a_process * (prompt + completion))
        more = of_teacher(completion)
        usual = memory(size, update_tokens=tokens, cached_tokens=cached, more=more, **settings)[PEAK][0]
        held[f"{PEAK}, usual"] = (usual, f"completions of {completion:.0f} tokens, {source}; prompts of {prompt:.0f}")
    return held


def update_tokens(config: Any, plan: Plan) -> int:
    """Tokens of a micro-batch at most: padded rows, or where updates are packed each prompt once.

    What completions begin with in common is computed once too, which is not known beforehand.
    """
    completion = getattr(config, "max_completion_length", 0)
    return _update_tokens(config, plan.longest - completion, completion)


def _update_tokens(config: Any, prompt: float, completion: float) -> Any:
    rows = config.per_device_train_batch_size
    if not getattr(config, "pack_updates", False):
        return rows * (prompt + completion)
    return -(-rows // config.num_generations) * prompt + rows * completion


def _table(plan: Plan, held: dict[str, tuple[int, str]], checkpoint: int, checkpoints: int, shared: str) -> str:
    what = "prompts" if plan.generations_a_process or plan.rollouts_a_step else "examples"
    lines: list[tuple[str, str, str]] = [
        (what, f"{plan.examples:,}", shared),
        (f"{what} per step", f"{plan.examples_a_step:,.6g}", f"{plan.processes} process{'es' * (plan.processes > 1)}"),
    ]
    if plan.generations_a_process:
        lines += [
            ("rollouts per step", f"{plan.rollouts_a_step:,}", ""),
            ("generations per process", f"{plan.generations_a_process:,}", "sampled together"),
        ]
    lines += [
        ("tokens per step", f"{plan.tokens_a_step:,}", f"at most; the longest row has {plan.longest:,}"),
        ("optimizer steps", f"{plan.steps:,}", f"{plan.steps_an_epoch:,} per epoch"),
        ("epochs over the data", f"{plan.epochs:.4g}", ""),
        ("rollouts in all", f"{plan.rollouts:,}", ""),
    ]
    lines += [(name, readable_size(number), formula) for name, (number, formula) in held.items()]
    kept = f"{checkpoints} × {readable_size(checkpoint)}"
    lines += [("checkpoints on disk", readable_size(checkpoints * checkpoint), f"{kept}, and the result's weights")]
    return "\n".join(
        [
            "dry run: settings, model, tokenizer, data, rewards and run directory were checked; nothing was written",
            textwrap.indent(render_table(lines, right=[1]), "  "),
            "  Bytes are estimates per process, without sharding and without what the framework itself takes.",
        ]
    )
