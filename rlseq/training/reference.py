"""The reference that the KL is to, as the policy was when its trainer was made."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel


@torch.no_grad()
def begin_reference_at_start(trainer: Any) -> None:
    """Let the reference be the policy that the run starts from, where TRL made it and did not finish.

    Of an adapter that trains on, TRL copies the weights that are modules of their own, and not those of embeddings.
    A whole model TRL loads again by its name, without what `rlseq.pretrained` does; sharded it stays as it was loaded.
    """
    policy, reference = trainer.model, trainer.ref_model
    if isinstance(policy, PeftModel) and "ref" in policy.peft_config:
        named = dict(policy.named_parameters(remove_duplicate=False))
        for name, parameter in named.items():
            parts = name.split(".")
            if "default" in parts:
                named[".".join("ref" if part == "default" else part for part in parts)].copy_(parameter)
    elif reference is not None and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        held = policy.state_dict()
        for name, tensor in trainer.accelerator.unwrap_model(reference).state_dict().items():
            if name in held and held[name].shape == tensor.shape:
                tensor.copy_(held[name])
