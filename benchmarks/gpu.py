"""Rollouts, steps and attention on a GPU, beside TRL's generation and plain TRL (docs/performance.md).

    python benchmarks/gpu.py [--only rollouts attention step] [--repeats N] [--json FILE]

A model of Qwen2.5-0.5B's shape with random weights, bfloat16: 64 prompts of 256 tokens, 8 samples each, completions of
up to 512 tokens (in rollouts one id in 300 ends one, so that lengths differ). Sides take turns in one process and
figures are medians; a side that cannot run here says why, and is left out. `--tiny` tries the script, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from performance import StepTimes, ours, quiet, race, result, table, theirs
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rlseq.engine.decoding.kv_budget import cached_numbers
from rlseq.engine.packed.packing import FLEX, pack
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.types import Prompt, Rollout

ROOT = Path(__file__).parent.parent
G = 8
SIZES = {
    "0.5B": {
        "config": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768},
        "prompts": 64,
        "prompt": 256,
        "completion": 512,
        "paged cache": {},
    },
    "tiny": {
        "config": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        "prompts": 3,
        "prompt": 20,
        "completion": 24,
        # by default the paged cache and its masks take most of the free memory, whatever the model's size
        "paged cache": {"num_blocks": 32, "max_batch_tokens": 512},
    },
}
STOPS = 300  # one id in 300 ends a completion
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_model(size: dict[str, Any], attention: str = "sdpa") -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**size["config"], tie_word_embeddings=True, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config).to(DEVICE, torch.bfloat16).eval()


def new_prompts(size: dict[str, Any], tokenizer: Any) -> list[Prompt]:
    letters = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    noise = torch.Generator().manual_seed(1)
    found = []
    for number in range(size["prompts"]):
        ids = tuple(letters[i] for i in torch.randint(0, len(letters), (size["prompt"],), generator=noise).tolist())
        found.append(Prompt(f"p{number}", tokenizer.decode(ids), ids, {"references": ["AH"]}))
    return found


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tried(sides: dict[str, Callable[[], float]]) -> dict[str, Callable[[], float]]:
    """The sides that run here; of the others a line says why they do not."""
    found = {}
    for name, work in sides.items():
        try:
            work()
            found[name] = work
        except Exception as error:
            print(f"{name}: left out: {type(error).__name__}: {str(error).strip().splitlines()[0]}", flush=True)
    return found


# -- rollouts ---------------------------------------------------------------------------------------------------------


def rollouts(size: dict[str, Any], tokenizer: Any, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second up to each first stop, and the share of the memory's bandwidth that rlseq's steps use."""
    model, prompts = new_model(size), new_prompts(size, tokenizer)
    stops = list(range(5, size["config"]["vocab_size"], STOPS))
    rows, length = [list(p.prompt_ids) for p in prompts], size["completion"]
    last: list[Rollout] = []
    streams = iter(range(10**9))

    def rlseq() -> float:
        settings = {"num_samples": G, "max_new_tokens": length, "strategy": Sample(), "seed": 0, "stop_ids": stops}
        last[:] = [one for group in sample(model, prompts, stream=next(streams), **settings) for one in group]
        wait()
        return sum(len(one.completion_ids) for one in last)

    given = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": length, "pad_token_id": 0}

    @torch.no_grad()
    def generate() -> float:
        ids = torch.tensor(rows, device=DEVICE).repeat_interleave(G, 0)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=stops, **given)[:, ids.shape[1] :]
        wait()
        stopped = torch.isin(found, torch.tensor(stops, device=DEVICE)).int()
        return int(((stopped.cumsum(1) - stopped) == 0).sum())

    paged = new_model(size)  # continuous batching changes a model's attention

    @torch.no_grad()
    def continuous() -> float:
        found = paged.generate_batch(
            [ids for ids in rows for _ in range(G)],
            generation_config=GenerationConfig(eos_token_id=stops, **given),
            continuous_batching_config=ContinuousBatchingConfig(**size["paged cache"]),
        )
        wait()
        if len(found) < len(rows) * G:
            raise RuntimeError(f"{len(found)} of {len(rows) * G} requests were answered")
        return sum(len(one.generated_tokens) for one in found.values())

    def vllm() -> Callable[[], float]:
        from vllm import LLM, SamplingParams

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.4)
        params = SamplingParams(n=G, max_tokens=length, stop_token_ids=stops, detokenize=False, temperature=1.0)

        def work() -> float:
            found = engine.generate([{"prompt_token_ids": ids} for ids in rows], params, use_tqdm=False)
            return sum(len(one.token_ids) for request in found for one in request.outputs)

        return work

    sides: dict[str, Callable[[], float]] = {"rlseq": rlseq, "generate": generate, "continuous batching": continuous}
    try:
        sides["vLLM, colocated"] = vllm()
    except Exception as error:
        print(f"vLLM: left out: {type(error).__name__}: {error}", flush=True)
    rates = race(tried(sides), repeats)
    wanted = {"generate": (4.0, 4.0), "continuous batching": (1.2, 1.2), "vLLM, colocated": (1.0, 1.0)}
    what = f"rollouts, {len(prompts)} prompts × {G}, tokens/s"
    found = [
        {**result(f"{what}, beside {name}", rates["rlseq"], rate, wanted[name]), "against": name}
        for name, rate in rates.items()
        if name != "rlseq"
    ]
    share = ideal_seconds(model, last, size["prompt"]) * rates["rlseq"] / sum(len(one.completion_ids) for one in last)
    print(f"decoding steps of rlseq at {share:.0%} of the memory's bandwidth", flush=True)
    return [{**row, "share of the bandwidth": share} for row in found]


def ideal_seconds(model: Any, rows: list[Rollout], prompt: int) -> float:
    """Seconds to read, once a step, the weights and all that the cache holds of the rows that still run."""
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    lengths = [len(one.completion_ids) for one in rows]
    held = sum((prompt + step) * sum(n > step for n in lengths) for step in range(max(lengths)))
    numbers = held * cached_numbers(model.config) * next(model.parameters()).element_size()
    return (weights * max(lengths) + numbers) / bandwidth()


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the memory; the best of ten."""
    source = torch.empty(2**28 if DEVICE.type == "cuda" else 2**24, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        wait()
        started = time.perf_counter()
        target.copy_(source)
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / best


# -- updates ----------------------------------------------------------------------------------------------------------


def attention(size: dict[str, Any], tokenizer: Any, repeats: int) -> list[dict[str, Any]]:
    """Forward and backward over packed rows, FlexAttention beside SDPA with the mask written out."""
    prompts = new_prompts(size, tokenizer)[: max(1, size["prompts"] // 16)]
    noise = torch.Generator().manual_seed(2)
    vocabulary, length = size["config"]["vocab_size"], size["completion"]
    groups = [
        (p.prompt_ids, [torch.randint(vocabulary, (length,), generator=noise).tolist() for _ in range(G)])
        for p in prompts
    ]

    def work(name: str) -> Callable[[], float]:
        model = new_model(size, name)
        batch = pack(groups, pad_id=0, device=DEVICE, dtype=torch.bfloat16, attention=name)

        def once() -> float:
            model.zero_grad()
            model.get_decoder()(
                **batch.model_inputs, use_cache=False
            ).last_hidden_state.float().square().mean().backward()
            wait()
            return sum(batch.lengths)

        return once

    rates = race(tried({name: work(name) for name in ("sdpa", FLEX)}), repeats)
    if len(rates) < 2:
        return []
    what = f"packed rows of {len(groups[0][0])} + {G} × {length} tokens, FlexAttention beside SDPA, tokens/s"
    return [result(what, rates[FLEX], rates["sdpa"], None)]


def step(size: dict[str, Any], tokenizer: Any, repeats: int) -> list[dict[str, Any]]:
    """A whole GRPO step."""
    prompts, length = new_prompts(size, tokenizer), size["completion"]
    rows = len(prompts) * G
    layout = next(n for n in range(16, 0, -1) if rows % n == 0)
    common = {"max_completion_length": length, "max_steps": repeats + 1, "num_generations": G}
    common |= {"per_device_train_batch_size": layout, "gradient_accumulation_steps": rows // layout}
    sides = {"rlseq": (ours, {}), "TRL": (theirs, {})}
    paged = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": size["paged cache"],
    }
    sides["TRL, continuous batching"] = (theirs, paged)
    seconds: dict[str, float] = {}
    for name, (make, more) in sides.items():
        try:
            seconds[name] = one_run(make, new_model(size), tokenizer, prompts, {**common, **more})
        except Exception as error:
            print(f"{name}: left out: {type(error).__name__}: {str(error).strip().splitlines()[0]}", flush=True)
    what = f"GRPO step, {len(prompts)} prompts × {G}, steps/s"
    wanted = {"TRL": (3.0, 3.0), "TRL, continuous batching": (1.2, 1.2)}
    return [
        {**result(f"{what}, beside {name}", 1 / seconds["rlseq"], 1 / took, wanted[name]), "against": name}
        for name, took in seconds.items()
        if name != "rlseq"
    ]


def one_run(make: Callable[..., Any], model: Any, tokenizer: Any, prompts: list[Prompt], changes: Any) -> float:
    """Median seconds of a step, the first left out."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, model, tokenizer, prompts, **changes)
        trainer.add_callback(times := StepTimes())
        with quiet():
            trainer.train()
    return statistics.median(times.seconds[1:])


ROWS = {f.__name__: f for f in (rollouts, attention, step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="Which (default: all).")
    parser.add_argument("--repeats", type=int, default=3, help="Turns of each side (default: 3).")
    parser.add_argument("--tiny", action="store_true", help="A tiny model and few prompts: tries the script alone.")
    parser.add_argument("--json", type=Path, help="Write the figures there too.")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.tiny:
        parser.error("no GPU is here; --tiny tries the script on a CPU")
    transformers.utils.logging.set_verbosity_error()
    size = SIZES["tiny" if args.tiny else "0.5B"]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/g2p/base", padding_side="left", trust_remote_code=False)
    rows = []
    for name in args.only:
        found = ROWS[name](size, tokenizer, args.repeats)
        rows += found
        print(table(found), flush=True)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    where = f"{where}, torch {torch.__version__}, {'tiny' if args.tiny else '0.5B'} model"
    print(f"\n{where}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
