"""What training on rollouts changes on grapheme-to-phoneme, and what of it is nothing: runs of docs/contrast-g2p.md.

    python benchmarks/contrast_g2p.py train --output_dir runs/contrast [--bases 0 1 2] [--methods grpo bernoulli ...]
    python benchmarks/contrast_g2p.py evaluate --output_dir runs/contrast [--bases 0]
    python benchmarks/contrast_g2p.py table --output_dir runs/contrast

Three bases (the bundled one, and two of `recipes/g2p/sft.yaml` with other seeds, 40 minutes of a core each), GRPO from
each, and controls of the same budget: 60 batches of 512 rollouts, a minute and a half of a core. And, at five times the
budget, expected-accuracy.yaml (300 batches of 512 words). A run that is there already is not run again, so that several
processes can share the work, a base each. Validation words alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from objectives import BASE, RATE, ROOT, command

CONTROLS = ("own-logprob", "majority", "bernoulli", "shuffled", "ce", "rft", "ea")
TEN = {0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (0, 1, 2)}  # base -> the seeds of its runs
SEEDS = dict.fromkeys(("grpo", *CONTROLS), TEN)  # of every other method one run a base
METHODS = ("grpo", *CONTROLS, "grpo-T0.7", "grpo-T1.3", "ea+ce1-averaged")
STEPS = 60
TEMPERATURES = (0.5, 1.0, 1.3)
STRATEGIES = ["greedy", *("sample" if t == 1.0 else f"sample:temperature={t}" for t in TEMPERATURES)]
# Column -> (strategy, metric, scale) of a comparison.
COLUMNS = {
    "greedy WER": ("greedy", "wer", 100),
    "greedy PER": ("greedy", "per", 100),
    "sampled WER": ("sample", "wer", 100),
    "expected accuracy": (None, "expected_accuracy", 100),
    "right in 256 samples": (None, "exact_pass_at_k.256", 100),
    "NLL per token": (None, "nll_per_token", 1),
    "own log-prob": ("sample", "logprob", 1),
}
MATRIX = {"greedy": "greedy", **{f"T {t}": name for t, name in zip(TEMPERATURES, STRATEGIES[1:], strict=True)}}


def base_path(base: int, folder: Path) -> Path:
    return folder / f"base{base}" if base else ROOT / BASE


def runs(base: int, methods: list[str]) -> list[tuple[str, int]]:
    """Method and seed of every run that starts from a base."""
    return [(method, seed) for method in methods for seed in SEEDS.get(method, {}).get(base, (0,))]


def run_path(base: int, method: str, seed: int, folder: Path) -> Path:
    return folder / f"base{base}-{method}-{seed}"


def train(bases: list[int], methods: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for base in bases:
        start = base_path(base, folder)
        # The bundled base is of seed 0.
        words = [sys.executable, "recipes/sft.py", "--seed", str(base), "--output_dir", str(start)]
        finish([*words, "--num_cpu_threads", "1", "--overwrite_output_dir", "true"], start)
        for method, seed in runs(base, methods):
            out = run_path(base, method, seed, folder)
            finish(command(method, seed, STEPS, RATE, out, str(start)), out)


def finish(words: list[str], out: Path) -> None:
    """Run a recipe whose result is not there yet; its output goes to `NAME.log` beside it."""
    if (out / "model.safetensors").is_file():
        return
    print(out.name, flush=True)
    log = out.parent / f"{out.name}.log"
    with log.open("w") as file:
        ended = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        sys.exit(f"{out.name} failed: {log.read_text(errors='replace')[-2000:]}")


def evaluate(bases: list[int], methods: list[str], folder: Path, rows: int) -> None:
    for base in bases:
        out = folder / f"evaluation-{base}"
        if (out / "results.json").is_file():
            continue
        models = [f"base={base_path(base, folder)}"]
        models += [f"{method}={run_path(base, method, seed, folder)}" for method, seed in runs(base, methods)]
        words = ["evaluate", "--models", *models, "--dataset_name", "recipes/g2p/data.py", "--eval_rows", str(rows)]
        words += ["--reward_funcs", "phoneme_accuracy", "--strategies", *STRATEGIES, "--samples_per_row", "2"]
        words += [
            "--max_new_tokens",
            "32",
            "--studies",
            "sharpening",
            "kl",
            "--study_rows",
            "500",
            "--primary",
            "wer:greedy",
            "--output_dir",
            str(out),
        ]
        subprocess.run([sys.executable, "-m", "rlseq.cli.main", *words], cwd=ROOT, check=True)


@dataclass(frozen=True)
class Change:
    """A difference to the base, over B bases: its mean and its standard error, over words and training runs."""

    value: float
    error: float

    @classmethod
    def over(cls, found: list[dict]) -> Change:
        """From one comparison a base; all are of the same words, so that their error does not shrink with bases."""
        values = np.array([one["difference"] for one in found])
        of_words = np.mean([((one["ci95"][1] - one["ci95"][0]) / (2 * 1.96)) ** 2 for one in found])
        of_bases = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
        return cls(float(values.mean()), float(np.sqrt(of_words + of_bases)))

    def text(self, scale: float) -> str:
        digits = 2 if scale == 100 else 3
        bold = "**" if abs(self.value) > 2.6 * self.error else ""  # 99%: there are many cells
        return f"{bold}{scale * self.value:+.{digits}f}{bold} ± {scale * self.error:.{digits}f}".replace("-", "−")


def table(bases: list[int], methods: list[str], folder: Path) -> str:
    """What each method changes, what of it is no sharpening, and temperatures in training against those in decoding."""
    results = {b: json.loads((folder / f"evaluation-{b}/results.json").read_text()) for b in bases}
    there = [m for m in methods if all(comparison(r, m, None, "expected_accuracy") for r in results.values())]

    def change(method: str, strategy: str | None, metric: str) -> Change:
        return Change.over([comparison(r, method, strategy, metric) for r in results.values()])

    first = markdown(
        ["method", *COLUMNS],
        [
            [f"base ({len(bases)})", *(base_value(results, *where) for where in COLUMNS.values())],
            *([m, *(change(m, s, metric).text(scale) for s, metric, scale in COLUMNS.values())] for m in there),
        ],
    )
    parts = ("total", "sharpening", "residual")
    second = markdown(
        ["method", "change of exact match", "by a lower temperature alone", "the rest", "KL from the base, nats"],
        [[m, *(gap(results, m, part) for part in parts), divergence(results, m)] for m in there],
    )
    trained = {"grpo-T0.7": "GRPO at T 0.7", "grpo": "GRPO at T 1.0", "grpo-T1.3": "GRPO at T 1.3"}
    matrix = [["base", *(base_value(results, strategy, "wer", 100) for strategy in MATRIX.values())]]
    matrix += [
        [title, *(change(m, strategy, "wer").text(100) for strategy in MATRIX.values())]
        for m, title in trained.items()
        if m in there
    ]
    return "\n\n".join([first, second, markdown(["trained", *MATRIX], matrix)])


def comparison(results: dict, method: str, strategy: str | None, metric: str) -> dict | None:
    wanted = {"a": "base", "b": method, "strategy": strategy, "metric": metric}
    return next((c for c in results["comparisons"] if wanted.items() <= c.items()), None)


def base_value(results: dict[int, dict], strategy: str | None, metric: str, scale: float) -> str:
    found = []
    for one in results.values():
        base = one["models"]["base"]
        value = base["likelihood"] if strategy is None else base["strategies"][strategy]
        for part in metric.split("."):
            value = value[part]
        found.append(scale * value["value"])
    return ", ".join(f"{v:.{2 if scale == 100 else 3}f}" for v in found)


def gap(results: dict[int, dict], method: str, part: str) -> str:
    """Of exact match under plain sampling: its change, what the base has of it at the same entropy, or the rest."""
    found = []
    for one in results.values():
        gaps = one["studies"]["sharpening"]["gaps"]
        this = next(g for g in gaps if g["metric"] == "exact_match" and g["b"] == method)
        if part not in this:
            return ""  # its samples vary as much as the base's
        found.append({"difference": this[part]["value"], "ci95": this[part]["ci95"]})
    if any(one["difference"] is None for one in found):
        return "the base has no such entropy"
    return Change.over(found).text(100)


def divergence(results: dict[int, dict], method: str) -> str:
    values = [
        one["studies"]["kl"]["models"][name]["forward"]["kl"]["value"]
        for one in results.values()
        for name in one["models"]
        if name.partition("#")[0] == method
    ]
    return f"{np.mean(values):.3f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["train", "evaluate", "table"], help="What to do; each resumes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the runs go.")
    parser.add_argument("--bases", nargs="+", type=int, default=[0, 1, 2], help="Which (default: 0 1 2).")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Which (default: all).")
    parser.add_argument("--rows", type=int, default=2000, help="Validation words (default: 2,000).")
    args = parser.parse_args()
    folder = args.output_dir.absolute()
    if args.step == "train":
        train(args.bases, args.methods, folder)
    elif args.step == "evaluate":
        evaluate(args.bases, args.methods, folder, args.rows)
    else:
        print(table(args.bases, args.methods, folder))


if __name__ == "__main__":
    main()
