"""Rows of the data set -> completions: by rlseq's sampler, or by TRL's generators, tools and `rollout_func`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import trl
from trl.chat_template_utils import parse_response
from trl.models.utils import unwrap_model_for_generation

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.chat import reference_ids
from rlseq.engine.sampling import sample
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Greedy, Sample
from rlseq.errors import ConfigError
from rlseq.training.environment import callable_methods, check_group_prompts
from rlseq.training.forward import Ids
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.run.faults import memory_for, sampling_advice
from rlseq.training.trl.sharding import whole_weights
from rlseq.types import Prompt, Rollout


class SamplingMixin(trl.GRPOTrainer):
    """Completes the prompts of a batch.

    Attributes:
        prompts: what is continued; rows of the data set have their indices.
        stop_strings: texts that end a completion.
    """

    prompts: list[Prompt]
    stop_strings: StopStrings

    @property
    def stream(self) -> int:
        """How many batches of rollouts have been sampled before: names the noise of this one."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _complete(self, batch: RolloutBatch) -> tuple[Any, ...]:
        """Complete the batch's prompts; what TRL's `_generate` returns.

        With tools and a `rollout_func` that is TRL's own; else completions of `Prompt`s as they were rendered.
        """
        if self.environments and self.use_vllm and self.vllm_mode == "server":
            check_group_prompts(batch.indices, batch.asked)
        with memory_for("sampling rollouts", sampling_advice, self.args):
            if self.tools or self.rollout_func is not None:
                found = self._generate(batch.asked)
                if any(found[-1]):
                    raise ConfigError("a tool returned an image, which the tokenizer cannot read; let it return text")
                return found
            return self._complete_rendered(batch)

    def _complete_rendered(self, batch: RolloutBatch) -> tuple[Any, ...]:
        """Complete the prompts' own ids, by rlseq's sampler or a generator of TRL's."""
        prompt_ids = [list(self.prompts[index].prompt_ids) for index in batch.indices]
        if self.args.sampled_by_trl:
            completion_ids, logprobs = self._generate_single_turn(prompt_ids, None, {}, self._group_size)
            self._submit_rewards(batch, self._rollouts_of_ids(batch, completion_ids))
        else:
            batch.rollouts = self._sample(batch)
            self._submit_rewards(batch, batch.rollouts)
            completion_ids = [list(rollout.completion_ids) for rollout in batch.rollouts]
            logprobs = [list(rollout.logprobs) for rollout in batch.rollouts]
        completions = self._as_completions(batch.asked, prompt_ids, completion_ids)
        self._log_lengths(prompt_ids, completion_ids, self._ended(batch, completion_ids))
        return prompt_ids, completion_ids, None, completions, logprobs, {}, None, []

    @property
    def _group_size(self) -> int:
        """G, the samples per prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _ask(self, rows: list[dict[str, Any]]) -> list[Any]:
        """The prompts of rows; with an environment, one is reset per rollout, and may add to its prompt.

        What TRL's loop of tool calls reads is set: the environments, and what each rollout may call.
        """
        prompts = [row["prompt"] for row in rows]
        environments: list[Any] = []
        if self.environment_factories is not None:
            pool = self._environment_pool[None]
            while len(pool) < len(rows):
                pool.append(self.environment_factories[None]())
            environments = self.environments = pool[: len(rows)]
            self._batch_environments = [None] * len(rows)
            prompts = [
                _with_observation(prompt, environment.reset(**row))
                for prompt, environment, row in zip(prompts, environments, rows, strict=True)
            ]
        if self.tools:
            self._sync_tool_dicts, self._async_tool_dicts = [], []
            for i in range(len(rows)):
                methods = callable_methods(environments[i]) if environments else []
                named = {tool.__name__: tool for tool in [*self._standalone_tools, *methods]}
                waits = {name: tool for name, tool in named.items() if inspect.iscoroutinefunction(tool)}
                self._async_tool_dicts.append(waits)
                self._sync_tool_dicts.append({name: tool for name, tool in named.items() if name not in waits})
        return prompts

    def _as_completions(self, prompts: list[Any], prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Any:
        """Completions as TRL hands them over: text, or the assistant's message, parsed where the tokenizer says how."""
        tokenizer = self.processing_class
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        texts = [self.stop_strings.text(ids, text) for ids, text in zip(completion_ids, texts, strict=True)]
        if isinstance(prompts[0], str):
            return texts
        if not self.stop_strings and any(
            getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")
        ):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            return [[parse_response(tokenizer, ids, prefix=prompt, tools=[])] for prompt, ids in pairs]
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _ended(self, batch: RolloutBatch, completion_ids: list[list[int]]) -> list[bool]:
        """Which completions ended by themselves; the others were cut at the limit."""
        if batch.rollouts is not None:
            return [rollout.finish_reason == "stop" for rollout in batch.rollouts]
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        return [ids[-1] in ends or self.stop_strings.cuts(ids) for ids in completion_ids]

    def _log_lengths(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], ended: list[bool]) -> None:
        """Log the lengths of the round's completions, over all processes, by TRL's names."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        sizes = torch.tensor(
            [(len(p), len(c), whole) for p, c, whole in zip(prompt_ids, completion_ids, ended, strict=True)],
            device=self.accelerator.device,
        )
        asked, lengths, whole = self.accelerator.gather(sizes).unbind(1)  # (B,) each
        if self.model.training:
            self.state.num_input_tokens_seen += (asked.sum() + lengths.sum()).item()
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        metrics["completions/clipped_ratio"].append((whole == 0).float().mean().item())
        finished = lengths[whole.bool()] if whole.any() else torch.zeros_like(lengths[:1])
        for name, of in {"": lengths, "terminated_": finished}.items():
            metrics[f"completions/mean_{name}length"].append(of.float().mean().item())
            metrics[f"completions/min_{name}length"].append(of.float().min().item())
            metrics[f"completions/max_{name}length"].append(of.float().max().item())

    def _sample(self, batch: RolloutBatch) -> list[Rollout]:
        """The local rows' rollouts by rlseq's sampler, and the greedy ones where those are the baseline."""
        num_generations = self._group_size
        # A group may straddle ranks: the sample index follows from the row's place in the global batch.
        first = self.accelerator.process_index * len(batch.rows)
        starts = [self._prefix(row["index"], (first + i) % num_generations) for i, row in enumerate(batch.rows)]
        places: dict[tuple[int, Ids], list[int]] = {}  # (prompt index, forced prefix) -> local rows
        for i, row in enumerate(batch.rows):
            places.setdefault((row["index"], starts[i]), []).append(i)
        common = {"stop_ids": self.eos_token_ids, "tokenizer": self.processing_class, "seed": self.args.seed}
        common["stop_strings"] = self.args.stop_strings or ()
        with self._model_to_generate() as model, raise_on_all_ranks():
            groups = sample(
                model,
                [self.prompts[index] for index, _ in places],
                num_samples=num_generations,
                samples=[[(first + i) % num_generations for i in rows] for rows in places.values()],
                prefixes=[prefix for _, prefix in places],
                max_new_tokens=self.max_completion_length - self.args.reference_prefix,
                strategy=Sample(temperature=self.temperature),
                stream=self.stream,
                **common,
            )
            if self.args.advantage_baseline == "greedy":
                indices = list(dict.fromkeys(batch.indices))
                prompts = [self.prompts[index] for index in indices]
                limit = self.max_completion_length
                greedy = sample(model, prompts, num_samples=1, max_new_tokens=limit, strategy=Greedy(), **common)
                batch.greedy = {index: one for index, (one,) in zip(indices, greedy, strict=True)}
        rollouts: list[Any] = [None] * len(batch.rows)
        for rows, group in zip(places.values(), groups, strict=True):
            for i, rollout in zip(rows, group, strict=True):
                rollouts[i] = rollout
        return rollouts

    @contextlib.contextmanager
    def _model_to_generate(self) -> Iterator[torch.nn.Module]:
        """The bare model, its weights whole on every rank, so that each may call it as often as its rows take."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            whole_weights(model, reshard_after_forward=bool(getattr(plugin, "reshard_after_forward", True))),
        ):
            yield model

    def _prefix(self, index: int, sample_index: int) -> Ids:
        """The reference tokens that a sample continues from; a prompt's samples take its references in turn."""
        if not self.args.reference_prefix:
            return ()
        references = reference_ids(self.prompts[index], self.processing_class, self.eos_token_ids)
        if not references:
            return ()
        reference = references[sample_index % len(references)]
        return reference[: min(self.args.reference_prefix, len(reference) - 1)]  # a token at least is sampled


def _with_observation(prompt: list[dict[str, Any]], observation: str | None) -> list[dict[str, Any]]:
    """A chat whose last message ends in what an environment's `reset` returned; the row keeps its own."""
    if observation is None:
        return prompt
    *before, last = prompt
    parts = isinstance(last["content"], list)
    more: Any = [{"type": "text", "text": observation}] if parts else observation
    return [*before, {**last, "content": last["content"] + more}]
