"""The settings of the precision that an evaluation loads models in."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from rlseq.config.fields import Conflict, setting

NEEDS_BITSANDBYTES = Conflict(
    "needs bitsandbytes, which is not installed: pip install 'rlseq[quantization]'",
    lambda _: importlib.util.find_spec("bitsandbytes") is None,
)
AS_TRAINED = "as_trained"


@dataclass
class PrecisionArguments:
    """What the models' weights are held in."""

    dtype: str = setting(
        "float32",
        "Precision of the models' weights; auto: each checkpoint's own.",
        choices=["float32", "bfloat16", "float16", "auto"],
    )
    quantization: Literal["none", "4bit", "8bit"] = setting(
        "none",
        "Quantise the models, or the bases of adapters, by bitsandbytes: 4bit (NF4), 8bit (LLM.int8), or none: as they "
        "were saved.",
        conflicts=Conflict(NEEDS_BITSANDBYTES.words, lambda c: c.quantization != "none" and NEEDS_BITSANDBYTES.when(c)),
    )


@dataclass
class FinalPrecisionArguments:
    """The same of the evaluation after a training run, which has a precision of its own."""

    eval_quantization: Literal["as_trained", "none", "4bit", "8bit"] = setting(
        AS_TRAINED,
        "Quantise both models of the evaluation after training, or the bases of adapters: as_trained as the run's "
        "base was (by load_in_4bit or load_in_8bit), 4bit or 8bit by bitsandbytes, none: as they were saved.",
        conflicts=Conflict(
            NEEDS_BITSANDBYTES.words,
            lambda c: c.eval_quantization in ("4bit", "8bit") and NEEDS_BITSANDBYTES.when(c),
        ),
    )
