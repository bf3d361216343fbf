"""Per-row statistics of completions: their shape, exact matches, rewards and corpus metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rlseq.evaluation.measure.decode import columns_of
from rlseq.evaluation.measure.references import completion_statistics
from rlseq.evaluation.right_answers import JUDGED, judges_of
from rlseq.evaluation.statistics import COMPLETION, CORPUS, REWARD, RowStatistics, Statistic
from rlseq.scoring import RewardSuite, ScoreTable
from rlseq.scoring.corpus import statistics_of
from rlseq.types import Prompt, Rollout, column_names


def quality_rows(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    references: Sequence[Sequence[tuple[int, ...]]],
    suite: RewardSuite,
) -> tuple[list[RowStatistics], ScoreTable]:
    """Score the completions of each of R rows, and sum over them what `rlseq.evaluation.aggregate` aggregates.

    Args:
        groups: by row its completions; empty where it has none.
        references: by row the distinct references as token ids; empty where there are none.

    Returns:
        R rows of statistics, and the reward table, one line per completion in the order of the rows.
    """
    flat = [(row, rollout) for row, group in enumerate(groups) for rollout in group]
    table = suite.score([rollout for _, rollout in flat], columns_of(prompts, [row for row, _ in flat]))
    statistics: list[RowStatistics] = [{} for _ in prompts]

    judges = judges_of(suite, column_names(prompts))
    right: dict[tuple[int, str], list[bool]] = defaultdict(list)  # of completions with a full reward: is it a reference

    def add(row: int, key: Statistic, value: float) -> None:
        statistics[row][key] = statistics[row].get(key, 0.0) + value

    for (row, rollout), scored in zip(flat, table.scored, strict=True):
        add(row, COMPLETION("samples"), 1)
        add(row, COMPLETION("length"), len(rollout.completion_ids))
        add(row, COMPLETION("truncated"), float(rollout.finish_reason == "length"))
        add(row, COMPLETION("logprob"), rollout.logprob)
        if references[row]:
            add(row, COMPLETION("exact_match"), float(rollout.completion_ids in references[row]))
            add(row, COMPLETION("with_references"), 1)
            for reward in judges:
                if scored.values[reward] == judges[reward]:
                    right[row, reward].append(rollout.completion_ids in references[row])
        for key, value in completion_statistics(rollout.completion_ids, references[row]).items():
            add(row, key, value)
        for reward in suite.names:
            value = scored.values[reward]
            add(row, REWARD("sum", reward), value or 0.0)
            add(row, REWARD("count", reward), float(value is not None))
            add(row, REWARD("failed", reward), float(scored.status[reward] not in ("ok", "abstained")))
        for given, metric in suite.corpus.items():
            found = statistics_of(given, metric, scored.details[metric.reward])
            add(row, CORPUS("count", given), float(found is not None))
            for key, value in zip(metric.statistics, found or (), strict=found is not None):
                add(row, CORPUS("sum", given, key), value)
    for (row, reward), listed in right.items():
        add(row, JUDGED("right", reward), 1.0)
        add(row, JUDGED("unlisted", reward), float(not all(listed)))
    return statistics, table
