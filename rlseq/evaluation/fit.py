"""Whether checkpoints can read the data, by the doctor's checks that run no model: before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.data import build_prompts
from rlseq.doctor.finding import FAILED
from rlseq.doctor.preflight import load_configs, preflight
from rlseq.errors import ModelError
from rlseq.evaluation.loading import load_tokenizer

# What an evaluation cannot do without; the others are of training.
CHECKS = {"padding", "stop tokens", "context", "vocabulary"}


def check_models(
    models: Mapping[str, str | Path], rows: Sequence[Mapping[str, Any]], prompt_options: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that cannot hold these prompts and references, whose tokens it lacks, or that never ends.

    Raises:
        ModelError: says which, what was found and what to do.
    """
    for name, path in models.items():
        tokenizer = load_tokenizer(name, str(path))
        prompts = build_prompts(rows, tokenizer, **prompt_options)
        try:
            model_config, generation_config = load_configs(str(path))
        except ModelError as error:
            raise ModelError(f"cannot load model {name!r} from {str(path)!r}: {error}") from error
        findings = preflight(model_config, tokenizer, prompts, generation_config=generation_config)
        failed = [f for f in findings if f.status == FAILED and f.check in CHECKS]
        if failed:
            said = [f"model {name!r} ({path}) does not fit the data (`rlseq doctor` looks further)."]
            raise ModelError("\n  ".join([*said, *(f.sentence for f in failed)]))
