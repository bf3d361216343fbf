"""The rollouts of one batch on their way from the sampler to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlseq.data.groups import group_name, rows_by_group
from rlseq.scoring.suite import PendingScores
from rlseq.training.update.forward import Ids
from rlseq.types import Prompt, Rollout, ScoredRollout


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B rollouts as an update reads them: token ids as they were sampled, ragged, and numbers of rows and tokens.

    Log-probs are in nats. T is the longest completion of the batch that the rows are of; what stands in a (B, T) after
    a completion's end has no meaning.

    Attributes:
        prompt_index: of each row, the index of its prompt.
        prompt_ids: B prompts.
        completion_ids: B completions; None where an objective samples none.
        mask: (B, T) bool, the tokens that are trained.
        advantages: (B,) or (B, T).
        sampled_logprobs: (B, T), under what sampled; NaN where it gave none. None where it gives none at all.
        old_logprobs: (B, T), of the policy that sampled; None where that is the policy itself.
        ref_logprobs: (B, T), of the reference; None without.
        teacher_states: (B, T, H), the teacher's last hidden state before each token; None without a teacher.
        importance_ratio: (B, T) or (B, 1), policy over vLLM; None without that correction.
        trained_tokens: how many tokens the whole batch trains, on all processes.
        values, returns, value_mask: (B, T), what the critic said, is to say, and where it learns; None without one.
        totals: (B,) rewards, NaN where every reward abstained; None where the objective reads none.
        is_reference, num_rest, rest_reward: (B,), of the objective reference_exact; None for others.
        reference_rewards: of each row, what its prompt's references earn, NaN where every reward abstained; None where
            the objective reads none.
    """

    prompt_index: tuple[int, ...]
    prompt_ids: tuple[Ids, ...]
    completion_ids: tuple[Ids, ...] | None = None
    mask: Tensor | None = None
    advantages: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_states: Tensor | None = None
    importance_ratio: Tensor | None = None
    trained_tokens: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None
    totals: Tensor | None = None
    is_reference: Tensor | None = None
    num_rest: Tensor | None = None
    rest_reward: Tensor | None = None
    reference_rewards: tuple[tuple[float, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt_index)

    def select(self, rows: Sequence[int]) -> MicroBatch:
        """These rows, in this order."""
        rows = list(rows)

        def of_rows(value: Any) -> Any:
            if torch.is_tensor(value):
                return value[rows] if value.ndim else value
            return value if value is None else tuple(value[row] for row in rows)

        return MicroBatch(**{name: of_rows(value) for name, value in self.as_dict().items()})

    def to(self, device: torch.device) -> MicroBatch:
        """The same with all tensors on a device."""
        return MicroBatch(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in self.as_dict().items()})

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


def group_rewards(prompts: Sequence[Prompt], indices: Sequence[int], totals: Tensor, column: str) -> dict[str, float]:
    """By name of a metric, the mean reward and the number of the rollouts of each group of `rlseq.data.groups`.

    Args:
        prompts: those of the run.
        indices, totals: of B rollouts, the index of the prompt, and (B,) rewards, NaN where every reward abstained.
    """
    metrics: dict[str, float] = {}
    for value, places in rows_by_group([prompts[index] for index in indices], column):
        name, mine = group_name(value), totals[places]
        metrics[f"group/{name}/rollouts"] = float(len(places))
        metrics[f"group/{name}/reward"] = mine.nanmean().item()
    return metrics


@dataclass
class RolloutBatch:
    """The B rollouts that this process samples at a time, filled in stage by stage.

    "All processes" have N·B rollouts, process 0's first; the groups of a prompt are contiguous there.

    Attributes:
        rows: B rows of the data set, one per rollout: `index` of the prompt, and `prompt` as the user wrote it.
        first: the place of the first of them among those of all processes.
        group_size: G, the rollouts of a prompt.
        asked: B prompts as the model was asked them: an environment may have added to the row's.
        prompt_ids: B prompts as they were continued.
        rollouts: B.
        completions: B, as TRL shows them: texts or messages.
        logprobs: of B completions, under what sampled them; None where it gives none.
        pending: rewards that score in other processes while log-probs are computed; None where none does.
        scored: B rollouts with values, statuses and totals.
        told: of B rollouts, the columns that a `rollout_func` or an environment adds, for rewards and log.
        failures: on how many completions of all processes a reward failed or abstained, by the name of the log.
        totals: (N·B,) rewards of all processes, NaN where every reward abstained.
        greedy: prompt index -> its greedy completion, where its reward is the baseline.
        greedy_totals: (N·B,) reward of each rollout's greedy completion, likewise; None without that baseline.
        trained: what the updates read, all B rows; micro-batches are rows of it. None until there are completions.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    first: int = 0
    group_size: int = 1
    asked: list[Any] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    logprobs: list[list[float | None]] | None = None
    pending: PendingScores | None = None
    scored: list[ScoredRollout] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, float] = field(default_factory=dict)
    totals: Tensor = field(default_factory=lambda: torch.empty(0))
    greedy: dict[int, Rollout] = field(default_factory=dict)
    greedy_totals: Tensor | None = None
    trained: MicroBatch | None = None

    @property
    def indices(self) -> list[int]:
        """Of each rollout, the index of its prompt."""
        return [row["index"] for row in self.rows]

    @property
    def samples(self) -> list[int]:
        """Of each rollout, which of its prompt's samples it is; a group may straddle processes."""
        return [(self.first + i) % self.group_size for i in range(len(self.rows))]

    @property
    def groups(self) -> Tensor:
        """Totals of all processes as groups, (P, G)."""
        return self.totals.view(-1, self.group_size)

    def local(self, over_all_processes: Tensor) -> Tensor:
        """This process's rows of a tensor of all processes' rows."""
        return over_all_processes[self.first : self.first + len(self.rows)]
