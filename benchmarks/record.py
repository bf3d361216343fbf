"""Five short runs and what they make: a change that is not to change results makes the same.

    python benchmarks/record.py write runs/record/before.json
    python benchmarks/record.py write runs/record/after.json --only grpo evaluate
    python benchmarks/record.py compare runs/record/before.json runs/record/after.json
    python benchmarks/record.py write tests/recipes/record.json --values     # the record that a test compares with

The runs are GRPO, PPO and teacher forcing on the grapheme task, an evaluation of its bundled base, and three steps of
GRPO with LoRA on the real model of `make model` (in float32; left out where the model is not there). Each is a recipe
with one thread, about a minute of CPU. A record has of each run:

- `values`: what was logged or measured, except times, and of the first completions their log-probs and totals;
- `completions`: token ids of the first ones, of an evaluation their texts;
- `digests`: of the weights and of all rollouts.

`compare` says "bit for bit equal" where all three are, else what differs and the largest difference. Digests are of one
machine and one build of torch; `--values` leaves them out, and keeps 9 digits of a value. The exit status is 1 if
completions differ, or a value by more than --tolerance (relative to it where it is above 1).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TRAIN = "--eval_strategy no"
RUNS = {
    "grpo": f"grpo --config recipes/g2p/grpo.yaml --max_steps 3 --save_steps 3 --no_evaluate {TRAIN}",
    "ppo": f"ppo --config recipes/g2p/ppo.yaml --max_steps 2 --save_steps 2 --no_evaluate {TRAIN}",
    "sft": f"sft --config recipes/g2p/sft-continued.yaml --max_steps 3 --save_steps 3 --logging_steps 1 {TRAIN}",
    "evaluate": "evaluate --config recipes/g2p/evaluate.yaml --models base=recipes/g2p/half-base --eval_rows 60",
    # Cut at 24 tokens no object is complete, which json_fields gives 0: another reward, so that there is a gradient.
    "extraction": f"grpo --config recipes/extraction/grpo.yaml --max_steps 3 --save_steps 3 --no_evaluate {TRAIN} "
    "--dtype float32 --bf16 false --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 24 "
    "--reward_funcs token_f1",
}
NEEDS = {"extraction": "models/smollm2-135m-instruct"}
FIRST = 3  # completions of a round, or of a strategy, that a record has
CLOCK = ("time", "per_second", "memory")  # within the names of what a clock or a machine decides
LEFT_OUT = ("step", "epoch", "total_flos", "format_version")
DIGITS = 9  # of a value in a record without digests
Record = dict[str, Any]


def record(name: str, folder: Path) -> Record:
    """Make one run in a folder, and say what it made.

    Raises:
        SystemExit: the recipe failed; with the end of what it printed.
    """
    recipe, *settings = RUNS[name].split()
    words = [sys.executable, f"recipes/{recipe}.py", *settings, "--output_dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{name} failed with status {ended.returncode}:\n{(ended.stdout + ended.stderr)[-2000:]}")
    return of_evaluation(folder) if recipe == "evaluate" else of_training(folder)


def of_training(folder: Path) -> Record:
    """The record of a training run."""
    logged = read_jsonl(folder / "metrics.jsonl")
    steps = [
        {key: value for key, value in line.items() if key not in LEFT_OUT and not any(word in key for word in CLOCK)}
        for line in logged
    ]
    names = [f"step {line['step']}{' summary' if 'summary' in line else ''}" for line in logged]
    values = dict(zip(names, steps, strict=True))
    rounds = {file.stem: read_jsonl(file) for file in sorted((folder / "rollouts").glob("*.jsonl"))}
    digests = {file.name: digest(file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))}
    for name, rollouts in rounds.items():
        made = [[r[key] for key in ("completion_ids", "logprobs", "values", "total", "advantage")] for r in rollouts]
        digests[f"rollouts {name}"] = digest(json.dumps(made).encode())
        values[f"rollouts {name}"] = {key: [r[key] for r in rollouts[:FIRST]] for key in ("logprob", "total")}
    ids = {name: [r["completion_ids"] for r in rollouts[:FIRST]] for name, rollouts in rounds.items()}
    return {"values": numbers(values), "completions": ids, "digests": digests}


def of_evaluation(folder: Path) -> Record:
    """The record of an evaluation."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    samples = read_jsonl(folder / "samples.jsonl")
    by_strategy: dict[str, list[Any]] = {}
    for sample in samples:
        by_strategy.setdefault(sample["strategy"], []).append(sample["completion"])
    ids = {strategy: found[:FIRST] for strategy, found in by_strategy.items()}
    return {
        "values": numbers(results["models"]),
        "completions": ids,
        "digests": {"samples": digest(json.dumps(by_strategy).encode())},
    }


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """The numbers of nested dicts and lists by their path."""
    if isinstance(value, Mapping):
        pairs: Any = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {path: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
    return {name: number for key, part in pairs for name, number in numbers(part, f"{path} {key}".strip()).items()}


def values_only(made: Record) -> Record:
    """A record without what other machines make otherwise: digests, and digits that float32 does not hold."""
    return made | {"values": {key: float(f"{x:.{DIGITS}g}") for key, x in made["values"].items()}, "digests": {}}


def as_text(found: Mapping[str, Record]) -> str:
    """Records as JSON with a line for each value and each list of completions, for `git diff`."""
    runs = []
    for name, made in found.items():
        parts = []
        for part, held in made.items():
            lines = ",".join(f"\n{json.dumps(key)}: {json.dumps(value)}" for key, value in held.items())
            parts.append(f"{json.dumps(part)}: {{{lines}\n}}")
        runs.append(f"{json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n}")
    return "{\n" + ",\n".join(runs) + "\n}\n"


def differences(one: Record, two: Record, tolerance: float) -> Iterator[tuple[bool, str]]:
    """(whether it is beyond the tolerance, what differs) of two records of a run."""
    if one["completions"] != two["completions"]:
        names = [name for name in one["completions"] | two["completions"] if _of(one, name) != _of(two, name)]
        yield True, f"other completions: {', '.join(names)}"
    apart = sorted(one["values"].keys() ^ two["values"].keys())
    if apart:
        yield True, f"only in one record: {', '.join(apart[:5])}{', ...' if len(apart) > 5 else ''}"
    both = [(key, x, two["values"][key]) for key, x in one["values"].items() if key in two["values"]]
    unequal = [(distance(x, y), key, x, y) for key, x, y in both if not same(x, y)]
    if unequal:
        most, key, x, y = max(unequal)
        said = f"{len(unequal)} of {len(both)} values differ, at most by {most:.2g} ({key}: {x!r} and {y!r})"
        yield most > tolerance, said
    if one["digests"] and two["digests"] and one["digests"] != two["digests"]:
        names = [k for k in one["digests"] | two["digests"] if one["digests"].get(k) != two["digests"].get(k)]
        yield tolerance == 0, f"other bits: {', '.join(names)}"


def _of(record: Record, name: str) -> Any:
    return record["completions"].get(name)


def same(x: float, y: float) -> bool:
    return x == y or (math.isnan(x) and math.isnan(y))


def distance(x: float, y: float) -> float:
    """The difference, relative to the larger of the two where that is above 1; infinite if one is not finite."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    return abs(x - y) / max(1.0, abs(x), abs(y))


def compare(one: Mapping[str, Record], two: Mapping[str, Record], tolerance: float = 0.0) -> tuple[bool, list[str]]:
    """Whether two records agree on the runs that both have, and a line for each run."""
    shared = [name for name in one if name in two]
    lines, agree = [], bool(shared)
    for name in shared:
        found = list(differences(one[name], two[name], tolerance))
        agree &= not any(beyond for beyond, _ in found)
        equal = "bit for bit equal" if one[name]["digests"] and two[name]["digests"] else "equal in every value"
        lines.append(f"{name}: {'; '.join(said for _, said in found) or equal}")
    lines += [f"{name}: only in one record" for name in one.keys() ^ two.keys()]
    return agree, lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="make the runs, and write their record")
    write.add_argument("file", type=Path)
    write.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    write.add_argument("--values", action="store_true", help="leave out the digests, which are of this machine")
    both = commands.add_parser("compare", help="compare two records")
    both.add_argument("files", nargs=2, type=Path)
    both.add_argument("--tolerance", type=float, default=0.0)
    args = parser.parse_args(argv)
    if args.command == "compare":
        agree, lines = compare(*(json.loads(file.read_text(encoding="utf-8")) for file in args.files), args.tolerance)
        print("\n".join(lines))
        return 0 if agree else 1
    found = {}
    for name in args.only:
        if name in NEEDS and not (ROOT / NEEDS[name]).exists():
            print(f"{name}: left out, there is no {NEEDS[name]}; make it with: make model")
            continue
        print(f"{name}: {RUNS[name]}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = record(name, Path(folder) / "run")
        if args.values:
            found[name] = values_only(found[name])
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text(as_text(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
