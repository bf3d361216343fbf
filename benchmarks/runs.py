"""Runs over seeds, with their controls, and one table of each evaluation: what a recipe's claims stand on.

    python benchmarks/runs.py recipes/extraction/runs.yaml                        # all that is missing
    python benchmarks/runs.py recipes/extraction/runs.yaml --only reward --seeds 0 1
    python benchmarks/runs.py recipes/extraction/runs.yaml --table               # of the runs that are there

The file names a start, runs (recipe, configuration, settings, seeds) and evaluations (settings of recipes/evaluate.py):

    output_dir: runs/extraction-table
    start: models/smollm2-135m-instruct
    evaluations:
      harder: {config: recipes/extraction/evaluate.yaml, eval_split: harder}
    runs:
      reward: {recipe: grpo, config: recipes/extraction/grpo.yaml, seeds: [0, 1, 2]}
      constant: {recipe: grpo, config: recipes/extraction/grpo.yaml, reward_funcs: [constant], seeds: [0, 1, 2]}
    others:                                  # the start under other settings of evaluations, for example other prompts
      few_shot: {dataset_name: recipes/extraction/few_shot.py}
    columns: [exact_objects:greedy, nll_per_token]

Every run and every evaluation is a command of its own, which is printed. What is there is not made again; a run that
was stopped resumes at its last checkpoint, so that a table may take several sittings. Two calls at once share the work:
each takes what no other is at. Evaluations are joined by `--compare`: differences to the start are paired by rows, with
95% intervals over rows and seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

ROOT = Path(__file__).parent.parent


def command(recipe: str, settings: dict[str, Any]) -> list[str]:
    """The command line of a recipe with these settings; a setting that is None is left out."""
    words = [sys.executable, f"recipes/{recipe}.py"]
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process is at this folder; none will be within the block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def execute(words: list[str], log: Path, threads: int = 1) -> None:
    print(f"$ {shlex.join(words)}   > {log}", flush=True)
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        ended = subprocess.run(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        sys.exit(f"exit code {ended.returncode}; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}")


def train(folder: Path, settings: dict[str, Any], threads: int) -> bool:
    """Make a run, or finish it; return False where another process is at it."""
    done = folder.with_name(f"{folder.name}.done")
    with claimed(folder) as mine:
        if not mine:
            return False
        if not done.is_file():
            settings = {**settings, "output_dir": str(folder), "evaluate": False}
            recipe = settings.pop("recipe")
            if recipe == "sft":
                del settings["evaluate"]
            goes_on = any(folder.glob("checkpoint-*"))
            settings["resume_from_checkpoint" if goes_on else "overwrite_output_dir"] = "latest" if goes_on else True
            execute(command(recipe, settings), folder.with_name(f"{folder.name}.log"), threads)
            done.touch()
    return True


def evaluate(name: str, path: str, folder: Path, settings: dict[str, Any], threads: int) -> bool:
    """Evaluate one checkpoint by itself, unless it has been; return False where another process is at it."""
    with claimed(folder) as mine:
        if mine and not (folder / "results.json").is_file():
            settings = {**settings, "models": f"{name}={path}", "output_dir": str(folder), "primary": None}
            execute(command("evaluate", settings), folder.with_name(f"{folder.name}.log"), threads)
    return mine


def join(name: str, found: list[tuple[str, Path]], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The evaluations of one kind together, as `--compare` joins them."""
    words = [f"{run}={path}" for run, path in found]
    shutil.rmtree(folder / name, ignore_errors=True)  # an earlier table
    common = {"output_dir": str(folder / name), "primary": settings.get("primary")}
    execute(command("evaluate", {"compare": words, **common}), folder / f"{name}.log")
    return json.loads((folder / name / "results.json").read_text())


def table(results: dict[str, Any], columns: list[str], kept: list[str]) -> str:
    """A row a method: its value of every column (METRIC:STRATEGY, or a likelihood's) and the difference to start."""
    found = results["models"] | results["methods"]
    start = next(iter(results["models"]))
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for method in kept:
        cells = [method, str(found[method].get("seeds", 1)) if method != start else ""]
        for column in columns:
            metric, _, strategy = column.partition(":")
            values = found[method]["strategies"][strategy] if strategy else found[method]["likelihood"]
            text = f"{values[metric]['value']:.4g}"
            for difference in results["comparisons"]:
                same = (difference["metric"], difference["strategy"] or "") == (metric, strategy)
                if same and (difference["a"], difference["b"]) == (start, method):
                    low, high = difference["ci95"]
                    text += f" ({difference['difference']:+.3g}, {low:+.3g} to {high:+.3g})"
            if "per_seed" in values[metric]:
                text += " [" + " ".join(f"{value:.3g}" for value in values[metric]["per_seed"]) + "]"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="YAML file that names the runs and their evaluations.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Only these runs (default: all of the file).")
    parser.add_argument("--seeds", nargs="+", type=int, help="Only these of their seeds.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each command (default: 1).")
    parser.add_argument("--table", action="store_true", help="Only join and print what is there.")
    args = parser.parse_args()
    plan = yaml.safe_load(args.file.read_text())
    unknown = [name for name in args.only or () if name not in plan["runs"]]
    if unknown:
        parser.error(f"{args.file} has no run {unknown[0]!r}; it has {', '.join(plan['runs'])}")
    folder = ROOT / plan["output_dir"]
    runs = [
        (name, folder / f"{name}-{seed}", settings | {"seed": seed})
        for name, (seeds, settings) in (
            (n, (r["seeds"], {k: v for k, v in r.items() if k != "seeds"})) for n, r in plan["runs"].items()
        )
        for seed in seeds
        if (not args.only or name in args.only) and (not args.seeds or seed in args.seeds)
    ]
    checkpoints = [("start", plan["start"], {}), *((n, plan["start"], o) for n, o in plan.get("others", {}).items())]
    if not args.table:
        trained = [(name, str(path)) for name, path, settings in runs if train(path, settings, args.threads)]
        for evaluation, settings in plan["evaluations"].items():
            for name, path, more in [*checkpoints, *((name, path, {}) for name, path in trained)]:
                place = folder / "evaluations" / evaluation / (name if path == plan["start"] else Path(path).name)
                evaluate(name, path, place, settings | more, args.threads)
    for evaluation, settings in plan["evaluations"].items():
        places = [(name, folder / "evaluations" / evaluation / name) for name in ("start",)]
        places += [(name, folder / "evaluations" / evaluation / path.name) for name, path, _ in runs]
        there = [(name, place) for name, place in places if (place / "results.json").is_file()]
        if len(there) > 1 and there[0][0] == "start":
            results = join(evaluation, there, settings, folder)
            kept = list(dict.fromkeys(name for name, _ in there))
            for name in plan.get("others", {}):  # of other prompts: nothing to pair
                file = folder / "evaluations" / evaluation / name / "results.json"
                if file.is_file():
                    results["models"][name] = json.loads(file.read_text())["models"][name]
                    kept.append(name)
            print(f"\n{evaluation}\n\n{table(results, plan['columns'], kept)}\n", flush=True)


if __name__ == "__main__":
    main()
