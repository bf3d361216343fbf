"""What a model earns on rows of the evaluation with the tools or the environment that it is trained with.

The loop is that of training: TRL renders the prompts, samples at the temperature of training and runs the calls, and
the rewards of training score what comes out. The evaluation after training decodes without them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlseq.scoring.calls.isolation import kept_random_states
from rlseq.training.environment import load_environment
from rlseq.training.rollouts import RolloutBatch
from rlseq.training.trl.batch.rollouts import RolloutSampler
from rlseq.training.trl.batch.scoring import RewardScorer
from rlseq.types import Prompt


def rewards_with_tools(trainer: Any, prompts: Sequence[Prompt], *, seed: int) -> Tensor:
    """The reward of one rollout of each of R prompts, and leave the run as it was.

    Every process calls it; each samples its share, and all get all rewards.

    Args:
        trainer: with tools or an environment; its model is measured as it is.
        prompts: other ones than those of training.
        seed: of the sampling: the same before and after training.

    Returns:
        (R, rewards), the values of the suite's rewards and last their weighted total, NaN where one abstained.
    """
    prompts, accelerator = list(prompts), trainer.accelerator
    per_process = trainer.args.per_device_train_batch_size
    size = per_process * accelerator.num_processes
    first = accelerator.process_index * per_process
    device = accelerator.device
    found = []
    with (
        kept_random_states([] if device.type == "cpu" else [device], device.type),
        _as_evaluation(trainer, prompts),
    ):
        torch.manual_seed(seed + accelerator.process_index)
        sampler, scorer = (
            RolloutSampler(trainer, prompts, trainer.metrics),
            RewardScorer(trainer, prompts, trainer.suite),
        )
        for start in range(0, len(prompts), size):
            # Every process samples as often as the others: beyond the last row, the first one again.
            places = [i if i < len(prompts) else 0 for i in range(start + first, start + first + per_process)]
            rows = [{"index": place, "prompt": copy.deepcopy(prompts[place].prompt)} for place in places]
            batch = RolloutBatch(rows, first, 1)
            batch.asked = sampler.ask(rows)
            sampler.complete(batch)
            values = scorer.score(batch)
            found.append(torch.cat([values, batch.totals[:, None]], 1))
    return torch.cat(found)[: len(prompts)].cpu()


@contextmanager
def _as_evaluation(trainer: Any, prompts: list[Prompt]) -> Iterator[None]:
    """A trainer in eval mode, its environments reset by these prompts, and what it gathers for the log put back."""
    names = ("num_generations_eval", "_metrics", "environments", "_environment_pool", "environment_factories")
    kept = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    training = trainer.model.training
    trainer.num_generations_eval = 1
    trainer._metrics = copy.deepcopy(trainer._metrics)
    if trainer.environment_factories is not None:
        make = load_environment(trainer.args, prompts, trainer.suite)
        trainer.environment_factories, trainer._environment_pool = {None: make}, {None: []}
    trainer.model.eval()
    try:
        yield
    finally:
        trainer.model.train(training)
        trainer._pending_extra_logs.clear()
        trainer._pending_metrics.clear()
        for name, value in kept.items():
            setattr(trainer, name, value)
