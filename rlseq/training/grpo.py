"""Training on sampled rollouts: `trl.GRPOTrainer` with rlseq's rollouts, rewards, objectives and packed updates.

How a step flows (files in rlseq/training/):

    make_batch            rows in, a RolloutBatch out                              trl/batch/batches.py
      sampler.complete    rows -> rollouts, by rlseq.engine.sampling or by TRL     trl/batch/rollouts.py
      forward.logprobs    old and reference log-probs                              trl/batch/packed_forward.py
      scorer.score        rollouts -> values and totals, by the reward suite       trl/batch/scoring.py
      advantages.of       totals -> advantages                                     update/group_advantages.py
    minibatches           the rows of a batch, as updates take them in turn        trl/batch/batches.py
    micro_batch_loss      a micro-batch -> one packed forward -> a loss            trl/loss.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.config.groups.curriculum import parse_range
from rlseq.config.training import GRPOConfig
from rlseq.config.validation.checks import check_group_rewards, check_prompts, check_router
from rlseq.config.validation.inherited import EXACT_OBJECTIVES
from rlseq.data.chat import tokenize_prompts
from rlseq.data.groups import check_groups
from rlseq.engine.model.lora import with_fused_layers
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.thoughts import ThinkEnd
from rlseq.errors import ConfigError
from rlseq.training.environment import load_environment
from rlseq.training.models import disable_dropout
from rlseq.training.rollouts import MicroBatch, RolloutBatch
from rlseq.training.run.faults import evaluation_advice, memory_for
from rlseq.training.run.rollout_log import RolloutLog, trained_records
from rlseq.training.selection.curriculum import OnlineCurriculum
from rlseq.training.selection.resampling import SparePrompts
from rlseq.training.teacher import Teacher, check_teacher
from rlseq.training.tools import check_tools, load_tools
from rlseq.training.trl.arguments import (
    Arguments,
    evaluator_of,
    model_of,
    prompts_of,
    settings_of,
    suite_of,
    tokenizer_of,
    training_rows,
)
from rlseq.training.trl.batch.batches import BatchMaker
from rlseq.training.trl.batch.packed_forward import PackedForward
from rlseq.training.trl.batch.resampling import DynamicSampling
from rlseq.training.trl.batch.rollouts import RolloutSampler
from rlseq.training.trl.batch.scoring import RewardScorer, leave_rewards_to
from rlseq.training.trl.checkpoint.resume_state import ResumeState
from rlseq.training.trl.logging.metrics import TrainingMetrics
from rlseq.training.trl.logging.trackers import Tracking
from rlseq.training.trl.loss.micro_batch import MicroBatchLoss
from rlseq.training.trl.loss.reference import add_reference, reference_added_later, reference_of
from rlseq.training.trl.rollout_trainer import RolloutTrainer
from rlseq.training.trl.vllm_cpu import vllm_on_cpu
from rlseq.training.update.group_advantages import GroupAdvantages
from rlseq.training.update.own_functions import check_own_functions
from rlseq.types import Prompt


class GRPOTrainer(RolloutTrainer):
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
        rollouts_dir: every rollout is appended there, one file per batch; None writes nothing.
        evaluator: measures the model in place of `eval_dataset`: called with it, returns numbers by name, equal on
            every rank, and leaves no trace in the run. Its numbers are logged as `eval_NAME`.

    Attributes:
        prompts, suite: what is continued, and what scores it.
        stop_strings: texts that end a completion.
        think_end: finds the end of the thought in a completion.
        teacher: judges the rollouts; None without one.
        batch: the last one that was made.
        sampler, scorer, forward, batches, loss: what `make_batch` and `micro_batch_loss` leave the work to.
        metrics: the series that training logs.
        tracking: shows completions.
        evaluator: measures the model; None where nothing does.

    Raises:
        RlseqError: an argument would have no effect, or does not fit; the message says what to give instead.
    """

    settings = GRPOConfig
    advantage_class: type = GroupAdvantages
    loss_class = MicroBatchLoss

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        reward_funcs: Any = None,
        args: Any = None,
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
        evaluator: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
    ):
        args = settings_of(args, self.settings)
        Arguments(
            args,
            reward_processing_classes=reward_processing_classes,
            quantization_config=quantization_config,
            environment_factory=environment_factory,
            evaluator=evaluator,
            eval_dataset=eval_dataset,
            tools=tools,
            rollout_func=rollout_func,
        )
        suite = suite_of(reward_funcs, args)
        check_group_rewards(args, suite)
        check_own_functions(args)
        model = model_of(model, args)
        tokenizer = tokenizer_of(processing_class, model, args)
        check_teacher(args, tokenizer)
        self.stop_strings = StopStrings(args.stop_strings or (), tokenizer)
        self.think_end = ThinkEnd(args.think_end, tokenizer)
        prompts = prompts_of(train_dataset, tokenizer, args)
        check_prompts(args, prompts)
        if args.group_column is not None:
            check_groups(prompts, args.group_column, "the training rows")
        check_router(args, model.config)
        check_tools(args, prompts)
        tools = load_tools(args.tools) if args.tools else tools
        environment_factory = load_environment(args, prompts, suite)
        self.evaluator = evaluator_of(eval_dataset, evaluator, tokenizer, suite, args)
        self.prompts = prompts
        self.suite = suite
        self.batch = RolloutBatch()
        critic = self._build_critic(model, args)
        if args.disable_dropout:
            disable_dropout(model)  # TRL's own, afterwards, turns off that of adapters
        reference = reference_of(model, args, peft_config)
        with reference_added_later(args, reference), vllm_on_cpu(args, model):
            super().__init__(
                model,
                reward_funcs=[_name_only(name) for name in suite.names or ["none"]],  # TRL wants one
                args=args,
                train_dataset=training_rows(prompts),
                eval_dataset=None
                if self.evaluator is None
                else training_rows(prompts[:1]),  # a stand-in: it has its rows
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=with_fused_layers(peft_config),
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        if args.use_vllm and self.stop_strings:
            given = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {**given, "stop": list(self.stop_strings.strings)}
        self.resume_state = ResumeState(self, [self.guard])
        self.log_completions = False  # by TRL, whose table would come again with the closing summary
        self.tracking = Tracking(self.callback_handler)
        self.add_callback(self.tracking)
        add_reference(self, reference)
        leave_rewards_to(suite, self)
        self._check_rendering()
        self.metrics = TrainingMetrics(self)
        self.sampler = RolloutSampler(self, prompts, self.metrics)
        self.scorer = RewardScorer(self, prompts, suite)
        self.forward = PackedForward(self, longest=self._longest())
        self.teacher = None
        if args.teacher_name_or_path is not None:
            self.teacher = Teacher(self, longest=self._longest())
        self.loss = self.loss_class(self, self.forward, self.scorer, self.metrics)
        spare = SparePrompts(len(prompts), args.seed)
        curriculum = None
        if args.online_curriculum is not None:
            keys = [prompt.key for prompt in prompts]
            curriculum = OnlineCurriculum(keys, *parse_range("online_curriculum", args.online_curriculum), spare)
        if curriculum is not None or args.resample_equal_groups:
            self.resume_state.shared += [spare, *([curriculum] if curriculum is not None else [])]
        self.batches = BatchMaker(
            self,
            sampler=self.sampler,
            scorer=self.scorer,
            advantages=self.advantage_class(self),
            forward=self.forward,
            metrics=self.metrics,
            tracking=self.tracking,
            log=None if rollouts_dir is None else RolloutLog(rollouts_dir),
            resampling=self._dynamic_sampling(spare, curriculum) if args.resample_equal_groups else None,
            curriculum=curriculum,
        )
        if args.objective in EXACT_OBJECTIVES and not any(map(self.scorer.references_of, range(len(prompts)))):
            raise ConfigError(
                f"objective {args.objective} sums the chances of references, but no prompt has one of at most "
                f"max_completion_length ({args.max_completion_length}) tokens. Name their column (--reference_column)."
            )
        if critic is not None:
            self._add_critic(critic)

    def _build_critic(self, model: PreTrainedModel, args: GRPOConfig) -> torch.nn.Module | None:
        """What a subclass builds of the model as it was given, before TRL wraps it."""
        return None

    def _add_critic(self, critic: torch.nn.Module) -> None:
        """Put what `_build_critic` built into the wrapped model."""

    def _dynamic_sampling(self, spare: SparePrompts, curriculum: OnlineCurriculum | None) -> DynamicSampling:
        return DynamicSampling(
            self,
            rounds=self.args.resample_equal_groups,
            sampler=self.sampler,
            scorer=self.scorer,
            spare=spare,
            curriculum=curriculum,
            metrics=self.metrics,
        )

    def _check_rendering(self) -> None:
        """Refuse prompts with other tokens than the update would score: those of a template otherwise filled, say."""
        if self.tools or self.environment_factories is not None:
            return  # TRL samples, from what it renders itself
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

    # -- a step --------------------------------------------------------------------------------------------------

    def make_batch(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        self.batch = self.batches.make(rows)
        return self.batch

    def minibatches(self, trained: MicroBatch) -> list[MicroBatch]:
        return self.batches.minibatches(trained)

    def micro_batch_loss(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        return self.loss.of(model, batch)

    def describe_rows(self, inputs: MicroBatch) -> list[dict[str, Any]]:
        return trained_records(inputs, self.prompts, self.batch.scored, self.processing_class)

    # -- training and evaluation ---------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        # Adapters are in float32; under autocast PEFT's cast of their inputs to that, and autocast's cast back, are two
        # copies of every activation for the same numbers.
        with disable_input_dtype_casting(self.model, active=self.accelerator.mixed_precision != "no"):
            return super().train(*args, **kwargs)

    @raise_on_all_ranks(exchange=False)
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measure the model by the evaluator, in place of TRL's evaluation, which changes the random state."""
        if self.evaluator is None:
            raise ConfigError("this trainer was given no evaluator to evaluate with")
        if eval_dataset is not None or ignore_keys is not None:
            raise ConfigError("evaluate measures the rows of the evaluator: leave out eval_dataset and ignore_keys")
        with (
            memory_for("evaluation", evaluation_advice, self.args),
            torch.no_grad(),
            self.sampler.model_to_generate() as model,
        ):
            found = self.evaluator(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        Trainer.log(self, dict(metrics))  # not TRL's, which would spend the training metrics gathered so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _name_only(name: str):
    """A stand-in that gives TRL a reward's series name; the suite does the scoring."""

    def stand_in(**_: Any):
        raise RuntimeError(f"reward {name!r} is scored by the suite, not by TRL")

    stand_in.__name__ = name
    return stand_in
