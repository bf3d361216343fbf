"""What an evaluation costs, said before anything is decoded: completions and scored sequences, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState
from tqdm import tqdm

from rlseq.common.tables import render_table
from rlseq.engine.strategies import Beam, Rerank, Sample, Strategy
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.studies.table import STUDIES, studied_rows
from rlseq.types import Prompt

LIKELIHOOD = "likelihood of references"
BEHIND_THOUGHTS = "references behind thoughts"


@dataclass(frozen=True)
class Cost:
    """What a part of an evaluation costs for one model, at most.

    Attributes:
        completions: that are decoded; the hypotheses of a beam count each.
        scored: sequences (or prefixes, in exact search) that a forward pass scores.
    """

    completions: int = 0
    scored: int = 0


def costs(
    settings: ContrastSettings, prompts: Sequence[Prompt], tuning_prompts: Sequence[Prompt] = ()
) -> dict[str, Cost]:
    """By part its cost for one model on these rows: likelihood, tuning, strategies, thoughts, studies."""
    rows, parts = len(prompts), {LIKELIHOOD: Cost(0, _references(prompts))}
    if tuning_prompts:
        members = {one.spec: one for s in settings.parsed() if len(s.members) > 1 for one in s.members}
        tried = [strategy_cost(one, len(tuning_prompts), settings) for one in members.values()]
        scored = _references(tuning_prompts) + sum(cost.scored for cost in tried)
        parts[f"tuning on {len(tuning_prompts):,} rows"] = Cost(sum(cost.completions for cost in tried), scored)
    for strategy in settings.parsed():
        parts[strategy.spec] = max(
            (strategy_cost(one, rows, settings) for one in strategy.members), key=lambda cost: cost.completions
        )
    if settings.think_end is not None:
        kept = sum(settings.samples_per_row if s.is_stochastic else 1 for s in settings.parsed())
        parts[BEHIND_THOUGHTS] = Cost(0, kept * _references(prompts))
    for name in settings.studies:
        studied = prompts[: studied_rows(name, range(rows), settings)]
        parts[f"study {name}"] = Cost(*STUDIES[name].cost(len(studied), _references(studied), settings))
    return parts


def strategy_cost(strategy: Strategy, rows: int, settings: ContrastSettings) -> Cost:
    """The cost of decoding rows under a strategy that is not swept."""
    if isinstance(strategy, Beam):
        return Cost(rows * strategy.width)
    if isinstance(strategy, Rerank):  # log-probs of candidates from another distribution are the model's own
        return Cost(rows * strategy.n, 0 if strategy.sampler == Sample() else rows * strategy.n)
    return Cost(rows * (settings.samples_per_row if strategy.is_stochastic else 1))


def describe_costs(
    settings: ContrastSettings, prompts: Sequence[Prompt], models: int, tuning_prompts: Sequence[Prompt] = ()
) -> str:
    """The costs as a table, in all for this number of models."""
    parts = costs(settings, prompts, tuning_prompts)
    total = Cost(sum(c.completions for c in parts.values()), sum(c.scored for c in parts.values()))
    rows = [(part, f"{c.completions:,}", f"{c.scored:,}") for part, c in parts.items()]
    rows.append(("one model", f"{total.completions:,}", f"{total.scored:,}"))
    if models > 1:
        rows.append((f"{models:,} models", f"{models * total.completions:,}", f"{models * total.scored:,}"))
    said = (
        f"evaluation of {len(prompts):,} rows decodes completions of up to {settings.max_new_tokens:,} tokens, and "
        "scores sequences by a forward pass each; at most:"
    )
    return f"{said}\n{render_table(rows, ('part', 'completions', 'sequences scored'), right=range(1, 3))}"


def completions_bar(
    settings: ContrastSettings,
    prompts: Sequence[Prompt],
    tuning_prompts: Sequence[Prompt] = (),
    *,
    models: int = 1,
    quiet: bool = False,
) -> tqdm:
    """One progress bar over all completions of an evaluation, in the first process, which takes its share of rows."""
    state = PartialState()
    mine = [some[state.process_index :: state.num_processes] for some in (prompts, tuning_prompts)]
    total = models * sum(cost.completions for cost in costs(settings, *mine).values())
    return tqdm(total=total, unit=" completions", disable=quiet or not state.is_main_process, leave=False)


def _references(prompts: Sequence[Prompt]) -> int:
    return sum(len(set(prompt.columns.get("references", ()))) for prompt in prompts)
