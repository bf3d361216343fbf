"""What rlseq's rollouts, updates and steps cost beside plain TRL and `generate`, on this machine (docs/performance.md).

    python benchmarks/performance.py [--only step rollouts update equal sharing long prefixes evaluation memory startup
        growth]
        [--repeats N] [--json FILE]

Both sides of a row do the same work in one process and take turns, so that a machine that is busy for a while slows
both; figures are medians. TRL has the same model, data, batch, loss, precision (float32) and attention, gradient
checkpointing off, and of several micro-batch layouts the fastest. About 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_rows
from rlseq.engine.decoding import common_prefix
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import Sample
from rlseq.scoring import load_rewards
from rlseq.scoring.distance import accuracy, closest
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.models import disable_dropout
from rlseq.training.rollouts import MicroBatch
from rlseq.types import Prompt

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "recipes/g2p/base")
DATA = str(ROOT / "recipes/g2p/data.py")
G = 8  # samples per prompt
BATCH = 512  # rollouts per step, as in recipes/g2p/grpo.yaml
LAYOUTS = (512, 128, 64)  # rows of a micro-batch that TRL may have

Work = Callable[[], float]  # does the work once and returns how much it did (steps, tokens)


def race(sides: dict[str, Work], repeats: int) -> dict[str, float]:
    """By side its median rate, work a second; they take turns, and a first turn of each does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            done = work()
            if turn:
                rates[name].append(done / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in rates.items()}


# -- what is trained and sampled --------------------------------------------------------------------------------------


def trl_phoneme_accuracy(completions: list[str], references: list[list[str]], **_: Any) -> list[float]:
    """`phoneme_accuracy` in TRL's form."""
    pairs = zip(completions, references, strict=True)
    return [accuracy(*closest(text.split(), [r.split() for r in found])) for text, found in pairs]


def g2p(limit: int | None = None) -> tuple[Any, Any, list[Prompt]]:
    """The bundled base, its tokenizer and training prompts."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left", trust_remote_code=False)
    return (
        AutoModelForCausalLM.from_pretrained(BASE, use_safetensors=True, trust_remote_code=False),
        tokenizer,
        build_prompts(load_rows(DATA, "train")[:limit], tokenizer),
    )


def settings(folder: str, **changes: Any) -> dict[str, Any]:
    common = {
        "output_dir": folder,
        "num_generations": G,
        "max_completion_length": 32,
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "loss_type": "dapo",
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return {**common, **changes}


def ours(folder: str, model: Any, tokenizer: Any, prompts: list[Prompt], **changes: Any) -> GRPOTrainer:
    suite = load_rewards(["phoneme_accuracy"])
    return GRPOTrainer(model, suite, GRPOConfig(**settings(folder, **changes)), prompts, processing_class=tokenizer)


def theirs(folder: str, model: Any, tokenizer: Any, prompts: list[Prompt], **changes: Any) -> trl.GRPOTrainer:
    rows = [{"prompt": p.prompt, "references": list(p.columns["references"])} for p in prompts]
    return trl.GRPOTrainer(
        model,
        reward_funcs=[trl_phoneme_accuracy],
        args=trl.GRPOConfig(**settings(folder, disable_dropout=True, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


class StepTimes(transformers.TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def steps_of(make: Callable[..., Any], folder: str, steps: int, layout: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step of a short run but its first, and of its phases in all."""
    model, tokenizer, prompts = g2p(20_000)
    disable_dropout(model)  # TRL's own leaves that of attention on
    trainer = make(
        folder,
        model,
        tokenizer,
        prompts,
        per_device_train_batch_size=layout,
        gradient_accumulation_steps=BATCH // layout,
        max_steps=steps + 1,
    )
    trainer.add_callback(times := StepTimes())
    with phases(trainer) as spent, quiet():
        trainer.train()
    return times.seconds[1:], {name: seconds * steps / (steps + 1) for name, seconds in spent.items()}


def as_trl_lays_it_out(batch: MicroBatch, pad_id: int) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL's loss reads it: prompts padded on the left, completions on the right."""
    device = batch.mask.device
    prompts = [torch.tensor(ids, device=device) for ids in batch.prompt_ids]
    completions = [torch.tensor(ids, device=device) for ids in batch.completion_ids]
    widest = torch.zeros(batch.mask.shape[1], dtype=torch.long, device=device)  # the whole batch's longest completion
    found = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left"),
        "completion_ids": pad_sequence([*completions, widest], batch_first=True, padding_value=pad_id)[:-1],
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": batch.trained_tokens,
    }
    return found if batch.old_logprobs is None else found | {"old_per_token_logps": batch.old_logprobs}


PHASES = {  # methods of TRL's trainer, and of what rlseq's has
    "_generate": "rollouts",
    "sampler.complete": "rollouts",
    "_calculate_rewards": "rewards",
    "scorer.score": "rewards",
    "_get_per_token_logps_and_entropies": "log-probs of the old policy",
    "forward.logprobs": "log-probs of the old policy",
    "compute_loss": "forward and loss",
}


@contextmanager
def phases(trainer: Any) -> Iterator[dict[str, float]]:
    """Seconds by phase of a step: methods of the trainer, the backward pass, the optimizer."""
    spent = {name: 0.0 for name in (*PHASES.values(), "backward", "optimizer")}
    inside: list[str] = []

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:  # what another phase calls is of that phase
                return method(*args, **kwargs)
            inside.append(name)
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started
                inside.pop()

        return call

    for method, name in PHASES.items():
        holder, _, method = method.rpartition(".")
        owner = getattr(trainer, holder, None) if holder else trainer
        if hasattr(owner, method):
            setattr(owner, method, timed(name, getattr(owner, method)))
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        optimizer.step = timed("optimizer", optimizer.step)
        return optimizer

    trainer.create_optimizer = create_optimizer
    yield spent


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that trainers print."""
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out


# -- the rows ---------------------------------------------------------------------------------------------------------


def step(repeats: int) -> list[dict[str, Any]]:
    """A whole GRPO step of the grapheme-to-phoneme task."""
    sides = {"rlseq": (ours, BATCH)} | {f"TRL, micro-batches of {n}": (theirs, n) for n in LAYOUTS}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    spent: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for name, (make, layout) in sides.items():
                took, by_phase = steps_of(make, folder, 3, layout)
                seconds[name] += took
                total = spent.setdefault(name, dict.fromkeys([*by_phase, "steps"], 0.0))
                for phase, value in by_phase.items():
                    total[phase] += value
                total["steps"] += len(took)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    best = min((name for name in medians if name != "rlseq"), key=medians.__getitem__)
    table = {
        name: {phase: value / spent[name]["steps"] for phase, value in spent[name].items() if phase != "steps"}
        for name in ("rlseq", best)
    }
    for name, found in table.items():
        found["the rest"] = statistics.mean(seconds[name]) - sum(found.values())
    row = result("GRPO step, 64 words × 8, steps/s", 1 / medians["rlseq"], 1 / medians[best], (2.5, 3.5))
    return [{**row, "against": best, "phases": table}]


def rollouts(repeats: int, samples: int = G, temperature: float = 1.0) -> list[dict[str, Any]]:
    """32 words × 8 samples."""
    model, tokenizer, prompts = g2p(32)
    rates = race(sampling(model, tokenizer, prompts, samples, 32, temperature=temperature), repeats)
    what = f"rollouts, 32 words × {samples}{_at(temperature)}, tokens/s"
    return [result(what, rates["rlseq"], rates["generate"], (2, 3))]


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f" at temperature {temperature:g}"


def sharing(repeats: int) -> list[dict[str, Any]]:
    """Work that samples share, or hardly: more of them, fewer, and at a temperature at which few share a token."""
    changes: list[tuple[int, float]] = [(4, 1.0), (16, 1.0), (G, 3.0)]
    work = [f(max(1, repeats // 2), *change) for change in changes for f in (rollouts, update)]
    return [{**row, "targets": None} for rows in work for row in rows]


def evaluation(repeats: int) -> list[dict[str, Any]]:
    """16 samples of each of 2,000 words, in batches of 1,024 rows."""
    model, tokenizer, _ = g2p(1)
    prompts = build_prompts(load_rows(DATA, "validation")[:2000], tokenizer)
    rates = race(sampling(model, tokenizer, prompts, 16, 32, batch=64), max(1, repeats // 2))
    return [result("evaluation, 2,000 words × 16, tokens/s", rates["rlseq"], rates["generate"], (3, 3))]


def sampling(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    samples: int,
    length: int,
    *,
    batch: int | None = None,
    temperature: float = 1.0,
) -> dict[str, Work]:
    """Samples of every prompt by rlseq and by `generate`; the work is the tokens up to each first stop."""
    model.eval()
    stops = stop_ids_of(model, tokenizer) if tokenizer is not None else [model.config.vocab_size]
    batch = batch or len(prompts)
    streams = iter(range(10**9))

    def rlseq() -> float:
        found = sample(
            model,
            prompts,
            num_samples=samples,
            max_new_tokens=length,
            strategy=Sample(temperature=temperature),
            seed=0,
            stream=next(streams),
            stop_ids=stops,
            tokenizer=tokenizer,
            batch_rows=batch * samples,
        )
        return sum(len(one.completion_ids) for group in found for one in group)

    def generate() -> float:
        tokens = 0
        ordered = sorted(prompts, key=lambda p: len(p.prompt_ids))
        for start in range(0, len(ordered), batch):
            ids = [torch.tensor(p.prompt_ids) for p in ordered[start : start + batch]]
            width = max(map(len, ids))
            padded = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in ids])
            mask = torch.stack([torch.arange(width) >= width - len(x) for x in ids]).long()
            with torch.no_grad():
                found = model.generate(
                    input_ids=padded,
                    attention_mask=mask,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=temperature,
                    max_new_tokens=length,
                    num_return_sequences=samples,
                    pad_token_id=0,
                    eos_token_id=stops if tokenizer is not None else None,
                )[:, width:]
            if tokenizer is None:
                tokens += found.numel()
                continue
            stopped = torch.isin(found, torch.tensor(stops)).int()
            tokens += int(((stopped.cumsum(1) - stopped) == 0).sum())
            tokenizer.batch_decode(found, skip_special_tokens=True)
        return tokens

    return {"rlseq": rlseq, "generate": generate}


def update(repeats: int, samples: int = G, temperature: float = 1.0) -> list[dict[str, Any]]:
    """Loss and backward of one batch of the grapheme-to-phoneme task."""
    model, tokenizer, prompts = g2p(64)
    changes = {"num_generations": samples, "temperature": temperature}
    with tempfile.TemporaryDirectory() as folder:
        found = updating(
            folder, model, tokenizer, prompts, 64 * samples, (64 * samples, *LAYOUTS[1:]), repeats, **changes
        )
    what = f"update, 64 words × {samples}{_at(temperature)}, updates/s"
    return [{**result(what, found["rlseq"], found["TRL"], (2, 3)), **found["more"]}]


def updating(
    folder: str,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rows: int,
    layouts: tuple[int, ...],
    repeats: int,
    **changes: Any,
) -> dict[str, Any]:
    """Updates per second of both on one batch that rlseq sampled, with equal losses; TRL's best of several layouts."""
    changes = {"per_device_train_batch_size": rows, "max_steps": 1, "num_iterations": 2, **changes}
    mine = ours(folder, model, tokenizer, prompts, **changes)
    other = theirs(folder, model, tokenizer, prompts, **changes)
    mine.model.train()
    other.model.train()
    groups = [
        row for row in (dict(mine.train_dataset[i]) for i in range(len(prompts))) for _ in range(mine.num_generations)
    ]
    with quiet():
        batch = mine.make_batch(groups).trained
    laid_out = as_trl_lays_it_out(batch, tokenizer.pad_token_id)
    for trainer in (mine, other):
        trainer.current_gradient_accumulation_steps = 1
    losses: dict[str, float] = {}

    def work(name: str, trainer: Any, layout: int) -> Work:
        def once() -> float:
            trainer.model.zero_grad()
            # As in a run of that layout: a rollout batch is several micro-batches, accumulated to one step.
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = rows // layout
            total = 0.0
            for start in range(0, rows, layout):
                rows_of = slice(start, start + layout)
                if trainer is mine:
                    part = batch.select(range(rows)[rows_of])
                else:
                    part = {name: x[rows_of] if x.ndim else x for name, x in laid_out.items()}
                loss = trainer.compute_loss(trainer.model, part)
                loss.backward()
                total += loss.item()
            losses[name] = total
            return 1.0

        return once

    sides = {"rlseq": work("rlseq", mine, rows)}
    sides |= {f"TRL, {n}": work(f"TRL, {n}", other, n) for n in layouts if n <= rows}
    rates = race(sides, repeats)
    best = max((name for name in rates if name != "rlseq"), key=rates.__getitem__)
    return {
        "rlseq": rates["rlseq"],
        "TRL": rates[best],
        "more": {
            "against": best,
            "loss": losses["rlseq"],
            "difference of the losses": abs(losses["rlseq"] - losses[best]),
        },
    }


def equal(repeats: int) -> list[dict[str, Any]]:
    """An update where the samples of every second word earned the same, beside one where none did."""
    model, tokenizer, prompts = g2p(64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(folder, model, tokenizer, prompts, max_steps=1)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        rows = [dict(trainer.train_dataset[i]) for i in range(len(prompts)) for _ in range(G)]
        with quiet():
            batch = trainer.make_batch(rows).trained
        teaches = torch.ones(len(rows))

        def work(advantages: torch.Tensor) -> Work:
            of = replace(batch, advantages=advantages)

            def once() -> float:
                trainer.model.zero_grad()
                trainer.compute_loss(trainer.model, of).backward()
                return 1.0

            return once

        half = teaches.view(len(prompts), G).clone()
        half[::2] = 0.0
        rates = race({"half": work(half.flatten()), "all": work(teaches)}, repeats)
    what = f"update, 64 words × {G}, half of the groups equal, beside none, updates/s"
    return [result(what, rates["half"], rates["all"], None)]


def long_model(width: int = 256, layers: int = 4) -> tuple[Any, Any]:
    """A random model for long prompts, and the tokenizer of the base, of whose ids it makes use."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left", trust_remote_code=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def long_prompts(tokenizer: Any, count: int, tokens: int) -> list[Prompt]:
    letters = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = [letters[i] for i in torch.randint(0, len(letters), (tokens,), generator=generator).tolist()]
        text = tokenizer.decode(ids)
        found.append(Prompt(f"p{number}", text, tuple(ids), {"references": ["AH"]}))
    return found


def long(
    repeats: int, tokens: int = 1024, length: int = 64, samples: int = 16, width: int = 256
) -> list[dict[str, Any]]:
    """A long prompt and short completions, a small random model."""
    model, tokenizer = long_model(width)
    prompts = long_prompts(tokenizer, 2, tokens)
    rates = race(sampling(model, None, prompts, samples, length), repeats)
    with tempfile.TemporaryDirectory() as folder:
        rows = len(prompts) * samples
        changes = {"num_generations": samples, "max_completion_length": length}
        found = updating(folder, model, tokenizer, prompts, rows, (rows, samples, samples // 4), repeats, **changes)
    what = f"prompt {tokens:,}, completions {length}, G = {samples}, width {width}"
    return [
        {**result(f"update, {what}, updates/s", found["rlseq"], found["TRL"], (4, 6)), **found["more"]},
        result(f"rollouts, {what}, tokens/s", rates["rlseq"], rates["generate"], (3, 5)),
    ]


def prefixes(
    repeats: int, begin: int = 200, tokens: int = 16, count: int = 32, samples: int = 4
) -> list[dict[str, Any]]:
    """Prompts that begin alike, as with a system prompt, beside the same work with each prompt computed whole."""
    model, tokenizer = long_model()
    alike, own = long_prompts(tokenizer, 1, begin)[0], long_prompts(tokenizer, count, tokens)
    ids = [alike.prompt_ids + p.prompt_ids for p in own]
    prompts = [
        replace(p, prompt_ids=all_ids, prompt=tokenizer.decode(all_ids)) for p, all_ids in zip(own, ids, strict=True)
    ]
    length = 2 * tokens

    def decode() -> float:
        sample(model, prompts, num_samples=samples, max_new_tokens=length, strategy=Sample(), seed=0, stop_ids=[-1])
        return 1.0

    def force() -> float:
        score(model, ids, [p.prompt_ids for p in own])
        return 1.0

    with tempfile.TemporaryDirectory() as folder:
        changes = {"num_generations": samples, "max_completion_length": length, "max_steps": 1}
        rows = count * samples
        trainer = ours(folder, model, tokenizer, prompts, per_device_train_batch_size=rows, **changes)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        with quiet():
            batch = trainer.make_batch([dict(trainer.train_dataset[i // samples]) for i in range(rows)]).trained
        batch = replace(batch, advantages=torch.ones(rows))

        def train() -> float:
            trainer.model.zero_grad()
            trainer.compute_loss(trainer.model, batch).backward()
            return 1.0

        def whole(work: Work) -> Work:
            def once() -> float:
                least, common_prefix.LEAST_SAVED = common_prefix.LEAST_SAVED, sys.maxsize
                try:
                    return work()
                finally:
                    common_prefix.LEAST_SAVED = least

            return once

        what = f"{count} prompts of {begin} common tokens and {tokens} of their own, beside each whole"
        found = []
        for name, work in {"rollouts": decode, "scores": force, "update": train}.items():
            rates = race({"once": work, "whole": whole(work)}, repeats)
            found.append(result(f"{name}, {what}, /s", rates["once"], rates["whole"], None))
    return found


def growth(repeats: int) -> list[dict[str, Any]]:
    """How the ratios change with samples per prompt, prompt length, completion length and model width."""
    changes: list[dict[str, int]] = [{"samples": n} for n in (4, 8)]
    changes += [{"tokens": n} for n in (128, 512)] + [{"length": n} for n in (16, 128)] + [{"width": 128}]
    return [{**row, "targets": None} for change in changes for row in long(max(1, repeats // 2), **change)]


MEMORY = {
    "step": ("ours_step", "theirs_step"),
    "rollouts": ("ours_rollouts", "theirs_rollouts"),
    "update with long prompts": ("ours_long", "theirs_long"),
}


def memory(repeats: int) -> list[dict[str, Any]]:
    """Peak resident memory above that of the loaded model, each side in a process of its own."""
    rows = []
    for name, sides in MEMORY.items():
        peaks = [statistics.median(_peak(side) for _ in range(min(3, repeats))) for side in sides]
        rows.append({**result(f"peak memory, {name}, MB", peaks[0], peaks[1], None), "ratio": peaks[1] / peaks[0]})
    return rows


def _peak(side: str) -> float:
    words = [sys.executable, __file__, "--peak", side, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(side: str) -> float:
    """MB above what this process held when model, data and libraries were loaded."""
    who, what = side.split("_")
    if what == "step":
        make, layout = (ours, BATCH) if who == "ours" else (theirs, 128)
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer, prompts = g2p(2000)
            changes = {"per_device_train_batch_size": layout, "gradient_accumulation_steps": BATCH // layout}
            trainer = make(folder, model, tokenizer, prompts, max_steps=3, **changes)
            before = reset_peak()
            with quiet():
                trainer.train()
    elif what == "rollouts":
        work = sampling(*g2p(32), G, 32)["rlseq" if who == "ours" else "generate"]
        before = reset_peak()
        work()
    else:
        model, tokenizer = long_model()
        prompts = long_prompts(tokenizer, 2, 1024)
        with tempfile.TemporaryDirectory() as folder:
            make, layout = (ours, 32) if who == "ours" else (theirs, 16)
            changes = {"num_generations": 16, "max_completion_length": 64, "max_steps": 1}
            changes |= {"per_device_train_batch_size": layout, "gradient_accumulation_steps": 32 // layout}
            trainer = make(folder, model, tokenizer, prompts, **changes)
            before = reset_peak()
            with quiet():
                trainer.train()
    return (status("VmHWM") - before) / 1e3


def reset_peak() -> int:
    """Forget the peak of this process's resident memory so far (Linux); return what it holds, kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A line of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def startup(repeats: int) -> list[dict[str, Any]]:
    """Seconds until `rlseq --help` and a dry run of the demonstration have ended."""
    commands = {
        "rlseq --help, s": ([sys.executable, "-m", "rlseq.cli.main", "--help"], 0.3),
        "recipes/grpo.py --dry_run true, s": ([sys.executable, "recipes/grpo.py", "--dry_run", "true"], 10),
    }
    rows = []
    for name, (words, limit) in commands.items():
        seconds = []
        for _ in range(min(5, repeats)):
            started = time.perf_counter()
            subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
            seconds.append(time.perf_counter() - started)
        rows.append({"work": name, "rlseq": statistics.median(seconds), "limit": limit})
    return rows


def result(work: str, rlseq: float, other: float, targets: tuple[float, float] | None) -> dict[str, Any]:
    return {"work": work, "rlseq": rlseq, "other": other, "ratio": rlseq / other, "targets": targets}


ROWS = {
    f.__name__: f for f in (step, rollouts, update, equal, sharing, long, prefixes, evaluation, memory, startup, growth)
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| work | rlseq | TRL or `generate` | ratio | floor, aim |", "|---|---|---|---|---|"]
    for row in rows:
        if "limit" in row:
            lines.append(f"| {row['work']} | {row['rlseq']:.2f} | | | below {row['limit']} |")
            continue
        wanted = f"{row['targets'][0]:g}×, {row['targets'][1]:g}×" if row.get("targets") else ""
        if row["work"].startswith("peak"):
            wanted = "not above"
        lines.append(f"| {row['work']} | {row['rlseq']:.3g} | {row['other']:.3g} | {row['ratio']:.2f}× | {wanted} |")
    for row in rows:
        if "phases" in row:
            names = list(row["phases"])
            lines += ["", f"| phase of a step, s | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
            lines += [
                f"| {phase} | " + " | ".join(f"{row['phases'][name][phase]:.3f}" for name in names) + " |"
                for phase in row["phases"][names[0]]
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="Which (default: all).")
    parser.add_argument("--repeats", type=int, default=5, help="Turns of each side (default: 5).")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores).")
    parser.add_argument("--json", type=Path, help="Write the figures there too.")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.peak:
        print(peak(args.peak))
        return
    rows = []
    for name in args.only:
        found = ROWS[name](args.repeats)
        rows += found
        print(table(found), flush=True)
    where = f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"\n{where}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
