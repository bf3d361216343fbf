"""rlseq: fine-tune language models on sampled rollouts, and contrast likelihood with generation.

The public names below are loaded on first use, so `import rlseq` imports neither torch nor trl and a reward
worker starts in milliseconds. A type checker reads their types from the imports that only it sees.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlseq.config.training import GRPOConfig as GRPOConfig
    from rlseq.config.training import PPOConfig as PPOConfig
    from rlseq.data.chat import reference_ids as reference_ids
    from rlseq.data.rows import load_prompts as load_prompts
    from rlseq.data.rows import load_rows as load_rows
    from rlseq.engine.exact_map import exact_map as exact_map
    from rlseq.engine.likelihood import score as score
    from rlseq.engine.measures import block_nll as block_nll
    from rlseq.engine.sampling import sample as sample
    from rlseq.engine.sampling import stop_ids_of as stop_ids_of
    from rlseq.engine.strategies import Greedy as Greedy
    from rlseq.engine.strategies import Sample as Sample
    from rlseq.errors import RlseqError as RlseqError
    from rlseq.evaluation.run import contrast as contrast
    from rlseq.evaluation.settings import ContrastSettings as ContrastSettings
    from rlseq.scoring import RewardSuite as RewardSuite
    from rlseq.scoring import load_rewards as load_rewards
    from rlseq.scoring import reward as reward
    from rlseq.training.grpo import GRPOTrainer as GRPOTrainer
    from rlseq.training.ppo import PPOTrainer as PPOTrainer
    from rlseq.types import Prompt as Prompt
    from rlseq.types import Rollout as Rollout
    from rlseq.types import ScoredRollout as ScoredRollout

__version__ = "0.1.0"

_PUBLIC = {
    "Prompt": "rlseq.types",
    "Rollout": "rlseq.types",
    "ScoredRollout": "rlseq.types",
    "RlseqError": "rlseq.errors",
    "reward": "rlseq.scoring",
    "load_rewards": "rlseq.scoring",
    "RewardSuite": "rlseq.scoring",
    "load_rows": "rlseq.data.rows",
    "load_prompts": "rlseq.data.rows",
    "reference_ids": "rlseq.data.chat",
    "Greedy": "rlseq.engine.strategies",
    "Sample": "rlseq.engine.strategies",
    "sample": "rlseq.engine.sampling",
    "stop_ids_of": "rlseq.engine.sampling",
    "score": "rlseq.engine.likelihood",
    "block_nll": "rlseq.engine.measures",
    "exact_map": "rlseq.engine.exact_map",
    "GRPOConfig": "rlseq.config.training",
    "GRPOTrainer": "rlseq.training.grpo",
    "PPOConfig": "rlseq.config.training",
    "PPOTrainer": "rlseq.training.ppo",
    "ContrastSettings": "rlseq.evaluation.settings",
    "contrast": "rlseq.evaluation.run",
}

__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # which would take any name, a misspelt one too, for public

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'rlseq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# Two messages of others that nobody who reads them can act on. peft, which transformers' trainer imports, imports
# bitsandbytes wherever that is installed; without a kernel of the hub for its 4-bit weights on a CPU, it warns of that
# where nothing is quantised too. TRL up to 1.16 reads a property of models by the name that transformers deprecates.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
