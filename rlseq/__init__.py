"""rlseq: fine-tune language models on sampled rollouts, and contrast likelihood with generation.

The public names below are loaded on first use, so `import rlseq` imports neither torch nor trl and a reward
worker starts in milliseconds.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Prompt": "rlseq.types",
    "Rollout": "rlseq.types",
    "ScoredRollout": "rlseq.types",
    "RlseqError": "rlseq.errors",
    "reward": "rlseq.scoring",
    "load_rewards": "rlseq.scoring",
    "RewardSuite": "rlseq.scoring",
    "load_rows": "rlseq.data",
    "load_prompts": "rlseq.data",
    "reference_ids": "rlseq.data",
    "Greedy": "rlseq.decoding",
    "Sample": "rlseq.decoding",
    "sample": "rlseq.sampler",
    "stop_ids_of": "rlseq.sampler",
    "score": "rlseq.likelihood",
    "GRPOConfig": "rlseq.training.config",
    "GRPOTrainer": "rlseq.training.grpo",
    "PPOConfig": "rlseq.training.config",
    "PPOTrainer": "rlseq.training.ppo",
    "ContrastSettings": "rlseq.evaluation.settings",
    "contrast": "rlseq.evaluation.contrast",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlseq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
