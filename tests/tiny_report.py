"""The results and samples of a small contrast, as results.json and samples.jsonl hold them."""

import pytest

HOSTILE = "<script>alert('x')</script> | **b** ![i](http://evil.example/x.png)"


def value(x, half=0.01):
    return {"value": x, "ci95": [x - half, x + half]}


def compared(metric, strategy, difference, ci95, p=0.01):
    return {
        "a": "base",
        "b": "rl",
        "strategy": strategy,
        "metric": metric,
        "difference": difference,
        "ci95": ci95,
        "p_value": p,
    }


def quality(wer, length):
    return {
        "accuracy_x": value(1 - wer / 4),
        "wer": value(wer),
        "exact_match": value(1 - wer),
        "length": value(length),
    }


def chance(p):
    return {"expected_accuracy": value(p), "unreachable": value(0.1), "unreachable_references": value(0.2)}


@pytest.fixture
def results():
    return {
        "schema": 1,
        "rows": 4,
        "spec": {"seed": 0, "settings": {"strategies": ["greedy", "sample"]}},
        "models": {
            "base": {
                "path": "runs/base",
                "likelihood": {
                    "nll_per_token": value(0.21),
                    "expected_accuracy": value(0.50),
                    "exact_pass_at_k": {"1": value(0.50), "2": value(0.7), "4": value(0.8)},
                },
                "strategies": {"greedy": quality(0.32, 7), "sample": quality(0.40, 7) | chance(0.50)},
            },
            "rl": {
                "path": "runs/rl",
                "likelihood": {
                    "nll_per_token": value(0.25),
                    "expected_accuracy": value(0.64),
                    "exact_pass_at_k": {"1": value(0.64), "2": value(0.75), "4": value(0.81)},
                },
                "strategies": {"greedy": quality(0.30, 7), "sample": quality(0.36, 7.2) | chance(0.64)},
            },
        },
        "comparisons": [
            compared("nll_per_token", None, 0.04, [0.03, 0.05]),
            compared("expected_accuracy", None, 0.14, [0.1, 0.18]),
            compared("length", "greedy", 0.0, [0.0, 0.0], 1.0),
            compared("wer", "greedy", -0.02, [-0.03, -0.01], 0.0004),
            compared("wer", "sample", -0.04, [-0.09, 0.01], 0.2),
        ],
        "metrics": {
            "accuracy_x": {"higher_is_better": True, "kind": "reward", "description": "", "percent": False},
            "wer": {
                "label": "WER",
                "higher_is_better": False,
                "kind": "corpus",
                "description": "share wrong",
                "percent": True,
            },
        },
        "primary": {"metric": "wer", "strategy": "greedy", "a": "base", "b": "rl"},
        "notes": ["A note & a half."],
    }


def sample(model, key, completion, total, strategy="greedy", number=0):
    return {
        "model": model,
        "strategy": strategy,
        "key": key,
        "prompt": f"prompt {key}",
        "references": ["K AE T"],
        "sample": number,
        "completion": completion,
        "values": {"accuracy_x": total},
        "total": total,
        "logprob": -1.0,
        "length": 3,
        "finish_reason": "stop",
    }


@pytest.fixture
def samples():
    return [
        sample("base", "r1", "K AE D", 0.5),
        sample("rl", "r1", "K AE T", 1.0),
        sample("base", "r2", "K AE T", 1.0),
        sample("rl", "r2", HOSTILE, 0.0),
        sample("base", "r3", "K AE T", 1.0),
        sample("rl", "r3", "K AE T", 1.0),
        sample("base", "r4", "", 0.0),
        sample("rl", "r4", "AE T", 0.7),
    ]


METRICS = [
    {"step": i, "reward": 0.5 + i / 100, "kl": 0.01 * i, "reference_nll": 0.2, "rewards/a/mean": 0.1}
    for i in range(1, 41)
] + [{"step": 40, "train_runtime": 3.0, "reward": float("nan")}]
