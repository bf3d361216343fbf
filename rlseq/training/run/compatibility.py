"""Checkpoint compatibility: a run resumes only from a checkpoint of the model that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlseq.engine.model.load import is_adapter, load_config, load_tokenizer
from rlseq.errors import ModelError

# What a configuration holds beside the model: how it was initialised, and what saving, training or a release changes.
_IGNORED = re.compile(
    "_?name_or_path|architectures|attn_implementation|(torch_)?dtype|output_router_logits|quantization_config|"
    "router_aux_loss_coef|transformers_version|use_cache|.*token_id|.*(dropout|pdrop).*|initializer_.*"
)
_SHOWN = 6


def check_compatible(checkpoint: Path, name_or_path: str, *, revision: str = "main", use_peft: bool = False) -> None:
    """Refuse to resume from a checkpoint of another model than the one named; no weights are loaded.

    Compared are the configuration, but for token ids and what saving changes, the vocabulary, and whether an adapter
    or the whole model is trained.

    Args:
        checkpoint: the folder to resume from.
        name_or_path, revision: the model that the run starts from.
        use_peft: whether the run puts a new adapter on it.

    Raises:
        ModelError: it says what differs, the checkpoint's value first.
    """
    held = (checkpoint / "adapter_model.safetensors").is_file()
    wanted = use_peft or is_adapter(name_or_path)
    if held != wanted:
        kinds = {True: "an adapter (LoRA)", False: "a whole model"}
        raise ModelError(
            f"{checkpoint} holds {kinds[held]}, but the run trains {kinds[wanted]}. {_TO_DO.format(name=name_or_path)}"
        )
    differing = []
    if not held:
        own = load_config(name_or_path, revision=revision).to_dict()
        differing = differences(load_config(checkpoint).to_dict(), own)
    if not differing:
        differing = _vocabulary(checkpoint, name_or_path, revision)
    if differing:
        raise ModelError(
            f"{checkpoint} is of another model than {name_or_path!r}: {'; '.join(differing)}. "
            f"{_TO_DO.format(name=name_or_path)}"
        )


_TO_DO = "Give --model_name_or_path the model that the checkpoint's run started from, or start {name!r} again."


def check_compatible_new_model(checkpoint: Path, new_model: Mapping[str, Any]) -> None:
    """The same for a model built from a config: each value that its config names is compared.

    Raises:
        ModelError: it says what differs, the checkpoint's value first.
    """
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    differing = differences(saved, {name: new_model[name] for name in new_model if name in saved})
    if differing:
        raise ModelError(f"{checkpoint} is of another model than new_model: {'; '.join(differing)}.")


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return `"hidden_size 32, not 64"` for each value of a configuration that makes another model of it."""
    names = [name for name in wanted if not _IGNORED.fullmatch(name)]
    found = [f"{name} {saved.get(name)!r}, not {wanted[name]!r}" for name in names if saved.get(name) != wanted[name]]
    kind = [text for text in found if text.startswith("model_type ")]
    if kind:
        return kind  # the rest differs for that reason
    return found[:_SHOWN] + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def _vocabulary(checkpoint: Path, name_or_path: str, revision: str) -> list[str]:
    if not (checkpoint / "tokenizer_config.json").is_file():
        return []
    saved = load_tokenizer(checkpoint).get_vocab()
    own = load_tokenizer(name_or_path, revision=revision).get_vocab()
    moved = sorted(token for token in saved.keys() | own.keys() if saved.get(token) != own.get(token))
    if not moved:
        return []
    example = moved[0]
    return [
        f"{len(moved)} tokens of the vocabulary, such as {example!r} (id {saved.get(example)}, not {own.get(example)})"
    ]
