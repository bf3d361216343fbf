"""Sentences of a report about numbers that are not of everything that they seem to be of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlseq.evaluation.names import Names
from rlseq.evaluation.report import tables
from rlseq.scoring import RewardSuite


def partial_notes(results: Mapping[str, Any], suite: RewardSuite) -> list[str]:
    """A sentence for each corpus metric that is not of all completions: a reward's missing details are no zeros."""
    given = {name: own for own, name in Names.of(suite).corpus.items()}
    notes = []
    for model, entry in (results["models"] | results["methods"]).items():
        for strategy, block in entry["strategies"].items():
            for name, cell in block.items():
                if name not in given or not tables.is_cell(cell) or "completions" not in cell:
                    continue
                metric = suite.corpus[given[name]]
                notes.append(
                    f"{results['metrics'][name]['label']} of {model} under {strategy} is of {cell['completions']:,} of "
                    f"{cell['of']:,} completions: on the others the details of reward {metric.reward} lack "
                    f"{' or '.join(metric.statistics)}."
                )
    return notes
