"""The reference that the KL is to, as the policy was when its trainer was made."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer import grpo_trainer

from rlseq.engine.models import load_model


@contextlib.contextmanager
def reference_of(policy: PreTrainedModel) -> Iterator[None]:
    """Let the reference that TRL makes within be a copy of the policy; TRL would load it by its name.

    What it loads by name lacks what `rlseq.engine.models` does: weights under wrapped names would be random. ZeRO-3
    holds a part of each weight from the start, which cannot be copied: there it is loaded, by rlseq's loader.
    """

    def reference(name_or_path: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        if is_deepspeed_zero3_enabled():
            return load_model(name_or_path, what="the reference", kind=type(policy), **options)
        return copy.deepcopy(policy)

    by_trl, grpo_trainer.create_model_from_path = grpo_trainer.create_model_from_path, reference
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = by_trl


@torch.no_grad()
def begin_adapter_reference(policy: torch.nn.Module) -> None:
    """Finish the copy of an adapter that trains on: TRL leaves out what is no module of its own (embeddings)."""
    if not (isinstance(policy, PeftModel) and "ref" in policy.peft_config):
        return
    named = dict(policy.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        parts = name.split(".")
        if "default" in parts:
            named[".".join("ref" if part == "default" else part for part in parts)].copy_(parameter)
