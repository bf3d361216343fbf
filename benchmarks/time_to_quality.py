"""Time until the model is as good, for plain TRL and for rlseq: seconds, rollouts, tokens (docs/performance.md).

    python benchmarks/time_to_quality.py --output_dir runs/time [--sides trl rlseq] [--seeds 0 1 2] [--level 0.8]
    python benchmarks/time_to_quality.py --output_dir runs/time --table             # of the runs that are there

Both sides train SmolLM2-135M-Instruct (`make model`) with the settings of recipes/extraction/grpo.yaml: LoRA, 8 prompts
× 8 samples per step, at most 64 tokens, temperature 1, the reward `json_fields`. A seed gives both sides the same
adapter and the same prompts at each step. The samples differ, because each side has its own sampler. Every `--every`
steps the model answers the same `--rows` validation prompts greedily, with the same code on both sides, and the run
ends when the mean reward of these answers reaches `--level`. The clock starts at the first step and stops during
validation.

TRL has its fastest setting for a CPU: float32, no gradient checkpointing, no Liger kernels, no reference model
(beta 0), one call of `generate` for the 64 rollouts of a step, and as many `steps_per_generation` as accumulated
micro-batches, which makes a forward for the old log-probs unnecessary. Rows are padded as TRL pads them. The size of
the micro-batch is measured: each side gets the one of `--layouts` whose steps are shortest (the mean of two steps after
a first one). Larger micro-batches take more memory: TRL at 16 rows held 8.9 GB. Not tried:
torch.compile and continuous batching.

Each run is a process of its own. Runs follow one another, and the sides take turns. A run writes curve.jsonl, one line
per step, and finished.json when it ends. A finished run is not run again. An interrupted run starts from the beginning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/extraction/grpo.yaml"
DATA = str(ROOT / "recipes/extraction/data.py")
MODEL = "models/smollm2-135m-instruct"
SIDES = ("trl", "rlseq")
FINISHED = "finished.json"
UPDATE = ("log-probs of the old policy", "forward and loss", "backward", "optimizer")
# In place of the recipe's values: 2 prompts × 2 samples, a random model.
TINY = {"num_generations": 2, "max_completion_length": 4, "batch": 4, "layouts": [2], "train_rows": 12}
TINY_STEPS = 4  # a tiny model learns nothing: its quality is the number of steps divided by this


# -- one run, in a process of its own ---------------------------------------------------------------------------------


class Watch:
    """What a run took up to each step, and whether it is good enough. No figure includes validation.

    Args:
        curve: file that gets one line per step.
        validate: returns the quality after a number of steps.
        level: the quality that ends the run.
        every: validate every N steps, and before the first; 0: never.
        memory: returns the peak of resident memory, MB, since it was last asked to forget it (`memory(True)`).
    """

    def __init__(
        self,
        curve: Path,
        validate: Callable[[int], float],
        level: float,
        every: int,
        memory: Callable[[bool], float | None],
    ):
        self.curve, self.level, self.every = curve, level, every
        self._validate, self._memory = validate, memory
        self.seconds = self.validation_seconds = 0.0
        self.steps = self.rollouts = self.tokens = 0
        self.prompts = ""
        self.quality: float | None = None
        self.peak: float | None = None
        self.reached = False
        curve.write_text("")

    def count(self, prompts: Iterable[Iterable[int]], completions: list[list[int]]) -> None:
        """Count the rollouts of a step; the tokens of a completion end at its first stop."""
        self.rollouts += len(completions)
        self.tokens += sum(map(len, completions))
        self.prompts = hashlib.sha256(repr([list(ids) for ids in prompts]).encode()).hexdigest()[:16]

    def start(self) -> None:
        self._memory(True)
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self.peak = max((p for p in (self.peak, self._memory(False)) if p is not None), default=None)

    def record(self, **more: Any) -> bool:
        """Write the line of a step, while the clock stands, and return whether the level is reached."""
        line = {"step": self.steps, "seconds": self.seconds, "rollouts": self.rollouts, "tokens": self.tokens, **more}
        if self.prompts:
            line["prompts"] = self.prompts
        if self.every and self.steps % self.every == 0:
            started = time.perf_counter()
            self.quality = line["validation"] = self._validate(self.steps)
            self.validation_seconds += time.perf_counter() - started
            self.reached = self.quality >= self.level
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return self.reached


def train(side: str, seed: int, layout: int, args: argparse.Namespace, folder: Path) -> None:
    """Train one side with one seed until the level is reached, and write what it took to `folder`."""
    import torch
    import transformers
    import trl
    from performance import phases, quiet

    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    reward = json_fields()
    model, tokenizer = tiny_model() if args.tiny else pretrained(args.model)
    trainer = build(side, seed, layout, args, folder, model, tokenizer, reward)
    weights = digest(trainer.model)
    watch = Watch(
        folder / "curve.jsonl", validation(trainer, tokenizer, reward, args), args.level, args.every, resident_peak
    )
    generate = trainer._generate_single_turn

    def counted(prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        found = generate(prompt_ids, *rest, **more)
        watch.count(prompt_ids, found[0])
        return found

    trainer._generate_single_turn = counted

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            watch.stop()
            watch.steps = state.global_step
            if watch.record(reward=trainer._metrics["train"]["reward"][-1]):
                control.should_training_stop = True
            watch.start()

    trainer.add_callback(Steps())
    setup = time.perf_counter() - began
    with phases(trainer) as spent, quiet():
        if not watch.record():
            trainer.train()
    done = {
        "side": side,
        "seed": seed,
        "settings": settings_of(args, layout),
        "reached": watch.reached,
        "steps": watch.steps,
        "seconds": watch.seconds,
        "rollouts": watch.rollouts,
        "tokens": watch.tokens,
        "validation": watch.quality,
        "peak_mb": watch.peak,
        "phases": spent,
        "setup_seconds": setup,
        "validation_seconds": watch.validation_seconds,
        "weights": weights,
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
        f"trl {trl.__version__}",
    }
    written = folder / "finished.part"
    written.write_text(json.dumps(done, indent=1) + "\n")
    written.replace(folder / FINISHED)


def build(
    side: str,
    seed: int,
    layout: int,
    args: argparse.Namespace,
    folder: Path,
    model: Any,
    tokenizer: Any,
    reward: Callable[..., tuple[float, dict]],
) -> Any:
    """The trainer of a side, with the recipe's settings in micro-batches of `layout` rows."""
    import dataclasses

    import datasets
    import trl
    import yaml
    from performance import settings

    from rlseq.data import build_prompts, load_rows
    from rlseq.scoring import load_rewards
    from rlseq.training.config import GRPOConfig
    from rlseq.training.grpo import GRPOTrainer

    recipe = yaml.safe_load(RECIPE.read_text())

    def given(kind: type) -> dict[str, Any]:
        return {f.name: recipe[f.name] for f in dataclasses.fields(kind) if f.name in recipe}

    batch = TINY["batch"] if args.tiny else recipe["per_device_train_batch_size"]
    if batch % layout:
        sys.exit(f"--layouts {layout} does not divide the {batch} rollouts of a step: give rows that do")
    changes = given(trl.GRPOConfig) | {
        "output_dir": str(folder),
        "save_strategy": "no",
        "seed": seed,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": layout,
        "gradient_accumulation_steps": batch // layout,
        "steps_per_generation": batch // layout,
        "disable_dropout": True,
    }
    if args.tiny:
        changes |= {name: TINY[name] for name in ("num_generations", "max_completion_length")}
    common = settings(**({"folder": changes.pop("output_dir")} | changes))
    rows = load_rows(DATA, "train")[: TINY["train_rows"] if args.tiny else None]
    adapter = trl.get_peft_config(trl.ModelConfig(**given(trl.ModelConfig)))
    if side == "rlseq":
        suite = load_rewards(["json_fields"])
        prompts = build_prompts(rows, tokenizer)
        return GRPOTrainer(model, GRPOConfig(**common), prompts, suite, tokenizer, peft_config=adapter)

    def trl_json_fields(completions: list[list[dict[str, str]]], record: list[str], **_: Any) -> list[float]:
        """`json_fields` in TRL's form. Records are JSON, since Arrow would give each the keys of all."""
        return [reward(c[0]["content"], json.loads(r))[0] for c, r in zip(completions, record, strict=True)]

    data = [{"prompt": row["prompt"], "record": json.dumps(row["record"])} for row in rows]
    return trl.GRPOTrainer(
        model,
        reward_funcs=[trl_json_fields],
        args=trl.GRPOConfig(**common, use_liger_kernel=False),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def validation(
    trainer: Any, tokenizer: Any, reward: Callable[..., tuple[float, dict]], args: argparse.Namespace
) -> Callable[[int], float]:
    """The mean reward of the greedy answers to the validation prompts; for a tiny model steps / TINY_STEPS."""
    import torch

    from rlseq.data import build_prompts, load_rows
    from rlseq.decoding import Greedy
    from rlseq.sampler import sample, stop_ids_of

    rows = load_rows(DATA, "validation")[: args.rows]
    prompts = build_prompts(rows, tokenizer)

    def measure(steps: int) -> float:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with torch.random.fork_rng():
            answers = sample(
                model,
                prompts,
                num_samples=1,
                max_new_tokens=trainer.args.max_completion_length,
                strategy=Greedy(),
                seed=0,
                stop_ids=stop_ids_of(model, tokenizer),
                tokenizer=tokenizer,
                batch_rows=50,
            )
        values = [reward(answer.text, row["record"])[0] for (answer,), row in zip(answers, rows, strict=True)]
        return steps / TINY_STEPS if args.tiny else statistics.mean(values)

    return measure


def json_fields() -> Callable[..., tuple[float, dict]]:
    """The function of rewards/json_fields.py."""
    from rlseq.scoring.find import find

    return find("rewards/json_fields.py", ROOT).function


def pretrained(path: str) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlseq.training.models import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model, load_tokenizer(path)


def tiny_model() -> tuple[Any, Any]:
    """A random model over bytes, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokens = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def digest(model: Any) -> str:
    """The SHA-256 of all weights and their names."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def resident_peak(forget: bool) -> float | None:
    """MB that this process held at most since the peak was last forgotten; None where the system does not tell."""
    from performance import reset_peak, status

    if not Path("/proc/self/clear_refs").exists():
        return None
    return (reset_peak() if forget else status("VmHWM")) / 1e3


def run_here(args: argparse.Namespace) -> None:
    """The one run that this process is for."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train(args.sides[0], args.seeds[0], args.layouts[0], args, args.output_dir)


# -- all runs ---------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, layout: int) -> dict[str, Any]:
    """The settings that must be equal for figures to be comparable."""
    return {name: getattr(args, name) for name in ("model", "level", "every", "rows", "threads", "tiny")} | {
        "layout": layout
    }


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
