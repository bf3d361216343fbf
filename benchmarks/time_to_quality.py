"""Time until the model is as good, for plain TRL and for rlseq: seconds, rollouts, tokens (docs/performance.md).

    python benchmarks/time_to_quality.py --output_dir runs/time [--sides trl rlseq] [--seeds 0 1 2] [--level 0.8]
    python benchmarks/time_to_quality.py --output_dir runs/time --table             # of the runs that are there

Both sides train SmolLM2-135M-Instruct (`make model`) with the settings of recipes/extraction/grpo.yaml: LoRA, 16
prompts × 4 samples per step, at most 80 tokens, temperature 1, the reward `json_fields`. A seed gives both sides the
same adapter and the same prompts at each step. The samples differ, because each side has its own sampler. Every
`--every` steps the model answers the same `--rows` validation prompts greedily, with the same code on both sides, and
the run ends when the mean reward of these answers reaches `--level`. The clock starts at the first step and stops
during validation.

TRL has its fastest setting for a CPU: float32, no gradient checkpointing, no Liger kernels, no reference model
(beta 0), one call of `generate` for the 64 rollouts of a step, and as many `steps_per_generation` as accumulated
micro-batches, which makes a forward for the old log-probs unnecessary. Rows are padded as TRL pads them. The size of
the micro-batch is measured: each side gets the one of `--layouts` whose steps are shortest (the mean of two steps after
a first one). Larger micro-batches take more memory: TRL at 16 rows held 8.9 GB. Not tried:
torch.compile and continuous batching.

Each run is a process of its own (time_to_quality_run.py). Runs follow one another, and the sides take turns. A run
writes curve.jsonl, one line per step, and finished.json when it ends. A finished run is not run again. An interrupted
run starts from the beginning.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from time_to_quality_run import FINISHED, ROOT, TINY, TINY_STEPS, run_here, settings_of

MODEL = "models/smollm2-135m-instruct"
SIDES = ("trl", "rlseq")
UPDATE = ("log-probs of the old policy", "forward and loss", "backward", "optimizer")


def finished(folder: Path) -> list[dict[str, Any]]:
    """The records of finished runs, without those that measured layouts."""
    return [
        json.loads(file.read_text())
        for side in SIDES
        for file in sorted(folder.glob(f"{side}-seed*/{FINISHED}"), key=lambda f: int(f.parent.name.split("seed")[1]))
    ]


def check_comparable(folder: Path, side: str, wanted: dict[str, Any]) -> None:
    """Exit where a run in the folder had other settings: the table would mix them."""
    for record in finished(folder):
        for name, value in record["settings"].items():
            if value != wanted[name] and (name != "layout" or record["side"] == side):
                sys.exit(
                    f"{record['side']} seed {record['seed']} was run with {name} {value}, not {wanted[name]}: give "
                    "another --output_dir"
                )


def run(side: str, seed: int, layout: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of a run. It is run if no record reached the level or has as many steps."""
    done = folder / FINISHED
    if done.is_file():
        record = json.loads(done.read_text())
        if record["settings"] == settings_of(args, layout) and (record["reached"] or record["steps"] >= args.max_steps):
            return record
        done.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "--output_dir", str(folder), "--run", "--sides", side, "--seeds", str(seed)]
    words += ["--layouts", str(layout)] + ["--tiny"] * args.tiny
    for name in ("level", "every", "rows", "max_steps", "threads", "model"):
        words += [f"--{name}", str(getattr(args, name))]
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    log = folder / "log.txt"
    with log.open("w") as file:
        ended = subprocess.run(
            words, cwd=ROOT, env={**os.environ, **threads}, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode == -signal.SIGKILL:
        sys.exit(
            f"{side} seed {seed} was killed in micro-batches of {layout}, probably for lack of memory: "
            "give smaller --layouts"
        )
    if ended.returncode:
        sys.exit(f"{side} seed {seed} failed ({ended.returncode}): {log.read_text(errors='replace')[-2000:]}")
    return json.loads(done.read_text())


def fastest_layout(side: str, args: argparse.Namespace) -> int:
    """Of `--layouts` the rows of a micro-batch with which a side's second and third step are shortest."""
    if len(args.layouts) == 1:
        return args.layouts[0]
    trial = argparse.Namespace(**{**vars(args), "max_steps": 3, "every": 0})
    seconds: dict[int, float] = {}
    for layout in args.layouts:
        folder = args.output_dir / f"layout-{side}-{layout}"
        run(side, args.seeds[0], layout, trial, folder)
        lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        seconds[layout] = (lines[3]["seconds"] - lines[1]["seconds"]) / 2
        print(f"{side}, micro-batches of {layout}: {seconds[layout]:.1f} s a step", flush=True)
    return min(seconds, key=seconds.__getitem__)


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], float | None], str]] = {
    "seconds": (lambda r: r["seconds"], ",.0f"),
    "rollouts": (lambda r: r["rollouts"], ",.0f"),
    "tokens": (lambda r: r["tokens"], ",.0f"),
    "steps": (lambda r: r["steps"], ",.0f"),
    "peak memory, GB": (lambda r: r["peak_mb"] and r["peak_mb"] / 1e3, ".2f"),
    "rollouts, s": (lambda r: r["phases"]["rollouts"], ",.0f"),
    "reward, s": (lambda r: r["phases"]["rewards"], ",.1f"),
    "update, s": (lambda r: sum(r["phases"][name] for name in UPDATE), ",.0f"),
    "the rest, s": (lambda r: r["seconds"] - sum(r["phases"].values()), ",.1f"),
}
UNTIL = ("seconds", "rollouts", "tokens", "steps")  # unknown where the level was not reached


def median(name: str, records: list[dict[str, Any]]) -> float | None:
    """The median over seeds. A run that did not reach the level counts as infinitely long."""
    of, _ = FIGURES[name]
    values = [math.inf if name in UNTIL and not r["reached"] else of(r) for r in records]
    return None if None in values else statistics.median(values)


def table(folder: Path) -> str:
    """One row per side, medians over its seeds, with the lowest and highest seconds; then the ratio."""
    found = finished(folder)
    if not found:
        return "No run has finished."
    by_side = {side: [r for r in found if r["side"] == side] for side in SIDES}
    by_side = {side: records for side, records in by_side.items() if records}
    settings = found[0]["settings"]
    lines = [
        f"Level {settings['level']:g} of the greedy reward on {settings['rows']} validation prompts, measured every "
        f"{settings['every']} steps; {found[0]['machine']}.",
        "",
        f"| side | micro-batch | seeds | reached | {' | '.join(FIGURES)} |",
        "|---" * (4 + len(FIGURES)) + "|",
    ]
    medians = {side: {name: median(name, records) for name in FIGURES} for side, records in by_side.items()}
    for side, records in by_side.items():
        cells = [side, str(records[0]["settings"]["layout"]), " ".join(str(r["seed"]) for r in records)]
        cells.append(f"{sum(r['reached'] for r in records)} of {len(records)}")
        for name, (_, form) in FIGURES.items():
            value = medians[side][name]
            cell = "" if value is None else "not reached" if math.isinf(value) else f"{value:{form}}"
            if name == "seconds" and len(records) > 1:
                ends = [r["seconds"] if r["reached"] else math.inf for r in records]
                cell += f" ({min(ends):,.0f}–{max(ends):,.0f})".replace("inf", "∞")
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    if len(by_side) == 2 and len({tuple(r["seed"] for r in records) for records in by_side.values()}) == 1:
        cells = []
        for name in FIGURES:
            theirs, ours = medians["trl"][name], medians["rlseq"][name]
            known = theirs is not None and ours and math.isfinite(theirs) and math.isfinite(ours)
            cells.append(f"{theirs / ours:.2f}×" if known else "")
        lines.append("| trl / rlseq | | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="Which (default: both).")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of each (default: 0 1 2).")
    parser.add_argument("--level", type=float, default=0.8, help="Validation reward that ends a run (default: 0.8).")
    parser.add_argument("--every", type=int, default=5, help="Validate every N steps (default: 5).")
    parser.add_argument("--rows", type=int, default=100, help="Validation prompts (default: 100).")
    parser.add_argument("--max_steps", type=int, default=200, help="Steps that a run may take (default: 200).")
    parser.add_argument("--layouts", nargs="+", type=int, help="Rows of a micro-batch to try (default: 8 16).")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores).")
    parser.add_argument("--model", default=MODEL, help=f"What is trained (default: {MODEL}).")
    parser.add_argument("--table", action="store_true", help="Only print the table of the finished runs.")
    parser.add_argument(
        "--tiny", action="store_true", help=f"Try the script: a random model, its quality the steps / {TINY_STEPS}."
    )
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output_dir = args.output_dir.absolute()
    args.layouts = args.layouts or (TINY["layouts"] if args.tiny else [8, 16])
    if args.run:
        run_here(args)
        return
    if not args.table:
        if not args.tiny and not (ROOT / args.model / "config.json").is_file():
            parser.error(f"there is no model in {args.model}: make it with `make model`")
        layouts: dict[str, int] = {}
        for seed in args.seeds:
            for side in args.sides:
                layout = layouts.setdefault(side, 0) or fastest_layout(side, args)
                layouts[side] = layout
                check_comparable(args.output_dir, side, settings_of(args, layout))
                record = run(side, seed, layout, args, args.output_dir / f"{side}-seed{seed}")
                said = "reached" if record["reached"] else "not reached"
                print(f"{side} seed {seed}: level {said} in {record['seconds']:.0f} s", flush=True)
    print(table(args.output_dir))


if __name__ == "__main__":
    main()
