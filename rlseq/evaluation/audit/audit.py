"""An audit of a run: from its rollout log to verdicts, shares of the advantages, drift, and completions to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlseq.common.formats import RUN_CONFIG
from rlseq.errors import RewardError
from rlseq.evaluation.audit.trends import (
    LEVEL,
    PAIRS,
    THIRDS,
    Change,
    Mean,
    Trends,
    Verdict,
    find_trends,
    split_steps,
    verdicts,
)
from rlseq.types import transcript

OPTIMISED = "optimised reward"
LENGTH, REPETITION = "tokens", "repeated 4-grams"
NGRAM = 4
EXAMPLES = 5


@dataclass(frozen=True)
class Audit:
    """What an audit finds.

    Attributes:
        rollouts: how many have a reward.
        trends: of the optimised reward, its components, the held-out rewards, length and repetition.
        components: the rewards that were optimised.
        held_out: those that were not.
        shares: component -> its share of the variance of the optimised reward within groups, by third: what part of
            the advantages it makes; they add up to 1. Empty where the weights do not give the logged rewards.
        verdicts: the test, by held-out reward and pair of thirds.
        examples: held-out reward -> completions of the last third that gained most while it fell.
    """

    rollouts: int
    trends: Trends
    components: tuple[str, ...]
    held_out: tuple[str, ...]
    shares: dict[str, list[float]]
    verdicts: list[Verdict]
    examples: dict[str, list[dict[str, Any]]]

    @property
    def alarms(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.alarm]

    def as_json(self) -> dict[str, Any]:
        """All numbers, as `rlseq audit --json` prints them."""
        trends = self.trends
        return {
            "alarm": bool(self.alarms),
            "level": LEVEL,
            "rollouts": self.rollouts,
            "prompts": trends.prompts,
            "components": list(self.components),
            "held_out": list(self.held_out),
            "verdicts": [
                {"held_out": v.held_out, "from": THIRDS[v.pair[0]], "to": THIRDS[v.pair[1]]}
                | {"p": v.p, "adjusted_p": v.adjusted_p, "alarm": v.alarm}
                for v in self.verdicts
            ],
            "steps": [list(range_) for range_ in trends.steps],
            "thirds": [list(range_) for range_ in trends.thirds],
            "by_step": {name: [_mean(mean) for mean in means] for name, means in trends.by_bin.items()},
            "by_third": {name: [_mean(mean) for mean in means] for name, means in trends.by_third.items()},
            "changes": {
                name: [
                    {"from": THIRDS[a], "to": THIRDS[b], **_change(change)}
                    for (a, b), change in zip(PAIRS, changes, strict=True)
                ]
                for name, changes in trends.changes.items()
            },
            "shares_of_advantages": self.shares,
            "examples": self.examples,
        }


def audit(
    records: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
    held_out: Mapping[str, Sequence[float | None]] | None = None,
) -> Audit:
    """Audit the rollouts of a log.

    Args:
        records: of the log; those without a total are left out.
        weights: of the logged rewards. A reward of weight 0 was not optimised, and is held out; one that is not named
            here has weight 1.
        held_out: name -> the value of every record, of rewards that the run did not have.

    Raises:
        RewardError: fewer than three steps have rollouts with a reward.
    """
    there = [row for row, record in enumerate(records) if record.get("total") is not None]
    steps = np.array([int(records[row].get("step") or 0) for row in there])
    if len(np.unique(steps)) < 3:
        raise RewardError(
            f"the rollouts with a reward are of {len(np.unique(steps))} steps; an audit compares thirds of a run, and "
            "needs 3 steps at least"
        )
    shown = [records[row] for row in there]
    names = list(dict.fromkeys(name for record in shown for name in record.get("values") or {}))
    logged = {name: _floats([(record.get("values") or {}).get(name) for record in shown]) for name in names}
    components = tuple(name for name in names if weights.get(name, 1.0) != 0)
    apart = {name: logged[name] for name in names if name not in components}
    for name, values in (held_out or {}).items():
        apart[_unused(name, {*logged, *apart})] = _floats([values[row] for row in there])
    keys = [str(record.get("prompt_key", record.get("prompt"))) for record in shown]
    _, prompts = np.unique(keys, return_inverse=True)
    total = _floats([record["total"] for record in shown])
    columns = {OPTIMISED: total}
    columns |= {name: logged[name] for name in components} if len(components) > 1 else {}
    columns |= apart
    columns |= {LENGTH: _floats([record.get("length") for record in shown])}
    columns |= {REPETITION: _floats([repeated_share(record) for record in shown])}
    trends = find_trends(columns, steps, prompts)
    third = split_steps(steps, 3)
    weighted = {name: weights.get(name, 1.0) * logged[name] for name in components}
    return Audit(
        rollouts=len(there),
        trends=trends,
        components=components,
        held_out=tuple(apart),
        shares=_shares(weighted, total, np.stack([steps, prompts]), third),
        verdicts=verdicts(trends, OPTIMISED, tuple(apart)),
        examples={name: _examples(shown, total, values, third) for name, values in apart.items()},
    )


def weights_of(run: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The weights of a run's rewards by name, from its config.yaml; empty where it has none (each is 1)."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    RUN_CONFIG.check(config, path)
    specs = config.get("reward_funcs") or []
    given = [float(spec.get("weight", 1.0)) if isinstance(spec, Mapping) else 1.0 for spec in specs]
    given = [float(weight) for weight in config.get("reward_weights") or given]
    names = next((list(record["values"]) for record in records if record.get("values")), [])
    return dict(zip(names, given, strict=True)) if len(names) == len(given) else {}


def repeated_share(record: Mapping[str, Any]) -> float | None:
    """The share of a completion's 4-grams of tokens that are repetitions; None below 4 tokens or without ids."""
    ids = record.get("completion_ids") or []
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


def _shares(
    parts: Mapping[str, np.ndarray], total: np.ndarray, groups: np.ndarray, third: np.ndarray
) -> dict[str, list[float]]:
    """Covariance of each part with the total within groups over the variance of the total, by third."""
    whole = np.logical_and.reduce([~np.isnan(part) for part in parts.values()]) if parts else np.zeros(0, bool)
    if not whole.any() or not np.allclose(sum(part[whole] for part in parts.values()), total[whole], atol=1e-6):
        return {}
    _, group = np.unique(groups, axis=1, return_inverse=True)  # (2, N): step and prompt
    group, third = group.ravel()[whole], third[whole]
    around = {name: _centred(part[whole], group) for name, part in parts.items()}
    advantage = _centred(total[whole], group)
    shares: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(3):
        chosen = third == i
        variance = float(advantage[chosen] @ advantage[chosen])
        for name, part in around.items():
            shares[name].append(float(part[chosen] @ advantage[chosen]) / variance if variance else float("nan"))
    return shares


def _centred(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    means = np.bincount(group, values) / np.maximum(1, np.bincount(group))
    return values - means[group]


def _examples(
    records: Sequence[Mapping[str, Any]], total: np.ndarray, held_out: np.ndarray, third: np.ndarray
) -> list[dict[str, Any]]:
    """Completions of the last third above the first third's mean reward and below its mean held-out reward.

    In the order of the smaller of both distances, in standard deviations over the run.
    """
    early = third == 0
    if np.isnan(held_out[early]).all():
        return []
    gained = (total - total[early].mean()) / (total.std() or np.nan)
    lost = (np.nanmean(held_out[early]) - held_out) / (np.nanstd(held_out) or np.nan)
    both = np.where(third == 2, np.minimum(gained, lost), np.nan)
    found, texts = [], Counter()
    for row in np.argsort(-np.nan_to_num(both, nan=-np.inf), kind="stable"):
        record = records[row]
        if not both[row] > 0 or len(found) == EXAMPLES:
            break
        texts[record["completion"]] += 1
        if texts[record["completion"]] > 1:
            continue
        known: dict[str, Hashable] = {name: record.get(name) for name in ("step", "sample", "prompt_key")}
        known |= {"reward": float(total[row]), "held_out": float(held_out[row])}
        found.append(known | {"prompt": transcript(record["prompt"]), "completion": record["completion"]})
    return found


def _unused(name: str, taken: set[str]) -> str:
    return name if name not in taken else _unused(f"{name} (held out)", taken)


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in values])


def _mean(mean: Mean) -> dict[str, Any]:
    return {"value": mean.value, "ci95": list(mean.ci95)}


def _change(change: Change) -> dict[str, Any]:
    known = {"difference": change.difference, "ci95": list(change.ci95)}
    return {**known, "p_rise": change.p_rise, "p_fall": change.p_fall}
