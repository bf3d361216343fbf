"""GRPO on sampled rollouts: `trl.GRPOTrainer` with rlseq's rollouts, rewards and packed updates at its seams.

How a step flows (TRL's method, and what happens there):

    _prepare_inputs                      a generation batch in; shuffles whole groups, hands out micro-batches
      _generate_and_score_completions    keeps the rows; afterwards sets the advantages and logs the rollouts
        _generate_single_turn            rows -> rollouts, by rlseq.sampler
        _calculate_rewards               rollouts -> values, by the reward suite
    _compute_loss                        TRL's losses, plus the reference loss
      _get_per_token_logps_and_entropies one packed forward a micro-batch, positions explicit
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import trl
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from rlseq.data import reference_ids
from rlseq.decoding import Sample
from rlseq.errors import ConfigError, RewardError, RlseqError
from rlseq.losses import group_advantages
from rlseq.packing import PackedBatch, pack, pad, supports_packing, unpack, unpack_padded
from rlseq.sampler import sample
from rlseq.scoring import RewardSuite
from rlseq.training.checkpoints import FinishedRunMixin
from rlseq.training.config import GRPOConfig
from rlseq.types import Prompt, Rollout, ScoredRollout

T = TypeVar("T")
MIN_ROW_TOKENS = 128  # short groups share a row of so many tokens, so that little of a batch is padding
ADVANTAGE_SCALES = {"group": "std", "batch": "batch", "none": "none"}


def training_rows(prompts: list[Prompt]) -> datasets.Dataset:
    """Make the data set that TRL's data loader draws from: the prompt and the index of the `Prompt` it stands for."""
    return datasets.Dataset.from_dict(
        {"prompt": [p.messages_or_text for p in prompts], "index": list(range(len(prompts)))}
    )


class GRPOTrainer(FinishedRunMixin, trl.GRPOTrainer):
    """TRL's GRPOTrainer on `Prompt`s, `Rollout`s and a `RewardSuite`.

    Args:
        model: the policy.
        args: settings; every field of TRL's GRPOConfig keeps its meaning.
        prompts: what to train on; `references` among their columns feed the reference loss.
        suite: the rewards. Their weighted total is what is optimised and what is logged as `reward`.
        tokenizer: with left padding.
        rollouts_dir: every rollout is appended there, one file a generation round; None writes nothing.
        **kwargs: `callbacks`, `peft_config`, `quantization_config` and the like, as TRL takes them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: GRPOConfig,
        prompts: list[Prompt],
        suite: RewardSuite,
        tokenizer: PreTrainedTokenizerBase,
        rollouts_dir: Path | None = None,
        **kwargs: Any,
    ):
        self.prompts = prompts
        self.suite = suite
        self.rollouts_dir = rollouts_dir
        self._rows: list[dict[str, Any]] = []  # the data set rows of the local generation batch
        self._rollouts: list[Rollout] | None = None  # drawn by rlseq's sampler; None where TRL generated
        self._scored: list[ScoredRollout] = []
        self._totals = torch.empty(0)  # (B,) over all ranks, NaN where every reward abstained
        self._micro_batch_references: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._reference_terms: list[tuple[torch.Tensor, float]] = []
        args.reward_weights = list(suite.weights)
        super().__init__(
            model,
            reward_funcs=[_name_only(name) for name in suite.names],
            args=args,
            train_dataset=training_rows(prompts),
            processing_class=tokenizer,
            **kwargs,
        )
        packs, reason = (
            supports_packing(self.accelerator.unwrap_model(self.model), longest=self._longest())
            if args.pack_updates
            else (False, "pack_updates is off")
        )
        self.packs = packs
        if args.pack_updates and not packs and self.accelerator.is_main_process:
            print(f"rlseq: updates are not packed: {reason}", flush=True)
        local_rows = args.per_device_train_batch_size * args.steps_per_generation
        if local_rows % args.num_generations and any(reward.info.scope == "group" for reward in suite.rewards):
            raise ConfigError(
                f"a reward scores whole groups (scope: group), but a process draws {local_rows} completions, no "
                f"multiple of num_generations ({args.num_generations}): groups would be torn. Make "
                f"per_device_train_batch_size a multiple of {args.num_generations}."
            )
        self.add_callback(_RestoreStep(self))

    def _longest(self) -> int:
        return max(len(p.prompt_ids) for p in self.prompts) + self.args.max_completion_length

    @property
    def draw(self) -> int:
        """The generation round: how often completions have been drawn before."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    # -- rollouts ------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single rows, which would tear prompts from their samples; groups are shuffled whole, by a
        # generator of their own, so that no other draw of the run moves.
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            if self.args.steps_per_generation > 1:
                batch = self._shuffle_groups(batch)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _shuffle_groups(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows: dict[int, list[int]] = {}
        for row, prompt in enumerate(batch["prompt_index"].tolist()):
            rows.setdefault(prompt, []).append(row)
        groups = list(rows.values())
        generator = torch.Generator().manual_seed(hash((self.args.seed, self.draw)) % 2**63)
        order = [row for g in torch.randperm(len(groups), generator=generator).tolist() for row in groups[g]]
        return {key: value[order] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        by_trl = self.use_vllm or self.use_transformers_continuous_batching or not self.args.rlseq_sampler
        if by_trl or self.tools or images is not None:
            self._rollouts = None
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        # A group may straddle ranks: the sample index follows from the row's place in the global batch.
        first = self.accelerator.process_index * len(self._rows)
        places: dict[int, list[int]] = {}  # prompt index -> local rows
        for i, row in enumerate(self._rows):
            places.setdefault(row["index"], []).append(i)
        prompts = [self.prompts[index] for index in places]
        samples = [[(first + i) % num_generations for i in rows] for rows in places.values()]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            groups = sample(
                model,
                prompts,
                num_samples=num_generations,
                samples=samples,
                max_new_tokens=self.max_completion_length,
                strategy=Sample(temperature=self.temperature),
                seed=self.args.seed,
                draw=self.draw,
                stop_ids=self.eos_token_ids,
                tokenizer=self.processing_class,
            )
        rollouts: list[Any] = [None] * len(self._rows)
        for rows, group in zip(places.values(), groups, strict=True):
            for i, rollout in zip(rows, group, strict=True):
                rollouts[i] = rollout
        self._rollouts = rollouts
        return [list(r.completion_ids) for r in rollouts], [list(r.logprobs) for r in rollouts]

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        groups = self._totals.view(-1, num_generations)  # (P, G), all ranks
        if self.multi_objective_aggregation == "sum_then_normalize":
            advantages = group_advantages(groups, scale=ADVANTAGE_SCALES[self.scale_rewards]).flatten()
            first = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[first : first + len(inputs)].to(output["advantages"])
            self._logs["advantages"].clear()
            self._logs["advantages"].extend(advantages.tolist())
            present = self._totals[~self._totals.isnan()]
            spread = torch.where(groups.isnan(), float("-inf"), groups).amax(1) - torch.where(
                groups.isnan(), float("inf"), groups
            ).amin(1)
            metrics = self._metrics[mode]
            metrics["reward"][-1] = present.mean().item() if len(present) else float("nan")
            metrics["reward_std"][-1] = present.std().item() if len(present) > 1 else 0.0
            metrics["frac_reward_zero_std"][-1] = (spread <= 0).float().mean().item()
        if "old_per_token_logps" in output and self._rollouts is not None and self.model.dtype == torch.float32:
            # The sampler recorded them as it drew: the same numbers as a fresh forward, to rounding.
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        output["prompt_index"] = torch.tensor([row["index"] for row in inputs], device=self.accelerator.device)
        if mode == "train":
            self._write_rollouts(output["advantages"].tolist())
        return output

    # -- rewards -------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts = self._rollouts or self._as_rollouts(inputs, completions, completion_ids_list)
        names = {name for row in inputs for name in self.prompts[row["index"]].columns}
        columns = {name: [self.prompts[row["index"]].columns.get(name) for row in inputs] for name in sorted(names)}
        columns["prompt"] = prompts
        table = self._agree(lambda: self.suite.score(rollouts, columns, context=_RewardContext(self)))
        self._scored = table.scored
        device = self.accelerator.device
        values = torch.tensor(
            [[float("nan") if v is None else v for v in s.values.values()] for s in table.scored], device=device
        )  # (B, F), local
        totals = torch.tensor([float("nan") if t is None else t for t in table.totals], device=device)
        for name, counts in table.failure_counts.items():
            for kind, count in counts.items():
                total = self.accelerator.reduce(torch.tensor(float(count), device=device)).item()
                if total or kind == "error":
                    self._metrics["train" if self.model.training else "eval"][f"rewards/{name}/{kind}"].append(total)
        self._totals = self.accelerator.gather(totals)
        return self.accelerator.gather(values)

    def _agree(self, act: Callable[[], T]) -> T:
        """Do something that may fail on one rank; if it did on any, every rank raises that error."""
        result, error = None, None
        try:
            result = act()
        except RlseqError as raised:
            error = raised
        messages = [m for m in gather_object([None if error is None else str(error)]) if m is not None]
        if messages:
            raise error if error is not None else RewardError(messages[0])
        return result

    def _as_rollouts(self, inputs, completions, completion_ids_list) -> list[Rollout]:
        """Give what TRL's own paths generated (vLLM, continuous batching, tools) the shape of rollouts."""
        first = self.accelerator.process_index * len(inputs)
        raw = self.processing_class.batch_decode(completion_ids_list, skip_special_tokens=False)
        rollouts = []
        for i, (row, completion, ids) in enumerate(zip(inputs, completions, completion_ids_list, strict=True)):
            chat = not isinstance(completion, str)
            rollouts.append(
                Rollout(
                    prompt_key=self.prompts[row["index"]].key,
                    sample=(first + i) % self.num_generations,
                    completion_ids=tuple(ids),
                    trained_mask=(True,) * len(ids),
                    logprobs=(),
                    text=str(completion[-1]["content"]) if chat else completion,
                    raw_text=raw[i],
                    messages=tuple(completion) if chat else None,
                    finish_reason="stop" if ids and ids[-1] in self.eos_token_ids else "length",
                    strategy=Sample(temperature=self.temperature).signature,
                )
            )
        return rollouts

    def _write_rollouts(self, advantages: list[float]) -> None:
        if self.rollouts_dir is None:
            return
        step = self.state.global_step + 1  # the first step they train
        records = [
            {
                "step": step,
                "prompt_key": scored.rollout.prompt_key,
                "sample": scored.rollout.sample,
                "prompt": self.prompts[row["index"]].messages_or_text,
                "references": self.prompts[row["index"]].columns.get("references", []),
                "completion": scored.rollout.text,
                "values": dict(scored.values),
                "status": dict(scored.status),
                "total": scored.total,
                "advantage": advantage,
                "logprob": scored.rollout.logprob if scored.rollout.logprobs else None,
                "length": len(scored.rollout.completion_ids),
                "finish_reason": scored.rollout.finish_reason,
            }
            for row, scored, advantage in zip(self._rows, self._scored, advantages, strict=True)
        ]
        everything = gather_object(records)
        if self.accelerator.is_main_process:
            self.rollouts_dir.mkdir(parents=True, exist_ok=True)
            path = self.rollouts_dir / f"{step:06d}.jsonl"
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in everything), encoding="utf-8")
            partial.replace(path)  # whole or not at all

    # -- update --------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        coefficient = self.args.reference_loss_coef
        rows = inputs["prompt_index"].tolist()
        self._reference_terms = []
        self._micro_batch_references = (
            {self.prompts[i].prompt_ids: self._references_of(self.prompts[i]) for i in set(rows)} if coefficient else {}
        )
        loss = super()._compute_loss(model, inputs)
        if coefficient:
            # Every row has the same weight, shared among its references, so no split of the batch changes the sum.
            nll = [weight * -logprobs.mean() for logprobs, weight in self._reference_terms]
            reference_loss = torch.stack(nll).sum() / len(rows) if nll else loss.new_zeros(())
            mode = "train" if self.model.training else "eval"
            accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + coefficient * reference_loss / accumulation
            mean = self.accelerator.gather(reference_loss.detach()).mean().item()
            self._metrics[mode]["reference_nll"].append(mean)
        self._micro_batch_references, self._reference_terms = {}, []
        return loss

    def _references_of(self, prompt: Prompt) -> list[tuple[int, ...]]:
        return reference_ids(prompt, self.processing_class, self.eos_token_ids)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        if compute_aux_loss or any(value is not None for value in multimodal.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        prompts, completions = _ragged(input_ids, attention_mask, logits_to_keep)
        chunk = batch_size or len(prompts)
        parts = [
            self._score_packed(model, prompts[i : i + chunk], completions[i : i + chunk], logits_to_keep)
            for i in range(0, len(prompts), chunk)
        ]
        logps = torch.cat([logps for logps, _ in parts])
        entropies = torch.cat([entropies for _, entropies in parts])
        return logps, entropies if compute_entropy else None, None

    def _score_packed(self, model, prompts, completions, width):
        """One wrapped forward: log-probs and entropies (B, T) of completions, and of the micro-batch's references."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        groups = []
        place_of = [0] * len(prompts)  # row -> place among the flattened groups' completions
        references: list[tuple[int, float]] = []  # (place, weight: rows it stands for, shared among the references)
        place = 0
        for prompt, rows in rows_of.items():
            extra = self._micro_batch_references.get(prompt, [])
            groups.append((prompt, [completions[row] for row in rows] + extra))
            for row in rows:
                place_of[row] = place
                place += 1
            references += [(place + i, len(rows) / len(extra)) for i in range(len(extra))]
            place += len(extra)
        batch = self._collate(groups)
        with self.accelerator.autocast():
            outputs = model(**batch.model_inputs, labels=batch.labels, fused_lm_head=True)
        longest = max(width, *batch.lengths)
        select = torch.tensor(place_of, device=batch.labels.device)
        logps = unpack_padded(outputs.log_probs, batch, longest)[select, :width]
        entropies = unpack_padded(outputs.entropy, batch, longest)[select, :width]
        if references:
            sequences = unpack(outputs.log_probs, batch)
            self._reference_terms = [(sequences[i], weight) for i, weight in references]
        return logps, entropies

    def _collate(self, groups) -> PackedBatch:
        """The one place where a training batch is laid out: packed, or padded for models that packing cannot serve."""
        device, pad_id = self.accelerator.device, self.processing_class.pad_token_id
        if self.packs:
            longest = max(len(prompt) + sum(len(c) + 1 for c in completions) for prompt, completions in groups)
            return pack(
                groups, pad_id=pad_id, device=device, dtype=self.model.dtype, row_tokens=max(longest, MIN_ROW_TOKENS)
            )
        flat = [(prompt, completion) for prompt, completions in groups for completion in completions]
        return pad([p for p, _ in flat], [c for _, c in flat], pad_id=pad_id, device=device)


class _RewardContext:
    """What TRL's batch form of a reward may ask the trainer for."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer_state = trainer.state
        self.log_extra = trainer._log_completion_extra
        self.log_metric = trainer._log_metric


class _RestoreStep(TrainerCallback):
    """TRL does not save its count of micro-batches; it follows from the optimizer steps done."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps


def _name_only(name: str):
    """A stand-in that gives TRL a reward's series name; the suite does the scoring."""

    def stand_in(**_: Any):
        raise RuntimeError(f"reward {name!r} is scored by the suite, not by TRL")

    stand_in.__name__ = name
    return stand_in


def _ragged(input_ids, attention_mask, width) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Undo TRL's padding: prompts (left-padded) and the last `width` columns (right-padded) as tuples of ids."""
    lengths = attention_mask[:, -width:].sum(1).tolist() if width else [0] * len(input_ids)
    prompt_lengths = (attention_mask.sum(1) - torch.tensor(lengths, device=attention_mask.device)).tolist()
    prompts, completions = [], []
    for row, prompt_length, length in zip(input_ids.tolist(), prompt_lengths, lengths, strict=True):
        split = len(row) - width
        prompts.append(tuple(row[split - prompt_length : split]))
        completions.append(tuple(row[split : split + length]))
    return prompts, completions
