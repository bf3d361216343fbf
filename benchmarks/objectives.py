"""How the objectives compare on grapheme-to-phoneme: equal rollouts, one table (docs/objectives.md shows it).

    python benchmarks/objectives.py --output_dir runs/objectives [--methods grpo ppo] [--seeds 0 1 2] [--steps 60]
    python benchmarks/objectives.py --output_dir runs/objectives --table           # of the runs that are there

Every run starts from the bundled base and sees 512 rollouts per step (expected accuracy: 512 words, no rollouts;
rejection sampling: the same rollouts, sampled from the base beforehand). Each is evaluated on the validation words; the
test words are not touched. A run that is there already is not run again. Two minutes a run on one core; give several
`--seeds` to several processes to use more.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
BASE = "recipes/g2p/base"
RATE = "1e-4"
MIX = "--reference_loss_coef 0.1"
MINIBATCHES = "--per_device_train_batch_size 128 --steps_per_generation 4"
# The words of GRPO's batches, two minibatches of them; λ = 1, since a word earns one reward, at its end.
CRITIC = "--num_generations 8 --lam 1.0 --per_device_train_batch_size 256 --steps_per_generation 2"
# name -> (recipe, flags, what it is)
METHODS = {
    "grpo": ("grpo", "--loss_type grpo", "GRPO"),
    "grpo+ce": ("grpo", f"--loss_type grpo {MIX}", "GRPO, with the reference loss"),
    "drgrpo": ("grpo", "--loss_type dr_grpo --scale_rewards none", "Dr. GRPO"),
    # Clips bind only where a batch makes several updates.
    "dapo": ("grpo", f"--loss_type dapo --epsilon_high 0.28 {MINIBATCHES}", "DAPO, 4 minibatches"),
    "gspo": (
        "grpo",
        f"--loss_type grpo --importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4 {MINIBATCHES}",
        "GSPO, 4 minibatches",
    ),
    "rloo": ("grpo", "--advantage_baseline leave_one_out --scale_rewards none", "RLOO"),
    "rloo+ce": ("grpo", f"--advantage_baseline leave_one_out --scale_rewards none {MIX}", "RLOO, with it"),
    "scst": ("grpo", "--advantage_baseline greedy --scale_rewards none", "SCST (greedy baseline)"),
    "mrt": ("grpo", "--objective minimum_risk", "minimum risk"),
    "mrt+ce": ("grpo", f"--objective minimum_risk {MIX}", "minimum risk, with it"),
    "ea": ("grpo", "--objective expected_accuracy", "exact expected accuracy"),
    "ea+ce": ("grpo", f"--objective expected_accuracy {MIX}", "exact expected accuracy, with it"),
    "ea+ce1": (
        "grpo",
        "--objective expected_accuracy --reference_loss_coef 1.0",
        "exact expected accuracy, with it at full weight",
    ),
    "re": ("grpo", "--objective reference_exact --num_generations 2", "reference-exact"),
    "re+ce": ("grpo", f"--objective reference_exact --num_generations 2 {MIX}", "reference-exact, with it"),
    "ppo": ("ppo", f"{CRITIC} --critic_learning_rate 3e-4", "PPO, separate critic"),
    "ppo+ce": (
        "ppo",
        f"{CRITIC} --critic_learning_rate 3e-4 {MIX}",
        "PPO, separate critic, with it",
    ),
    "ppo-shared": (
        "ppo",
        f"{CRITIC} --critic shared --critic_learning_rate 3e-3",
        "PPO, shared trunk",
    ),
    "rft": ("sft", "", "rejection-sampling fine-tuning"),
    "ce": ("sft", "", "continued teacher forcing"),
}
# What five minutes of two cores buy: expected-accuracy.yaml, and finalists of the above with its averaging of weights,
# at a rate of their own. (recipe, configuration, flags, what it is)
AVERAGED = "--lr_scheduler_type constant_with_warmup --ema_decay 0.99 --interpolation_weight 0.25 --temperature 1.0"
FINALISTS = {
    "ea+ce1-averaged": (
        "grpo",
        "expected-accuracy",
        "--learning_rate 1e-3",
        "expected accuracy, reference loss 1.0 (`expected-accuracy.yaml`)",
    ),
    "rloo+ce-averaged": (
        "grpo",
        "grpo",
        f"{AVERAGED} --advantage_baseline leave_one_out --scale_rewards none {MIX} --max_steps 170",
        "RLOO, reference loss 0.1",
    ),
    "ppo+ce-averaged": (
        "ppo",
        "grpo",
        f"{AVERAGED} {CRITIC} --critic_learning_rate 3e-4 {MIX} --max_steps 200",
        "PPO, separate critic, reference loss 0.1",
    ),
    "re-averaged": (
        "grpo",
        "grpo",
        f"{AVERAGED} --objective reference_exact --num_generations 2 --reference_loss_coef 0 --max_steps 150",
        "reference-exact",
    ),
}
# GRPO with rewards that hold no word of the right answer, and at other temperatures: docs/contrast-g2p.md.
GRPO = "--loss_type grpo"
CONTROLS = {
    "own-logprob": ("grpo", f"{GRPO} --reward_funcs own_log_prob", "GRPO on the model's own log-prob"),
    "majority": ("grpo", f"{GRPO} --reward_funcs majority_vote", "GRPO on the majority's vote"),
    "bernoulli": ("grpo", f"{GRPO} --reward_funcs bernoulli", "GRPO on a coin"),
    "shuffled": (
        "grpo",
        f"{GRPO} --reward_funcs benchmarks/control_rewards.py:shuffled_accuracy",
        "GRPO on another word's reward",
    ),
    "grpo-T0.7": ("grpo", f"{GRPO} --temperature 0.7", "GRPO, trained at temperature 0.7"),
    "grpo-T1.3": ("grpo", f"{GRPO} --temperature 1.3", "GRPO, trained at temperature 1.3"),
}
METHODS_ALL = {**METHODS, **CONTROLS}
BEAM_ROWS = 1500  # beam search costs five times greedy


def command(method: str, seed: int, steps: int, rate: str, out: Path, base: str = BASE) -> list[str]:
    """The recipe's command line of a run that starts from the checkpoint `base`."""
    if method in FINALISTS:
        recipe, config, flags, _ = FINALISTS[method]
        words = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), "--config", f"recipes/g2p/{config}.yaml"]
        words += ["--output_dir", str(out), "--save_strategy", "no", "--overwrite_output_dir", "true"]
        words += ["--seed", str(seed), "--num_cpu_threads", "1", "--evaluate", "false", *flags.split()]
        words += ["--model_name_or_path", base]
        return words if method == "ea+ce1-averaged" else [*words, "--learning_rate", rate]
    recipe, flags, _ = METHODS_ALL[method]
    common = f"--seed {seed} --learning_rate {rate} --lr_scheduler_type linear --warmup_steps 10 --num_cpu_threads 1"
    words = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), "--output_dir", str(out), "--save_strategy", "no"]
    words += ["--overwrite_output_dir", "true", "--model_name_or_path", base, *common.split()]
    if recipe == "sft":
        words += ["--config", "recipes/g2p/sft-continued.yaml", "--eval_rows", "100", "--eval_strategy", "no"]
        words += ["--per_device_train_batch_size", "256", "--max_steps", str(2 * steps)]
        if method == "rft":
            # `steps` × 512 rollouts, 8 a word, sampled from the base before training; every word's best is kept.
            words += ["--train_rows", str(steps * 64), "--rejection_samples", "8", "--reward_funcs", "phoneme_accuracy"]
            words += ["--max_new_tokens", "32"]
        return words
    more = "--temperature 1.0 --reference_loss_coef 0 --ema_decay 0 --interpolation_weight 0 --evaluate false"
    minibatches = re.search(r"--steps_per_generation (\d+)", flags)
    updates = steps * (int(minibatches.group(1)) if minibatches else 1)
    words += ["--config", "recipes/g2p/grpo-base.yaml", "--max_steps", str(updates), *more.split()]
    return [*words, *flags.split()]


def measure_run(path: Path) -> dict[str, float | list[float]]:
    """Validation figures of a checkpoint: percent, nats; and the greedy errors word by word, for paired differences."""
    import torch

    from rlseq.data.rows import load_rows
    from rlseq.evaluation.aggregate import matrix, quality_metrics
    from rlseq.evaluation.measure.checkpoint import measure_checkpoint
    from rlseq.evaluation.metrics import LIKELIHOOD_METRICS
    from rlseq.evaluation.settings import ContrastSettings
    from rlseq.evaluation.statistics import COMPLETION
    from rlseq.scoring import load_rewards

    torch.set_num_threads(1)
    rows = load_rows(str(ROOT / "recipes/g2p/data.py"), "validation")
    with load_rewards(["phoneme_accuracy"]) as suite:

        def measured(rows: list, *strategies: str):
            settings = ContrastSettings(strategies=strategies, samples_per_row=2, max_new_tokens=32)
            return measure_checkpoint(path.name, str(path), rows, suite, settings, {}, quiet=True)[0]

        found = measured(rows, "greedy", "sample")
        found.strategies |= measured(rows[:BEAM_ROWS], "beam").strategies
        quality = quality_metrics(suite, with_references=True)
    values: dict[str, float | list[float]] = {
        name: LIKELIHOOD_METRICS[name].aggregate(matrix(found.likelihood, LIKELIHOOD_METRICS[name]))
        for name in ("nll_per_token", "expected_accuracy")
    }
    for strategy, statistics in found.strategies.items():
        for name in ("per", "wer", "logprob", "length"):
            values[f"{strategy}/{name}"] = quality[name].aggregate(matrix(statistics, quality[name]))
    values["entropy"] = -values["sample/logprob"] / values["sample/length"]
    greedy = found.strategies["greedy"]
    values["greedy_errors"] = [1.0 - row[COMPLETION("exact_match")] for row in greedy]
    return values


def run(method: str, seed: int, steps: int, rate: str, folder: Path) -> None:
    out = folder / f"{method}-{rate}-{seed}"
    done = out / "measured.json"
    if done.is_file():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if method == "base":
        path = ROOT / BASE
        out.mkdir(parents=True, exist_ok=True)
    else:
        path = out
        log = out.parent / f"{out.name}.log"
        with log.open("w") as file:
            ended = subprocess.run(
                command(method, seed, steps, rate, out), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if ended.returncode:
            sys.exit(f"{method} failed: {log.read_text(errors='replace')[-2000:]}")
    seconds = time.monotonic() - started
    values = measure_run(path)
    done.write_text(json.dumps({"method": method, "seed": seed, "rate": rate, "seconds": seconds, **values}))
    print(f"{method} seed {seed} rate {rate}: greedy WER {100 * values['greedy/wer']:.2f}", flush=True)


def table(folder: Path) -> str:
    """A row a method and rate: means over its seeds, and the paired difference of greedy WER to the base."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*/measured.json"))]
    base = next(r for r in runs if r["method"] == "base")
    lines = [
        "| method | rate | seeds | greedy WER | to the base | greedy PER | beam WER | beam PER | sampled WER "
        "| sampled PER | expected accuracy | NLL | entropy | seconds |",
        "|---" * 14 + "|",
    ]
    for method in ["base", *METHODS_ALL, *FINALISTS]:
        for rate in sorted({r["rate"] for r in runs if r["method"] == method}):
            mine = [r for r in runs if r["method"] == method and r["rate"] == rate]

            def mean(name: str, scale: float = 100, mine: list = mine) -> str:
                return f"{scale * np.mean([r[name] for r in mine]):.{2 if scale == 100 else 3}f}"

            # Words differ and so do seeds: the error holds both.
            delta = 100 * (np.array([r["greedy_errors"] for r in mine]) - np.array(base["greedy_errors"]))  # (S, R)
            of_words = delta.mean(0).var(ddof=1) / delta.shape[1]
            of_seeds = delta.mean(1).var(ddof=1) / len(mine) if len(mine) > 1 else 0.0
            difference = f"{delta.mean():+.2f} ± {np.sqrt(of_words + of_seeds):.2f}" if method != "base" else ""
            name = "base" if method == "base" else {**METHODS_ALL, **FINALISTS}[method][-1]
            cells = [name, "" if method == "base" else rate, str(len(mine)), mean("greedy/wer"), difference]
            cells += [mean(f"{s}/{m}") for s, m in (("greedy", "per"), ("beam", "wer"), ("beam", "per"))]
            cells += [mean("sample/wer"), mean("sample/per"), mean("expected_accuracy"), mean("nll_per_token", 1)]
            cells += [mean("entropy", 1), "" if method == "base" else f"{np.median([r['seconds'] for r in mine]):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the runs go.")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["base", *METHODS],
        help=f"Which; default: base and {', '.join(METHODS)}; also {', '.join([*CONTROLS, *FINALISTS])}.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of each (default: 0).")
    parser.add_argument("--rates", nargs="+", help="Learning rates to try (default: 1e-4, best on validation).")
    parser.add_argument("--steps", type=int, default=60, help="Batches of 512 rollouts (default: 60).")
    parser.add_argument("--table", action="store_true", help="Only print the table of the runs that are there.")
    args = parser.parse_args()
    unknown = [method for method in args.methods if method not in {"base", *METHODS_ALL, *FINALISTS}]
    if unknown:
        parser.error(f"no method {unknown[0]!r}; there are base, {', '.join([*METHODS_ALL, *FINALISTS])}")
    folder = args.output_dir.absolute()
    if not args.table:
        for seed in args.seeds:
            for method in args.methods:
                for rate in args.rates or [RATE]:
                    run(method, seed, args.steps, rate, folder)
    print(table(folder))


if __name__ == "__main__":
    main()
