"""Rows of the data set -> completions: by rlseq's sampler, or by TRL's generators, tools and `rollout_func`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from trl.chat_template_utils import parse_response
from trl.models.utils import unwrap_model_for_generation

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_ids
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Greedy, Sample
from rlseq.errors import ConfigError
from rlseq.training.environment import callable_methods, check_group_prompts
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.run.faults import memory_for, sampling_advice
from rlseq.training.trl.logging.metrics import TrainingMetrics
from rlseq.training.trl.sharding import whole_weights
from rlseq.training.update.forward import Ids
from rlseq.types import Prompt, Rollout


class RolloutSampler:
    """Completes the prompts of a batch, by rlseq's sampler or by TRL's trainer.

    Args:
        trainer: TRL's, with the model, the tokenizer, the environments and the settings of sampling.
        prompts: what is continued; rows of the data set have their indices.
        metrics: what is logged goes there.
    """

    def __init__(self, trainer: Any, prompts: list[Prompt], metrics: TrainingMetrics):
        self.trainer = trainer
        self.prompts = prompts
        self.metrics = metrics

    @property
    def stream(self) -> int:
        """How many batches of rollouts have been sampled before: names the noise of this one."""
        trainer = self.trainer
        return trainer._step // (trainer.args.steps_per_generation * trainer.num_iterations)

    @property
    def group_size(self) -> int:
        """G, the samples per prompt."""
        trainer = self.trainer
        return trainer.num_generations if trainer.model.training else trainer.num_generations_eval

    @property
    def renders(self) -> bool:
        """Whether TRL renders the prompts itself, for tools and a `rollout_func`, and not rlseq's data."""
        return bool(self.trainer.tools) or self.trainer.rollout_func is not None

    @property
    def records_logprobs(self) -> bool:
        """Whether rlseq's sampler samples the completions, and records the log-prob of each token."""
        return not (self.renders or self.trainer.args.sampled_by_trl)

    def complete(self, batch: RolloutBatch) -> None:
        """Complete the prompts of a batch as they were asked: fill in its rollouts and what comes with them."""
        trainer = self.trainer
        if trainer.environments and trainer.use_vllm and trainer.vllm_mode == "server":
            check_group_prompts(batch.indices, batch.asked)
        with memory_for("sampling rollouts", sampling_advice, trainer.args):
            if self.renders:
                self._complete_by_trl(batch)
                return
            batch.told = [{} for _ in batch.rows]
            batch.prompt_ids = [list(self.prompts[index].prompt_ids) for index in batch.indices]
            if trainer.args.sampled_by_trl:
                completion_ids, batch.logprobs = trainer._generate_single_turn(
                    batch.prompt_ids, None, {}, batch.group_size
                )
                batch.completions = self._as_completions(batch, completion_ids)
                batch.rollouts = self._as_rollouts(batch, completion_ids)
            else:
                batch.rollouts = self._sample(batch)
                batch.logprobs = [list(rollout.logprobs) for rollout in batch.rollouts]
                batch.completions = self._as_completions(batch, [list(r.completion_ids) for r in batch.rollouts])

    def _complete_by_trl(self, batch: RolloutBatch) -> None:
        found = self.trainer._generate(batch.asked)
        batch.prompt_ids, completion_ids, tool_mask, batch.completions, batch.logprobs, told, _, images = found
        if any(images):
            raise ConfigError("a tool returned an image, which the tokenizer cannot read; let it return text")
        batch.told = [
            {name: of[i] if isinstance(of, list) else of for name, of in told.items()} for i in range(len(batch.rows))
        ]
        batch.rollouts = self._as_rollouts(batch, completion_ids)
        if tool_mask is not None:  # 1 per token that the model sampled, 0 per token of a tool
            pairs = zip(batch.rollouts, tool_mask, strict=True)
            batch.rollouts = [dataclasses.replace(r, loss_mask=tuple(map(bool, mask))) for r, mask in pairs]

    def ask(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        """The prompts of rows; with an environment, one is reset per rollout, and may add to its prompt.

        What TRL's loop of tool calls reads is set: the environments, and what each rollout may call.
        """
        trainer = self.trainer
        prompts = [row["prompt"] for row in rows]
        environments: list[Any] = []
        if trainer.environment_factories is not None:
            pool = trainer._environment_pool[None]
            while len(pool) < len(rows):
                pool.append(trainer.environment_factories[None]())
            environments = trainer.environments = pool[: len(rows)]
            trainer._batch_environments = [None] * len(rows)
            prompts = [
                _with_observation(prompt, environment.reset(**row))
                for prompt, environment, row in zip(prompts, environments, rows, strict=True)
            ]
        if trainer.tools:
            trainer._sync_tool_dicts, trainer._async_tool_dicts = [], []
            for i in range(len(rows)):
                methods = callable_methods(environments[i]) if environments else []
                named = {tool.__name__: tool for tool in [*trainer._standalone_tools, *methods]}
                waits = {name: tool for name, tool in named.items() if inspect.iscoroutinefunction(tool)}
                trainer._async_tool_dicts.append(waits)
                trainer._sync_tool_dicts.append({name: tool for name, tool in named.items() if name not in waits})
        return prompts

    def _as_completions(self, batch: RolloutBatch, completion_ids: list[list[int]]) -> list[Any]:
        """Completions as TRL hands them over: text, or the assistant's message, parsed where the tokenizer says how."""
        tokenizer, stop_strings = self.trainer.processing_class, self.trainer.stop_strings
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        texts = [stop_strings.text(ids, text) for ids, text in zip(completion_ids, texts, strict=True)]
        if isinstance(batch.asked[0], str):
            return texts
        if not stop_strings and any(
            getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")
        ):
            pairs = zip(batch.prompt_ids, completion_ids, strict=True)
            return [[parse_response(tokenizer, ids, prefix=prompt, tools=[])] for prompt, ids in pairs]
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _as_rollouts(self, batch: RolloutBatch, completion_ids: list[list[int]]) -> list[Rollout]:
        """Give what TRL's own paths generated (vLLM, continuous batching, tools) the shape of rollouts."""
        rollouts = []
        strategy = Sample(temperature=self.trainer.temperature).spec
        given = zip(batch.indices, batch.samples, completion_ids, batch.completions, strict=True)
        for index, number, ids, completion in given:
            rollout = rollout_of_ids(self.trainer, self.prompts[index], number, tuple(ids), strategy)
            if isinstance(completion, str):
                rollouts.append(dataclasses.replace(rollout, text=completion))
            else:
                answers = [message.get("content") for message in completion if message["role"] == "assistant"]
                text = str(answers[-1] or "") if answers else ""  # a turn that only calls a tool says nothing
                rollouts.append(dataclasses.replace(rollout, text=text, messages=tuple(completion)))
        return rollouts

    def ended(self, batch: RolloutBatch) -> list[bool]:
        """Which completions ended by themselves; the others were cut at the limit."""
        if self.records_logprobs:
            return [rollout.finish_reason == "stop" for rollout in batch.rollouts]
        trainer = self.trainer
        ends = {*trainer.eos_token_ids, trainer.processing_class.pad_token_id}
        completions = [rollout.completion_ids for rollout in batch.rollouts]
        return [ids[-1] in ends or trainer.stop_strings.cuts(ids) for ids in completions]

    def log_lengths(self, batch: RolloutBatch) -> None:
        """Log the lengths of the batch's completions, over all processes, by TRL's names."""
        trainer, metrics = self.trainer, self.metrics.series
        given = zip(batch.prompt_ids, batch.rollouts, self.ended(batch), strict=True)
        sizes = torch.tensor(
            [(len(ids), len(rollout.completion_ids), whole) for ids, rollout, whole in given],
            device=trainer.accelerator.device,
        )
        asked, lengths, whole = trainer.accelerator.gather(sizes).unbind(1)  # (B,) each
        if trainer.model.training:
            trainer.state.num_input_tokens_seen += (asked.sum() + lengths.sum()).item()
        metrics["num_tokens"] = [trainer.state.num_input_tokens_seen]
        metrics["completions/clipped_ratio"].append((whole == 0).float().mean().item())
        finished = lengths[whole.bool()] if whole.any() else torch.zeros_like(lengths[:1])
        for name, of in {"": lengths, "terminated_": finished}.items():
            metrics[f"completions/mean_{name}length"].append(of.float().mean().item())
            metrics[f"completions/min_{name}length"].append(of.float().min().item())
            metrics[f"completions/max_{name}length"].append(of.float().max().item())

    def log_thoughts(self, batch: RolloutBatch) -> None:
        """Log the mean length of the batch's thoughts, and the share that was never closed, over all processes."""
        trainer, metrics = self.trainer, self.metrics.series
        found = [trainer.think_end.length(rollout.completion_ids) for rollout in batch.rollouts]
        lengths, closed = trainer.accelerator.gather(
            torch.tensor(found, dtype=torch.float32, device=trainer.accelerator.device)
        ).unbind(1)  # (B,) each
        metrics["thoughts/mean_length"].append(lengths.mean().item())
        metrics["thoughts/unclosed_ratio"].append(1 - closed.mean().item())

    def _sample(self, batch: RolloutBatch) -> list[Rollout]:
        """The local rows' rollouts by rlseq's sampler, and the greedy ones where those are the baseline."""
        trainer, args, samples = self.trainer, self.trainer.args, batch.samples
        starts = [self._prefix(index, number) for index, number in zip(batch.indices, samples, strict=True)]
        places: dict[tuple[int, Ids], list[int]] = {}  # (prompt index, forced prefix) -> local rows
        for i, row in enumerate(batch.rows):
            places.setdefault((row["index"], starts[i]), []).append(i)
        common = {"stop_ids": trainer.eos_token_ids, "tokenizer": trainer.processing_class, "seed": args.seed}
        common["stop_strings"] = args.stop_strings or ()
        with self.model_to_generate() as model, raise_on_all_ranks():
            groups = sample(
                model,
                [self.prompts[index] for index, _ in places],
                num_samples=batch.group_size,
                samples=[[samples[i] for i in rows] for rows in places.values()],
                prefixes=[prefix for _, prefix in places],
                max_new_tokens=trainer.max_completion_length - args.reference_prefix,
                strategy=Sample(temperature=trainer.temperature),
                stream=self.stream,
                **common,
            )
            if args.advantage_baseline == "greedy":
                indices = list(dict.fromkeys(batch.indices))
                prompts = [self.prompts[index] for index in indices]
                limit = trainer.max_completion_length
                greedy = sample(model, prompts, num_samples=1, max_new_tokens=limit, strategy=Greedy(), **common)
                batch.greedy = {index: one for index, (one,) in zip(indices, greedy, strict=True)}
        rollouts: list[Any] = [None] * len(batch.rows)
        for rows, group in zip(places.values(), groups, strict=True):
            for i, rollout in zip(rows, group, strict=True):
                rollouts[i] = rollout
        return rollouts

    @contextlib.contextmanager
    def model_to_generate(self) -> Iterator[torch.nn.Module]:
        """The bare model, its weights whole on every rank, so that each may call it as often as its rows take."""
        trainer = self.trainer
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
            whole_weights(model, reshard_after_forward=bool(getattr(plugin, "reshard_after_forward", True))),
        ):
            yield model

    def _prefix(self, index: int, sample_index: int) -> Ids:
        """The reference tokens that a sample continues from; a prompt's samples take its references in turn."""
        trainer, tokens = self.trainer, self.trainer.args.reference_prefix
        if not tokens:
            return ()
        references = reference_ids(self.prompts[index], trainer.processing_class, trainer.eos_token_ids)
        if not references:
            return ()
        reference = references[sample_index % len(references)]
        return reference[: min(tokens, len(reference) - 1)]  # a token at least is sampled


def _with_observation(prompt: list[dict[str, Any]], observation: str | None) -> list[dict[str, Any]]:
    """A chat whose last message ends in what an environment's `reset` returned; the row keeps its own."""
    if observation is None:
        return prompt
    *before, last = prompt
    parts = isinstance(last["content"], list)
    more: Any = [{"type": "text", "text": observation}] if parts else observation
    return [*before, {**last, "content": last["content"] + more}]


def rollout_of_ids(trainer: Any, prompt: Prompt, sample_index: int, ids: Ids, strategy: str) -> Rollout:
    """Token ids that rlseq's sampler did not generate, as a rollout without log-probs."""
    tokenizer, stop_strings = trainer.processing_class, trainer.stop_strings
    ended = (ids and ids[-1] in trainer.eos_token_ids) or stop_strings.cuts(ids)
    return Rollout.from_ids(
        prompt.key,
        ids,
        stop_strings.text(ids, tokenizer.decode(ids, skip_special_tokens=True)),
        sample=sample_index,
        text_with_special_tokens=tokenizer.decode(ids, skip_special_tokens=False),
        chat=not isinstance(prompt.prompt, str),
        finish_reason="stop" if ended else "length",
        strategy=strategy,
    )
