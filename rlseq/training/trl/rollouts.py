"""Rollouts at TRL's seams: rows of the data set -> rollouts -> values and a total a rollout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from trl.chat_template_utils import parse_response
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.rows import reference_ids
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Greedy, Sample
from rlseq.errors import ConfigError
from rlseq.scoring import RewardSuite
from rlseq.training.environment import check_group_prompts, environment_rewards
from rlseq.training.forward import Ids
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.run.faults import memory_for
from rlseq.training.trl.sharding import whole_weights
from rlseq.types import ABSENT, Prompt, Rollout, column_names

NAN = float("nan")


class RolloutMixin(trl.GRPOTrainer):
    """The half of the trainer that draws completions and scores them; `GRPOTrainer` has the half that learns.

    Attributes:
        prompts, suite: what is continued, and what scores it.
        batch: the round under way, or the last one.
    """

    prompts: list[Prompt]
    suite: RewardSuite
    batch: RolloutBatch

    @property
    def draw(self) -> int:
        """The generation round: how often completions have been drawn before."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single rows, which would tear prompts from their samples; groups are shuffled whole, by a
        # generator of their own, so that no other draw of the run moves.
        if not self.model.training:
            raise ConfigError(
                "rollouts are not predicted: draw by rlseq.sample, or measure by evaluate or rlseq.contrast"
            )
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            with memory_for("scoring the rollouts (log-probs, the reference, values)", self._memory_advice):
                batch = self._generate_and_score_completions(generation_batch)
            if self.args.steps_per_generation > 1:
                batch = self._shuffle_groups(batch)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _shuffle_groups(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Deal the round's groups to its K minibatches: of every K that follow each other, each gets one, at random.

        So which groups share a minibatch, over all processes, does not depend on how many of those there are. Where
        groups do not come out even, this process's are shuffled.
        """
        rows: dict[int, list[int]] = {}
        for row, prompt in enumerate(batch["prompt_index"].tolist()):
            rows.setdefault(prompt, []).append(row)
        groups, K = list(rows.values()), self.args.steps_per_generation

        def permutation(size: int, *name: int) -> list[int]:
            generator = torch.Generator().manual_seed(hash((self.args.seed, self.draw, *name)) % 2**63)
            return torch.randperm(size, generator=generator).tolist()

        if len(groups) % K or len({len(group) for group in groups}) > 1:
            order = [groups[g] for g in permutation(len(groups))]
        else:
            blocks = len(groups) // K
            first = self.accelerator.process_index * blocks  # of the blocks of all processes
            dealt = [permutation(K, first + block) for block in range(blocks)]
            order = [groups[block * K + dealt[block][minibatch]] for minibatch in range(K) for block in range(blocks)]
        index = [row for group in order for row in group]
        return {key: value[index] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}

    def _generate(self, prompts):
        """TRL's: with tools and a `rollout_func` its own, else completions of `Prompt`s as they were rendered."""
        self.batch.asked = prompts
        if self.environments and self.use_vllm and self.vllm_mode == "server":
            check_group_prompts(self.batch.indices, prompts)
        with memory_for("drawing rollouts", self._rollout_advice):
            if self.tools or self.rollout_func is not None:
                found = super()._generate(prompts)
            else:
                found = self._draw(prompts)
        self.batch.tool_mask = found[2]
        return found

    def _draw(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Complete the local prompts by rlseq's sampler or a generator of TRL's; what TRL's `_generate` returns."""
        prompt_ids = [list(self.prompts[row["index"]].prompt_ids) for row in self.batch.rows]
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        if self.args.sampled_by_trl:
            completion_ids, logprobs = self._generate_single_turn(prompt_ids, None, {}, num_generations)
            self._submit_rewards(self._drawn_by_trl(self.batch.rows, completion_ids))
        else:
            self.batch.rollouts = self._sample(num_generations)
            self._submit_rewards(self.batch.rollouts)
            completion_ids = [list(rollout.completion_ids) for rollout in self.batch.rollouts]
            logprobs = [list(rollout.logprobs) for rollout in self.batch.rollouts]
        completions = self._as_completions(prompts, prompt_ids, completion_ids)
        self._log_lengths(prompt_ids, completion_ids)
        return prompt_ids, completion_ids, None, completions, logprobs, {}, None, []

    def _as_completions(self, prompts: list[Any], prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Any:
        """Completions as TRL hands them over: text, or the assistant's message, parsed where the tokenizer says how."""
        tokenizer = self.processing_class
        if isinstance(prompts[0], str):
            return tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            return [[parse_response(tokenizer, ids, prefix=prompt, tools=[])] for prompt, ids in pairs]
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _log_lengths(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Log the lengths of the round's completions, over all processes, by TRL's names."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        sizes = torch.tensor(
            [(len(p), len(c), c[-1] in ends) for p, c in zip(prompt_ids, completion_ids, strict=True)],
            device=self.accelerator.device,
        )
        asked, lengths, ended = self.accelerator.gather(sizes).unbind(1)  # (B,) each
        if self.model.training:
            self.state.num_input_tokens_seen += (asked.sum() + lengths.sum()).item()
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        metrics["completions/clipped_ratio"].append((ended == 0).float().mean().item())
        finished = lengths[ended.bool()] if ended.any() else torch.zeros_like(lengths[:1])
        for name, of in {"": lengths, "terminated_": finished}.items():
            metrics[f"completions/mean_{name}length"].append(of.float().mean().item())
            metrics[f"completions/min_{name}length"].append(of.float().min().item())
            metrics[f"completions/max_{name}length"].append(of.float().max().item())

    def _sample(self, num_generations: int) -> list[Rollout]:
        """The local rows' rollouts by rlseq's sampler, and the greedy ones where those are the baseline."""
        # A group may straddle ranks: the sample index follows from the row's place in the global batch.
        first = self.accelerator.process_index * len(self.batch.rows)
        starts = [self._prefix(row["index"], (first + i) % num_generations) for i, row in enumerate(self.batch.rows)]
        places: dict[tuple[int, Ids], list[int]] = {}  # (prompt index, forced prefix) -> local rows
        for i, row in enumerate(self.batch.rows):
            places.setdefault((row["index"], starts[i]), []).append(i)
        common = {"stop_ids": self.eos_token_ids, "tokenizer": self.processing_class, "seed": self.args.seed}
        with self._model_to_generate() as model, raise_on_all_ranks():
            groups = sample(
                model,
                [self.prompts[index] for index, _ in places],
                num_samples=num_generations,
                samples=[[(first + i) % num_generations for i in rows] for rows in places.values()],
                prefixes=[prefix for _, prefix in places],
                max_new_tokens=self.max_completion_length - self.args.reference_prefix,
                strategy=Sample(temperature=self.temperature),
                stream=self.draw,
                **common,
            )
            if self.args.advantage_baseline == "greedy":
                indices = list(dict.fromkeys(self.batch.indices))
                prompts = [self.prompts[index] for index in indices]
                limit = self.max_completion_length
                greedy = sample(model, prompts, num_samples=1, max_new_tokens=limit, strategy=Greedy(), **common)
                self.batch.greedy = {index: one for index, (one,) in zip(indices, greedy, strict=True)}
        rollouts: list[Any] = [None] * len(self.batch.rows)
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

    def _leave_rewards_to_suite(self) -> None:
        """Take an environment's own reward off TRL's list again: the suite names and weighs it (environment.py)."""
        count = len(self.suite.names)
        self.reward_funcs, self.reward_func_names = self.reward_funcs[:count], self.reward_func_names[:count]
        self.reward_processing_classes = self.reward_processing_classes[:count]
        self.reward_weights = self.reward_weights[:count]

    def _submit_rewards(self, rollouts: list[Rollout]) -> None:
        """Let the rewards that run apart score the rollouts while TRL computes the reference model's log-probs."""
        indices = self.batch.indices
        columns = self._columns(indices) | {"prompt": [row["prompt"] for row in self.batch.rows]}
        self.batch.pending = self.suite.submit(rollouts, columns, context=_RewardContext(self))

    def _prefix(self, index: int, sample_index: int) -> Ids:
        """The reference tokens that a sample continues from; a prompt's samples take its references in turn."""
        if not self.args.reference_prefix:
            return ()
        references = reference_ids(self.prompts[index], self.processing_class, self.eos_token_ids)
        if not references:
            return ()
        reference = references[sample_index % len(references)]
        return reference[: min(self.args.reference_prefix, len(reference) - 1)]  # a token at least is sampled

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts = self.batch.rollouts or self._as_rollouts(inputs, completions, completion_ids_list)
        indices = [row["index"] for row in inputs]
        names = [name for name in inputs[0] if name not in ("prompt", "index")]  # what a rollout_func told of each
        told = {name: [row[name] for row in inputs] for name in names}
        pending, self.batch.pending = self.batch.pending, None

        with raise_on_all_ranks():
            told |= environment_rewards(self.environments, rollouts, getattr(self, "async_loop", None))
            table = self.suite.score(
                rollouts,
                self._columns(indices) | told | {"prompt": prompts},
                context=_RewardContext(self),
                gather=lambda mine: gather_object([mine]),
                pending=pending,
            )
            greedy = self._score_alone(list(self.batch.greedy.items()))
            if self.args.scores_references:
                self._score_references(indices)
        self.batch.scored = table.scored
        self.batch.told = [{name: values[i] for name, values in told.items()} for i in range(len(inputs))]
        device = self.accelerator.device
        values = torch.tensor(
            [[NAN if v is None else v for v in s.values.values()] for s in table.scored], device=device
        )  # (B, F), local
        totals = torch.tensor([NAN if t is None else t for t in table.totals], device=device)
        for name, counts in table.failure_counts.items():
            for kind, count in counts.items():
                total = self.accelerator.reduce(torch.tensor(float(count), device=device)).item()
                if total or kind == "error":
                    self._metrics["train" if self.model.training else "eval"][f"rewards/{name}/{kind}"].append(total)
        self.batch.totals = self.accelerator.gather(totals)
        if self.batch.greedy:
            of_prompt = dict(zip(self.batch.greedy, greedy, strict=True))
            self.batch.greedy_totals = self.accelerator.gather(
                torch.tensor([of_prompt[index] for index in indices], device=device)
            )
        return self.accelerator.gather(values)

    def _columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        names = self._column_names
        return {name: [self.prompts[index].columns.get(name, ABSENT) for index in indices] for name in names}

    @functools.cached_property
    def _column_names(self) -> list[str]:
        """Of all prompts, as those of a batch may all lack one."""
        return [name for name in column_names(self.prompts) if name != "prompt"]

    def _score_alone(self, rollouts: Sequence[tuple[int, Rollout]]) -> list[float]:
        """Totals of completions beside the groups, (prompt index, rollout) each; NaN where every reward abstained."""
        if not rollouts:
            return []
        indices = [index for index, _ in rollouts]
        columns = self._columns(indices) | {"prompt": [self.prompts[index].prompt for index in indices]}
        table = self.suite.score([rollout for _, rollout in rollouts], columns)
        return [NAN if total is None else total for total in table.totals]

    def _rewards_of_references(self, index: int) -> list[float]:
        """What a prompt's references would earn as completions, in the order of `_references_of`."""
        if index not in self.batch.reference_rewards:  # a run that is resumed by another number of processes
            self._score_references([index])
        return self.batch.reference_rewards[index]

    def _score_references(self, indices: Sequence[int]) -> None:
        """Score the references of several prompts in one call, and keep what they earn for the round."""
        wanted = [index for index in dict.fromkeys(indices) if index not in self.batch.reference_rewards]
        rollouts = [
            (index, self._as_rollout(self.prompts[index], i, ids, "reference"))
            for index in wanted
            for i, ids in enumerate(self._references_of(self.prompts[index]))
        ]
        found: dict[int, list[float]] = {index: [] for index in wanted}
        for (index, _), total in zip(rollouts, self._score_alone(rollouts), strict=True):
            found[index].append(total)
        self.batch.reference_rewards |= found

    def _as_rollouts(self, inputs, completions, completion_ids_list) -> list[Rollout]:
        """Give what TRL's own paths generated (vLLM, continuous batching, tools) the shape of rollouts."""
        rollouts = []
        drawn = self._drawn_by_trl(inputs, completion_ids_list)
        for rollout, completion in zip(drawn, completions, strict=True):
            if isinstance(completion, str):
                rollouts.append(dataclasses.replace(rollout, text=completion))
            else:
                answers = [message.get("content") for message in completion if message["role"] == "assistant"]
                text = str(answers[-1] or "") if answers else ""  # a turn that only calls a tool says nothing
                rollouts.append(dataclasses.replace(rollout, text=text, messages=tuple(completion)))
        if self.batch.tool_mask is not None:
            pairs = zip(rollouts, self.batch.tool_mask, strict=True)
            rollouts = [dataclasses.replace(r, trained_mask=tuple(map(bool, mask))) for r, mask in pairs]
        return rollouts

    def _drawn_by_trl(self, inputs, completion_ids_list) -> list[Rollout]:
        first = self.accelerator.process_index * len(inputs)
        strategy = Sample(temperature=self.temperature).signature
        return [
            self._as_rollout(self.prompts[row["index"]], (first + i) % self.num_generations, tuple(ids), strategy)
            for i, (row, ids) in enumerate(zip(inputs, completion_ids_list, strict=True))
        ]

    def _as_rollout(self, prompt: Prompt, sample_index: int, ids: Ids, strategy: str) -> Rollout:
        """Token ids that rlseq's sampler did not draw, as a rollout without log-probs."""
        text = self.processing_class.decode(ids, skip_special_tokens=True)
        return Rollout(
            prompt_key=prompt.key,
            sample=sample_index,
            completion_ids=ids,
            trained_mask=(True,) * len(ids),
            logprobs=(),
            text=text,
            text_with_special_tokens=self.processing_class.decode(ids, skip_special_tokens=False),
            messages=None if isinstance(prompt.prompt, str) else ({"role": "assistant", "content": text},),
            finish_reason="stop" if ids and ids[-1] in self.eos_token_ids else "length",
            strategy=strategy,
        )


class _RewardContext:
    """What TRL's batch signature of a reward may ask the trainer for."""

    def __init__(self, trainer: RolloutMixin):
        self.trainer_state = trainer.state
        self.log_extra = trainer._log_completion_extra
        self.log_metric = trainer._log_metric
