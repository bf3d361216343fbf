"""A budget for the KV cache of decoding: what it holds is never exceeded, and the completions stay what they are."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_data import word_tokenizer
from tiny import EOS, FAMILIES, tiny_model
from transformers import DynamicCache

from rlseq import evaluation
from rlseq.config.training import EvaluationArguments
from rlseq.engine.decoding.kv_budget import rows_within
from rlseq.engine.exact_map import exact_map_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import parse_strategy
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.decode import decode
from rlseq.evaluation.run import ContrastSettings, check_settings, contrast
from rlseq.scoring import load_rewards
from rlseq.types import Prompt

PROMPTS = [Prompt(key=str(n), prompt="", prompt_ids=tuple(range(3, 3 + n))) for n in (6, 1, 3, 2, 6, 4, 5)]
LONGEST = 5
DECODERS = ("sample", "decode", "exact_map_prompts")
TOKENS = 6 + LONGEST  # of the longest row


def letters(completion: str) -> float:
    return float(len(completion))


def held(cache):
    """Bytes of all keys and values."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


class Watch:
    """The largest number of rows and of bytes of the cache that any forward pass had."""

    def __init__(self, model):
        self.rows = self.bytes = 0
        self.handle = model.register_forward_hook(self.look, with_kwargs=True)

    def look(self, model, args, kwargs, output):
        if kwargs.get("use_cache"):
            self.rows = max(self.rows, kwargs["input_ids"].size(0))
            self.bytes = max(self.bytes, held(output.past_key_values))


def decoded(model, text, max_kv_gb=None):
    """Completions under a strategy, and what was in flight at most."""
    watch = Watch(model)
    with load_rewards([letters]) as suite:
        groups = decode(
            model,
            PROMPTS,
            strategy=parse_strategy(text),
            suite=suite,
            num_samples=4,
            max_new_tokens=LONGEST,
            seed=0,
            stream=0,
            stop_ids=[EOS],
            tokenizer=None,
            max_kv_gb=max_kv_gb,
        )
    watch.handle.remove()
    return [[(r.sample, r.completion_ids) for r in group] for group in groups], watch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_holds_so_many_rows_and_no_more(family, dtype):
    model = tiny_model(family, dtype=dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((3, 7), 5), past_key_values=cache, use_cache=True)
    assert rows_within(model, held(cache) / 1e9, 7) == 3
    assert rows_within(model, (held(cache) - 1) / 1e9, 7) == 2


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        ("greedy", 1),
        ("greedy", 3),
        ("sample", 1),  # fewer than the samples of a prompt
        ("sample", 3),
        ("sample", 10),
        ("best_of:n=5", 2),
        ("beam:width=2", 2),
        ("beam:width=2", 5),
    ],
)
def test_rows_in_flight_stay_within_the_budget_and_completions_the_same(strategy, rows):
    model = tiny_model("llama")
    row_bytes = 2 * 2 * 1 * 8 * 4 * TOKENS  # layers, keys and values, heads, head dimension, float32
    found, watch = decoded(model, strategy, max_kv_gb=(rows + 0.5) * row_bytes / 1e9)
    expected, unbounded = decoded(model, strategy)
    assert found == expected
    assert watch.rows <= rows and watch.bytes <= rows * row_bytes
    assert unbounded.rows > rows
    if strategy in ("greedy", "sample"):
        assert watch.rows == (8 if rows == 10 else rows)  # all that fits is used; 4 samples stay together if they can


@pytest.mark.parametrize(("width", "rows"), [(3, 32), (40, 41)])
def test_exact_search_stays_within_the_budget_and_finds_the_same(width, rows):
    model = tiny_model("llama")
    row_bytes = 2 * 2 * 1 * 8 * 4 * TOKENS  # layers, keys and values, heads, head dimension, float32
    options = {"max_new_tokens": LONGEST, "stop_ids": [EOS], "width": width}
    watch = Watch(model)
    found = exact_map_prompts(model, PROMPTS, max_kv_gb=(rows + 0.5) * row_bytes / 1e9, **options)
    watch.handle.remove()
    assert watch.rows <= rows and watch.bytes <= rows * row_bytes
    assert found == exact_map_prompts(model, PROMPTS, **options)
    with pytest.raises(ConfigError, match=r"does not hold (32|40) rows, which are decoded together"):
        exact_map_prompts(model, PROMPTS, max_kv_gb=1e-8, **options)


@pytest.mark.parametrize("path", sorted(Path(evaluation.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_all_that_an_evaluation_decodes_is_told_of_the_budget(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DECODERS:
            assert "max_kv_gb" in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"


def test_samples_beyond_a_batch_go_on_in_the_next_and_a_prompt_is_done_once():
    model, done = tiny_model("llama"), []
    options = {"num_samples": 5, "max_new_tokens": 4, "strategy": parse_strategy("sample"), "seed": 0}
    groups = sample(model, PROMPTS, stop_ids=[EOS], batch_rows=2, progress=done.append, **options)
    expected = sample(model, PROMPTS, stop_ids=[EOS], **options)
    assert sum(done) == len(PROMPTS)
    ids = [[[(r.sample, r.completion_ids) for r in group] for group in found] for found in (groups, expected)]
    assert ids[0] == ids[1] and [s for s, _ in ids[0][0]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        ("sample", "one row"),
        ("beam:width=3", "3 rows, which are decoded together,"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_works(strategy, what):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=f"--max_kv_gb is 1e-08, which does not hold {what} of {TOKENS} tokens") as e:
        decoded(model, strategy, max_kv_gb=1e-8)
    least = float(re.search(r"give at least (\S+)$", str(e.value)).group(1))
    decoded(model, strategy, max_kv_gb=least)
    with pytest.raises(ConfigError, match="--max_kv_gb"):
        decoded(model, strategy, max_kv_gb=least - 2e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_budget_that_is_none_is_refused_before_a_model_loads(value):
    with (
        load_rewards([letters]) as suite,
        pytest.raises(ConfigError, match=r"--max_kv_gb is .* expected a number above"),
    ):
        check_settings(ContrastSettings(max_kv_gb=value), suite)
    with load_rewards([letters]) as suite, pytest.raises(ConfigError, match="--eval_batch_size is 0"):
        check_settings(ContrastSettings(eval_batch_size=0), suite)


def test_an_evaluation_keeps_to_its_budget_and_gives_the_same_samples_and_signature(tmp_path):
    tiny_model("llama", initializer_range=0.3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a b = ", "references": ["A B"]}, {"prompt": "c = ", "references": ["C"]}] * 3
    settings = EvaluationArguments(studies=["ranking"], resamples=20, max_kv_gb=1e-5)
    assert ContrastSettings.of(settings).max_kv_gb == 1e-5
    found = []
    for budget in (settings.max_kv_gb, None):
        more = {"max_new_tokens": 4, "max_kv_gb": budget, "strategies": ("greedy", "sample")}
        with load_rewards([letters]) as suite:
            results = contrast(
                {"m": tmp_path / "model"},
                rows,
                suite,
                settings=ContrastSettings.of(settings, **more),
                output_dir=tmp_path,
                quiet=True,
            )
        samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        found.append((results["spec"], [(s["strategy"], s["key"], s["sample"], s["completion"]) for s in samples]))
    assert found[0] == found[1]
    assert "max_kv_gb" not in found[0][0]["settings"]
