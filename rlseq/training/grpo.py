"""Training on sampled rollouts: `trl.GRPOTrainer` with rlseq's rollouts, rewards, objectives and packed updates.

How a step flows (TRL's method, and what happens there):

    _prepare_inputs                      a generation batch in; shuffles whole groups, hands out micro-batches
      _generate_and_score_completions    keeps the rows; afterwards sets the advantages and logs the rollouts
        _generate                        rows -> rollouts, by rlseq.engine.sampling
        _calculate_rewards               rollouts -> values, by the reward suite
    _compute_loss                        TRL's losses or one of rlseq's objectives, plus the reference loss
      _get_per_token_logps_and_entropies one packed forward a micro-batch, positions explicit
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.config.checks import check_group_rewards, check_prompts, check_router
from rlseq.config.training import GRPOConfig
from rlseq.data.chat import tokenize_prompts
from rlseq.data.rows import reference_ids
from rlseq.engine.model_info import attention_of
from rlseq.engine.self_tests import supports_packing
from rlseq.errors import ConfigError
from rlseq.losses import group_advantages, kl_estimate, rest_reward_elsewhere
from rlseq.training.environment import load_environment
from rlseq.training.forward import Ids, Scores, forward, ragged
from rlseq.training.models import disable_dropout
from rlseq.training.objectives import (
    expected_accuracy_loss,
    minimum_risk_loss,
    reference_exact_loss,
    reference_loss,
)
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.run.faults import memory_for
from rlseq.training.run.model_card import ModelCardMixin
from rlseq.training.run.rollout_log import rollout_records, write_rollouts
from rlseq.training.tools import check_tools, load_tools
from rlseq.training.trl.arguments import (
    check_generation,
    model_of,
    probe_of,
    prompts_of,
    refuse_not_served,
    settings_of,
    suite_of,
    tokenizer_of,
)
from rlseq.training.trl.guard import RolloutGuardMixin
from rlseq.training.trl.head import add_cpu_head
from rlseq.training.trl.reference import begin_adapter_reference, reference_of
from rlseq.training.trl.resume_state import ExactStateMixin
from rlseq.training.trl.rollouts import RolloutMixin
from rlseq.training.trl.tracking import TrackingMixin
from rlseq.training.trl.vllm_cpu import vllm_on_cpu
from rlseq.types import Prompt

NAN = float("nan")
ADVANTAGE_SCALES = {"group": "std", "batch": "batch", "none": "none"}


def training_rows(prompts: list[Prompt]) -> datasets.Dataset:
    """Make the data set that TRL's data loader draws from: the prompt and the index of the `Prompt` it stands for.

    The prompts are put in as they are drawn: kept in Arrow, messages would have each other's keys, as None.
    """

    def drawn(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {"prompt": [copy.deepcopy(prompts[i].prompt) for i in batch["index"]], "index": batch["index"]}

    numbers = list(range(len(prompts)))
    return datasets.Dataset.from_dict({"prompt": [None] * len(prompts), "index": numbers}).with_transform(drawn)


class GRPOTrainer(RolloutGuardMixin, ExactStateMixin, TrackingMixin, ModelCardMixin, RolloutMixin, trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlseq's rollouts, rewards, objectives and packed updates; a drop-in for it.

    Args:
        model: the policy: a path, a hub id or a loaded model.
        reward_funcs: what scores completions: a function, the name of a reward, a reward file, a
            sequence-classification model (path, hub id or loaded), a list of these, or a `RewardSuite`. Their weighted
            total is optimised, and logged as `reward`; weights are those of `args.reward_weights` or the suite's.
        args: an `rlseq.GRPOConfig`, or a `trl.GRPOConfig`, which keeps TRL's defaults; None: rlseq's defaults.
        train_dataset: a `datasets.Dataset` with a column `prompt`, whose other columns rewards ask for by name, or a
            list of `Prompt`s. `references` among the columns feed the reference loss.
        eval_dataset: rows that `evaluate` measures the rewards on, by greedy decoding and by sampling; as
            `train_dataset`. Its numbers are logged as `eval_greedy/NAME` and `eval_sample/NAME`.
        processing_class: the model's tokenizer; None: that of the model's folder.
        callbacks, optimizers, peft_config, tools, rollout_func: as TRL takes them. What a `rollout_func` returns beside
            ids and log-probs are columns for the rewards.
        reward_processing_classes, quantization_config, environment_factory: of TRL; refused, with what to do instead.
        rollouts_dir: every rollout is appended there, one file a generation round; None writes nothing.
        probe: measures the model in place of `eval_dataset`: called with it, returns numbers by name, equal on every
            rank, and leaves no trace in the run. Its numbers are logged as `eval_NAME`.

    Raises:
        RlseqError: an argument would have no effect, or does not fit; the message says what to give instead.
    """

    settings = GRPOConfig

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: datasets.Dataset | list[Prompt] | None = None,
        eval_dataset: datasets.Dataset | list[Prompt] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
        *,
        rollouts_dir: Path | None = None,
        probe: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
    ):
        refuse_not_served(
            {
                "reward_processing_classes": reward_processing_classes,
                "quantization_config": quantization_config,
                "environment_factory": environment_factory,
            }
        )
        args = settings_of(args, self.settings)
        check_generation(args, tools, rollout_func)
        suite = suite_of(reward_funcs, args)
        check_group_rewards(args, suite)
        model = model_of(model, args)
        tokenizer = tokenizer_of(processing_class, model, args)
        prompts = prompts_of(train_dataset, tokenizer, args)
        check_prompts(args, prompts)
        check_router(args, model.config)
        check_tools(args, prompts)
        tools = load_tools(args.tools) if args.tools else tools
        environment_factory = load_environment(args, prompts, suite)
        self.probe = probe_of(eval_dataset, probe, tokenizer, suite, args)
        self.prompts = prompts
        self.suite = suite
        self.rollouts_dir = rollouts_dir
        self.batch = RolloutBatch()
        self._logged_round = 0, 0  # the optimizer step of the last round that was logged, and which of its rounds
        self._asked_references: list[list[Ids]] = []  # of each row, what the next forward scores beside the completions
        self._scores: Scores | None = None  # what the last forward gave
        self._sums: dict[str, Tensor] = {}  # Σ and tokens of what is logged, of the optimizer step under way
        critic = self._build_critic(model, args)
        if args.disable_dropout:
            disable_dropout(model)  # TRL's own, afterwards, turns off that of adapters
        with reference_of(model), vllm_on_cpu(args, model):
            super().__init__(
                model,
                reward_funcs=[_name_only(name) for name in suite.names],
                args=args,
                train_dataset=training_rows(prompts),
                eval_dataset=None if self.probe is None else training_rows(prompts[:1]),  # a stand-in: it has its rows
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        if not args.cast_lm_head_to_fp32:
            for one in (self.model, self.ref_model):
                if one is not None:
                    add_cpu_head(one.get_base_model() if isinstance(one, PeftModel) else one, self.temperature)
        begin_adapter_reference(self.model)
        self.reward_weights = torch.tensor(suite.weights)
        self._leave_rewards_to_suite()
        self._check_rendering()
        packs, reason = (
            supports_packing(self.accelerator.unwrap_model(self.model), longest=self._longest())
            if args.pack_updates
            else (False, "pack_updates is off")
        )
        self.packs = packs
        if args.pack_updates and not packs and self.accelerator.is_main_process:
            print(f"rlseq: updates are not packed: {reason}", flush=True)
        if args.objective == "expected_accuracy" and not any(self._references_of(prompt) for prompt in prompts):
            raise ConfigError(
                "objective expected_accuracy sums the chances of references, but no prompt has one of at most "
                f"max_completion_length ({args.max_completion_length}) tokens. Name their column (--reference_column)."
            )
        if critic is not None:
            self._add_critic(critic)

    def _build_critic(self, model: PreTrainedModel, args: GRPOConfig) -> torch.nn.Module | None:
        """What a subclass builds of the model as it was given, before TRL wraps it."""
        return None

    def _add_critic(self, critic: torch.nn.Module) -> None:
        """Put what `_build_critic` built into the wrapped model."""

    def _check_rendering(self) -> None:
        """Refuse prompts with other tokens than the update would score: those of a template otherwise filled, say."""
        if self.tools or self.environment_factories is not None:
            return  # TRL draws, from what it renders itself
        (ids,) = tokenize_prompts([self.prompts[0].prompt], self.processing_class, self.chat_template_kwargs)
        if tuple(ids) != tuple(self.prompts[0].prompt_ids):
            raise ConfigError(
                "the prompts were rendered otherwise than the trainer renders them, whose update would score other "
                "prompts than were sampled from. Build them with the trainer's tokenizer and its chat_template_kwargs "
                f"({self.args.chat_template_kwargs})."
            )

    def _longest(self) -> int | None:
        if self.tools:
            return None  # the template tells of them, and `reset` may add to a prompt: its own length says little
        return max(len(p.prompt_ids) for p in self.prompts) + self.args.max_completion_length

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    # -- advantages ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        prompt_index = torch.tensor([row["index"] for row in inputs], device=self.accelerator.device)
        if self.args.objective == "expected_accuracy":
            return {"prompt_index": prompt_index}  # exact: no rollouts
        self.batch = RolloutBatch(inputs)
        output = super()._generate_and_score_completions(inputs)
        output["prompt_index"] = prompt_index
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if "old_per_token_logps" in output and self.batch.rollouts is not None and exact:
            # The sampler recorded them as it drew: the same numbers as a fresh forward, to rounding. bfloat16's, under
            # autocast, would leave GSPO's narrow clip: there they stay those of a forward like the update's.
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        if self.args.reference_prefix:
            self._leave_out_prefixes(output)
        if self.multi_objective_aggregation == "sum_then_normalize":
            self._set_advantages(output)
        self._add_objective_inputs(output)
        advantages = output["advantages"]
        if advantages.ndim > 1:  # one a token: their mean
            advantages = advantages.sum(1) / self._mask(output).sum(1).clamp(min=1)
        self.keep_for_table(advantages, self.batch.totals)
        if self._mode == "train" and self.rollouts_dir is not None:
            self._log_rollouts(advantages)
        return output

    def _set_advantages(self, output: dict[str, Tensor]) -> None:
        """Advantages of the total that is optimised, in place of TRL's, which count an abstention as zero."""
        groups = self._groups()
        baseline = self.args.advantage_baseline
        present = self.batch.totals[~self.batch.totals.isnan()]
        if baseline == "greedy":
            baseline = self.batch.greedy_totals.view(groups.shape)[:, 0]
        elif baseline == "batch":
            baseline = (present.mean() if len(present) else self.batch.totals.new_tensor(NAN)).expand(len(groups))
        scale = ADVANTAGE_SCALES[self.scale_rewards]
        advantages = group_advantages(groups, baseline=baseline, scale=scale).flatten()
        output["advantages"] = self._local(advantages).to(output["advantages"])
        spread = torch.where(groups.isnan(), -torch.inf, groups).amax(1) - torch.where(
            groups.isnan(), torch.inf, groups
        ).amin(1)
        metrics = self._metrics[self._mode]
        metrics["reward"][-1] = present.mean().item() if len(present) else NAN
        metrics["reward_std"][-1] = present.std().item() if len(present) > 1 else 0.0
        if self.args.counts_equal_groups:
            metrics["frac_reward_zero_std"][-1] = (spread <= 0).float().mean().item()
        else:  # a group of equal rewards teaches too: they are compared with something else than each other
            metrics.pop("frac_reward_zero_std")
        if self.batch.greedy_totals is not None:
            metrics["greedy_reward"].append(self.batch.greedy_totals.nanmean().item())

    def _groups(self) -> Tensor:
        """Totals of all ranks as groups, (P, G)."""
        return self.batch.totals.view(-1, self.num_generations if self.model.training else self.num_generations_eval)

    def _local(self, over_all_ranks: Tensor) -> Tensor:
        """This process's rows of a tensor of all ranks' rows."""
        first = self.accelerator.process_index * len(self.batch.rows)
        return over_all_ranks[first : first + len(self.batch.rows)]

    def _leave_out_prefixes(self, output: dict[str, Tensor]) -> None:
        """Train sampled tokens only: TRL's mask of tokens the model did not choose hides the forced ones."""
        trained = torch.ones_like(output["completion_mask"])
        for row, rollout in enumerate(self.batch.rollouts):
            trained[row, : len(rollout.trained_mask)] = torch.tensor(rollout.trained_mask, device=trained.device).long()
        output["tool_mask"] = trained
        counted = (output["completion_mask"] * trained).sum()
        output["num_items_in_batch"] = self.accelerator.gather(counted).sum()

    def _add_objective_inputs(self, output: dict[str, Tensor]) -> None:
        """What rlseq's objectives read, as one entry a row, so that it survives the shuffle and the split."""
        if self.args.objective == "policy_gradient":
            return
        output["totals"] = self._local(self.batch.totals)
        if self.args.objective != "reference_exact":
            return
        known = [set(self._references_of(self.prompts[index])) for index in self.batch.indices]
        is_reference = torch.tensor(
            [one.rollout.completion_ids in ids for one, ids in zip(self.batch.scored, known, strict=True)],
            device=self.batch.totals.device,
        )
        rejected = self.accelerator.gather(is_reference)  # (B,), all ranks
        rest = ~rejected & ~self.batch.totals.isnan()
        groups = self._groups()
        elsewhere, counts = rest_reward_elsewhere(groups, rest.view(groups.shape))  # (P,) each
        output["is_reference"] = is_reference
        output["num_rest"] = self._local(counts.repeat_interleave(groups.shape[1]))
        output["rest_reward"] = self._local(elsewhere.repeat_interleave(groups.shape[1]))
        self._metrics[self._mode]["frac_reference"].append(rejected.float().mean().item())

    def _log_rollouts(self, advantages: Tensor) -> None:
        step = self.state.global_step + 1  # the first step they train
        last, part = self._logged_round
        part = part + 1 if last == step else 0  # several rounds may share an optimizer step
        self._logged_round = step, part
        prompts = [self.prompts[index] for index in self.batch.indices]
        if self.environments:  # what `reset` told the model belongs to the prompt
            asked = zip(prompts, self.batch.asked, strict=True)
            prompts = [dataclasses.replace(prompt, prompt=messages) for prompt, messages in asked]
        records = gather_object(rollout_records(step, prompts, self.batch.scored, advantages.tolist(), self.batch.told))
        if self.accelerator.is_main_process:
            write_rollouts(self.rollouts_dir, step, records, part)

    # -- update --------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        # Adapters are in float32; under autocast PEFT's cast of their inputs to that, and autocast's cast back, are two
        # copies of every activation for the same numbers.
        with disable_input_dtype_casting(self.model, active=self.accelerator.mixed_precision != "no"):
            return super().train(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        rows = inputs["prompt_index"].tolist()
        self._scores = None
        self._asked_references = self._references_of_rows(rows) if self.args.uses_references else []
        if self.args.objective == "policy_gradient":
            loss = self._policy_gradient(model, inputs)
        else:
            loss = self._own_objective(model, inputs, rows) / self._accumulation
        loss = loss + self._additional_loss(inputs)
        self._asked_references, self._scores = [], None
        return loss

    def _additional_loss(self, inputs: Mapping[str, Tensor]) -> Tensor | float:
        """What is added to the objective, from the same forward: teacher forcing on the references."""
        if not self.args.reference_loss_coef:
            return 0.0
        # Every row has the same weight, shared among its references, so no split of the batch changes the sum.
        rows = inputs["prompt_index"].tolist()
        total = reference_loss(self._scores.references)
        if total is None:
            total = torch.zeros((), device=self.accelerator.device)
        with_references = [bool(found) for found in self._asked_references]
        self._log_sums("reference_nll", total, torch.tensor(sum(with_references), device=total.device))
        return self.args.reference_loss_coef * total / len(rows) / self._accumulation

    def _policy_gradient(self, model, inputs) -> Tensor:
        """TRL's losses; the KL to the start is TRL's, or that of the estimator named, added to them."""
        if self.args.kl_estimator is None or not self.beta:
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        return loss + self._kl_loss(inputs)

    def _kl_loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """β times the estimated KL to the start: its mean over the tokens of the whole step."""
        kl = kl_estimate(self._scores.logprobs, inputs["ref_per_token_logps"], kind=self.args.kl_estimator or "k3")
        mask = self._mask(inputs)
        self._log_masked_mean("kl", kl, mask)
        return self.beta * self._step_mean(kl, mask, inputs)

    @staticmethod
    def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
        """The trained tokens of a micro-batch, (B, T) bool."""
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _step_mean(self, x_BT: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """This micro-batch's part of the mean over all counted tokens of the optimizer step, on all ranks."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes  # of the whole round
        if self.model.training:
            tokens = tokens * self._accumulation / self.args.steps_per_generation
        return torch.where(mask, x_BT, 0.0).sum() / tokens

    def _own_objective(self, model, inputs, rows: list[int]) -> Tensor:
        """rlseq's objectives: the mean over the micro-batch's rows."""
        args, G = self.args, self.num_generations
        prompts = [self.prompts[i].prompt_ids for i in rows]
        if args.objective == "expected_accuracy":
            self._scores = self._forward(model, prompts, None, 0)
            if self._scores.references.logprobs:
                loss, P = expected_accuracy_loss(self._scores.references)
            else:
                loss = self._scores.logprobs.sum()  # 0, and a backward on this rank as on the others
                P = torch.zeros(1, device=loss.device)
            self._log_mean("exact_accuracy", P.mean())
            return loss / len(rows)
        ids, mask = inputs["completion_ids"], self._mask(inputs)
        lengths = inputs["completion_mask"].sum(1).tolist()
        completions = [tuple(x[:n]) for x, n in zip(ids.tolist(), lengths, strict=True)]
        self._scores = scores = self._forward(model, prompts, completions, ids.shape[1])
        rewards = [self._rewards_of_references(i) for i in rows] if args.scores_references else []
        if args.objective == "minimum_risk":
            loss = minimum_risk_loss(
                scores,
                inputs["totals"],
                completions,
                mask,
                num_generations=G,
                sharpness=args.minimum_risk_sharpness,
                reference_ids=self._asked_references if args.minimum_risk_references else [],
                reference_rewards=rewards,
            )
        else:
            loss, P = reference_exact_loss(
                scores,
                inputs,
                mask,
                num_generations=G,
                clip_low=self.epsilon_low,
                clip_high=self.epsilon_high,
                reference_rewards=rewards,
            )
            self._log_mean("exact_accuracy", P.mean())
        self._log_masked_mean("entropy", scores.entropies, mask)
        loss = loss / len(rows)
        return loss + self._kl_loss(inputs) * self._accumulation if self.beta else loss

    def _log_mean(self, name: str, value: Tensor) -> None:
        self._metrics[self._mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    def _log_masked_mean(self, name: str, x_BT: Tensor, mask: Tensor) -> None:
        """The mean over the counted tokens of an optimizer step: of all its micro-batches, on all ranks."""
        self._log_sums(name, torch.where(mask, x_BT, 0.0).sum(), mask.sum())

    def _log_sums(self, name: str, total: Tensor, count: Tensor) -> None:
        """Σ total / Σ count over the micro-batches of an optimizer step and all ranks."""
        sums = torch.stack([total.detach(), count.to(total.dtype)])
        self._sums[name] = self._sums.get(name, 0.0) + sums
        if self.accelerator.sync_gradients:
            total, count = self.accelerator.reduce(self._sums.pop(name), reduction="sum").tolist()
            self._metrics[self._mode][name].append(total / max(count, 1.0))

    # -- evaluation ----------------------------------------------------------------------------------------------

    @raise_on_all_ranks(exchange=False)  # before the guard's, which this class hides
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measure the model by the probe, in place of TRL's evaluation, which would draw from the run's randomness."""
        if self.probe is None:
            raise ConfigError("this trainer was given no probe to evaluate with")
        if eval_dataset is not None or ignore_keys is not None:
            raise ConfigError("evaluate measures the rows of the probe: leave out eval_dataset and ignore_keys")
        with memory_for("evaluation", self._evaluation_advice), torch.no_grad(), self._model_to_generate() as model:
            found = self.probe(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        Trainer.log(self, dict(metrics))  # not TRL's, which would spend the training metrics gathered so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *_: Any, **__: Any):
        """Refused: a trainer on rollouts predicts no labels."""
        raise ConfigError("predict has nothing to say of rollouts: draw by rlseq.sample, or measure by rlseq.contrast")

    # -- references ----------------------------------------------------------------------------------------------

    def _references_of(self, prompt: Prompt) -> list[Ids]:
        found = reference_ids(prompt, self.processing_class, self.eos_token_ids)
        # One longer than a completion may be has no chance to be sampled: an exact objective leaves it out, and so does
        # the reference loss beside one.
        return found if self.args.objective == "policy_gradient" else [x for x in found if self._fits(x)]

    def _fits(self, completion: Ids) -> bool:
        return len(completion) <= self.max_completion_length

    def _references_of_rows(self, rows: list[int]) -> list[list[Ids]]:
        known = {i: self._references_of(self.prompts[i]) for i in dict.fromkeys(rows)}
        return [known[i] for i in rows]

    # -- forward -------------------------------------------------------------------------------------------------

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
        prompts, completions = ragged(input_ids, attention_mask, logits_to_keep)
        chunk = batch_size or len(prompts)
        parts = [
            self._forward(model, prompts[i : i + chunk], completions[i : i + chunk], logits_to_keep)
            for i in range(0, len(prompts), chunk)
        ]
        self._scores = parts[-1]
        logps = torch.cat([part.logprobs for part in parts])
        entropies = torch.cat([part.entropies for part in parts]) if compute_entropy else None
        return logps, entropies, None

    def _forward(self, model, prompts: list[Ids], completions: list[Ids] | None, width: int, **more: Any) -> Scores:
        with self.accelerator.autocast():
            return forward(
                model,
                prompts,
                completions,
                width,
                references=self._asked_references,
                packs=self.packs,
                pad_id=self.processing_class.pad_token_id,
                dtype=self.model.dtype,
                device=self.accelerator.device,
                attention=attention_of(self.model),
                **more,
            )


def _name_only(name: str):
    """A stand-in that gives TRL a reward's series name; the suite does the scoring."""

    def stand_in(**_: Any):
        raise RuntimeError(f"reward {name!r} is scored by the suite, not by TRL")

    stand_in.__name__ = name
    return stand_in
