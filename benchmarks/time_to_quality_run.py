"""One run of time_to_quality.py, in a process of its own: train one side with one seed until it is good enough."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/extraction/grpo.yaml"
DATA = str(ROOT / "recipes/extraction/data.py")
FINISHED = "finished.json"
# In place of the recipe's values: 2 prompts × 2 samples, a random model.
TINY = {"num_generations": 2, "max_completion_length": 4, "batch": 4, "layouts": [2], "train_rows": 12}
TINY_STEPS = 4  # a tiny model learns nothing: its quality is the number of steps divided by this


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
    if hasattr(trainer, "sampler"):
        complete = trainer.sampler.complete

        def completed(batch: Any) -> None:
            complete(batch)
            watch.count(batch.prompt_ids, [rollout.completion_ids for rollout in batch.rollouts])

        trainer.sampler.complete = completed
    else:
        generate = trainer._generate

        def generated(asked: Any) -> Any:
            found = generate(asked)
            watch.count(found[0], found[1])
            return found

        trainer._generate = generated

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

    from rlseq.config.training import GRPOConfig
    from rlseq.data.prompts import build_prompts
    from rlseq.data.rows import load_rows
    from rlseq.scoring import load_rewards
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
        return GRPOTrainer(model, suite, GRPOConfig(**common), prompts, processing_class=tokenizer, peft_config=adapter)

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

    from rlseq.data.prompts import build_prompts
    from rlseq.data.rows import load_rows
    from rlseq.engine.sampling import sample, stop_ids_of
    from rlseq.engine.strategies import Greedy

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
    from rlseq.scoring.specs.find import find

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


def settings_of(args: argparse.Namespace, layout: int) -> dict[str, Any]:
    """The settings that must be equal for figures to be comparable."""
    return {name: getattr(args, name) for name in ("model", "level", "every", "rows", "threads", "tiny")} | {
        "layout": layout
    }
