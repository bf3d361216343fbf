"""What the reward machinery costs, measured on this machine.

    python benchmarks/rewards.py [--completions 1024] [--repeats 7]

Prints the overhead of `suite.score` per completion (a reward that only returns a constant), for each way to run one,
next to TRL's bare call of a batch function; and what a reward that hangs on 1 of 256 completions with a timeout of 1 s
costs. Targets: under 20 µs per completion in process; under 3 s for the hang. Times are the median of the repeats.
Takes about 20 seconds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rlseq import Rollout, load_rewards
from rlseq.common.tables import render_table

REWARDS = """
def single(completion):
    if completion == "hang":
        while True:
            pass
    return 1.0


def with_columns(completion, prompt, references, completion_ids):
    return 1.0, {"edits": 1}


def batch(prompts, completions, completion_ids, **columns):
    return [1.0] * len(completions)


async def asynchronous(completion):
    return 1.0
"""


def rollouts(count: int) -> list[Rollout]:
    """Completions of 32 tokens, 8 a prompt."""
    ids, mask, logprobs = tuple(range(32)), (True,) * 32, (-0.5,) * 32
    texts = [f"completion number {i} of a prompt" for i in range(count)]
    return [
        Rollout(f"prompt-{i // 8}", i % 8, ids, mask, logprobs, text, text, None, "stop", "sample")
        for i, text in enumerate(texts)
    ]


def median_seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The median wall-clock and CPU time of a call, after one that does not count."""
    call()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    count = args.completions
    some = rollouts(count)
    columns = {"prompt": [f"prompt {i}" for i in range(count)], "references": [["a", "b"]] * count}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rewards.py"
        path.write_text(REWARDS, encoding="utf-8")
        ways = {
            "one at a time, completion alone": f"{path}:single",
            "one at a time, columns and details": f"{path}:with_columns",
            "TRL's batch": f"{path}:batch",
            "async": f"{path}:asynchronous",
            "cached, all known": {"func": f"{path}:single", "cache": f"{folder}/cache.sqlite"},
            "1 worker process, timeout 1 s": {"func": f"{path}:single", "timeout": 1},
        }
        print(
            f"{count} completions, median of {args.repeats}; Python {platform.python_version()}, {platform.machine()}"
        )
        measured, rows = {}, []
        for way, spec in ways.items():
            with load_rewards([spec]) as suite:
                wall, cpu = median_seconds(lambda suite=suite: suite.score(some, columns), args.repeats)
            measured[way] = cpu / count * 1e6
            rows.append((way, f"{wall / count * 1e6:.1f}", f"{measured[way]:.1f}"))
        print(render_table(rows, ("µs per completion", "wall", "CPU"), right=(1, 2)))
        hang = hang_seconds(f"{path}:single")
    in_process = max(measured[way] for way in list(ways)[:3])
    print(f"\nhang on 1 of 256, timeout 1 s: {hang:.2f} s")
    met = in_process < 20 and hang < 3
    print(f"targets {'met' if met else 'MISSED'}: {in_process:.1f} < 20 µs in process, {hang:.2f} < 3 s for the hang")
    return 0 if met else 1


def hang_seconds(spec: str) -> float:
    """Seconds to score 256 completions, one of which hangs; the worker's start is part of it."""
    some = rollouts(256)
    some[100] = Rollout("prompt-12", 4, (1,), (True,), (0.0,), "hang", "hang", None, "stop", "sample")
    with load_rewards([{"func": spec, "timeout": 1, "on_error": "abstain"}]) as suite:
        start = time.perf_counter()
        table = suite.score(some, {"prompt": ["p"] * 256})
        seconds = time.perf_counter() - start
    if table.failure_counts["single"]["timeout"] != 1:
        raise RuntimeError(f"expected one timeout, got {table.failure_counts}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
