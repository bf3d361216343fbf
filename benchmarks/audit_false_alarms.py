"""How often `rlseq audit` raises the alarm where held-out rewards are controls that cannot have fallen.

    python benchmarks/audit_false_alarms.py --runs 1000 [--run RUN ...]

Controls: `coin`, a coin per rollout; `group coin`, one coin per group of a prompt, to which three of four rollouts
keep; `another row's reward`, the optimised reward of the rollouts of another group of the run, any step. Each synthetic
run is audited with one of them and with all three at once; its optimised reward rises, so that an alarm needs the
control alone. With --run, the controls stand beside the rewards of a real run, again and again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlseq.common.tables import render_table
from rlseq.evaluation.audit.trends import LEVEL, find_trends, verdicts
from rlseq.scoring.replay import read_rollouts

REWARD = "reward"
CONTROLS = ("coin", "group coin", "another row's reward")
SIZES = ((12, 4, 4, 48), (30, 8, 8, 240), (30, 8, 8, 40), (100, 4, 4, 400))  # steps, prompts a step, samples, prompts


def synthetic(
    rng: np.random.Generator, steps: int, prompts: int, samples: int, distinct: int
) -> tuple[np.ndarray, ...]:
    """(N,) steps, prompts, groups and optimised rewards: a prompt's difficulty, noise, and a rise over the run."""
    groups = np.repeat(np.arange(steps * prompts), samples)
    step = groups // prompts
    prompt = rng.permutation(np.arange(steps * prompts) % distinct)[groups]
    reward = 1 / (1 + np.exp(-(rng.normal(size=distinct)[prompt] + 2 * step / steps + rng.normal(size=len(groups)))))
    return step, prompt, groups, reward


def controls(rng: np.random.Generator, groups: np.ndarray, reward: np.ndarray) -> dict[str, np.ndarray]:
    """The values of the controls, (N,) each."""
    count = int(groups.max()) + 1
    own = rng.integers(0, 2, len(groups)).astype(float)
    shared = rng.integers(0, 2, count).astype(float)[groups]
    order = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[order], np.arange(count))
    sizes = np.bincount(groups)
    other = rng.permutation(count)[groups]
    sample = np.empty(len(groups), dtype=int)
    sample[order] = np.arange(len(groups)) - first[groups[order]]
    another = reward[order[first[other] + sample % sizes[other]]]
    return dict(zip(CONTROLS, (own, np.where(rng.random(len(groups)) < 0.75, shared, own), another), strict=True))


def alarms(steps: np.ndarray, prompts: np.ndarray, reward: np.ndarray, found: dict[str, np.ndarray]) -> list[bool]:
    """Whether each control alone raises the alarm, then whether any does where all are held out together."""
    trends = find_trends({REWARD: reward, **found}, steps, prompts, bins=3)
    alone = [any(verdict.alarm for verdict in verdicts(trends, REWARD, [name])) for name in found]
    return [*alone, any(verdict.alarm for verdict in verdicts(trends, REWARD, list(found)))]


def rates(make: Callable[[int], tuple[np.ndarray, ...]], runs: int) -> list[str]:
    """The share of alarms of each control and of all together, with its 95% Wilson interval."""
    counts = np.zeros(len(CONTROLS) + 1, dtype=int)
    for seed in range(runs):
        steps, prompts, groups, reward = make(seed)
        counts += alarms(steps, prompts, reward, controls(np.random.default_rng([seed, 1]), groups, reward))
    return [_wilson(int(count), runs) for count in counts]


def _wilson(count: int, n: int, z: float = 1.96) -> str:
    share = count / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{share:.1%} ({max(0.0, low):.1%} to {high:.1%})"


def logged(run: Path) -> tuple[np.ndarray, ...]:
    """Steps, prompts, groups and optimised rewards of a run's log."""
    records = [record for record in read_rollouts(run).records if record.get("total") is not None]
    steps = np.array([record["step"] for record in records])
    _, prompts = np.unique([record["prompt_key"] for record in records], return_inverse=True)
    _, groups = np.unique(np.stack([steps, prompts]), axis=1, return_inverse=True)
    return steps, prompts, groups.ravel(), np.array([float(record["total"]) for record in records])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="Synthetic runs of each size.")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="Run directories of real runs.")
    parser.add_argument("--repeats", type=int, default=200, help="Controls drawn beside each real run.")
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        made = rates(lambda seed, size=size: synthetic(np.random.default_rng([seed, 0]), *size), args.runs)
        rows.append([f"{size[0]} steps, {size[0] * size[1] * size[2]:,} rollouts, {size[3]} prompts", *made])
    for run in args.run:
        real = logged(run)
        rows.append([f"{run.name}, {len(real[0]):,} rollouts", *rates(lambda _, real=real: real, args.repeats)])
    print(f"Alarms at a level of {LEVEL:.0%}, with 95% intervals")
    print(render_table(rows, ["run", *CONTROLS, "all three"], right=range(1, 5)))


if __name__ == "__main__":
    main()
