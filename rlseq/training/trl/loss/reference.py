"""The reference that the KL is to, as the policy was when its trainer was made.

TRL loads it by the policy's name, and so lacks what `rlseq.engine.model.load` does: weights under wrapped names would
be random. So TRL makes the trainer as if there were no KL, and the reference is added afterwards. Of an adapter TRL
keeps the base, or a copy of the adapter, which needs no loading.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import trl
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from rlseq.engine.model.load import load_model


def reference_of(policy: torch.nn.Module, args: trl.GRPOConfig, adapter: Any = None) -> PreTrainedModel | None:
    """A copy of the policy as it is now; None where there is no KL, or an adapter trains.

    ZeRO-3 holds a part of each weight from the start, which cannot be copied: there it is loaded, by rlseq's loader.

    Args:
        policy: as given to the trainer, before TRL changes it.
        args: of the run.
        adapter: that TRL puts on the policy, or None.

    Raises:
        ModelError: it cannot be copied, and its checkpoint lacks weights.
    """
    if args.beta == 0.0 or adapter is not None or isinstance(policy, PeftModel):
        return None
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(policy)
    options = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation, "device_map": None}
    options |= args.model_init_kwargs or {}
    return load_model(get_config_model_id(policy.config), what="the reference", kind=type(policy), **options)


@contextlib.contextmanager
def reference_added_later(args: trl.GRPOConfig, reference: PreTrainedModel | None) -> Iterator[None]:
    """Let the trainer that is made within have no reference of TRL's, where rlseq has one."""
    kept = args.beta, args.sync_ref_model
    if reference is not None:
        args.beta, args.sync_ref_model = 0.0, False
    try:
        yield
    finally:
        args.beta, args.sync_ref_model = kept


def add_reference(trainer: trl.GRPOTrainer, reference: PreTrainedModel | None) -> None:
    """Give a trainer its reference, wrapped as the run is distributed, and finish the one of an adapter."""
    if reference is None:
        _finish_adapter_reference(trainer.model)
        return
    args, accelerator = trainer.args, trainer.accelerator
    trainer.beta = args.beta
    add_fused_lm_head(reference, temperature=trainer.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    if trainer.is_deepspeed_enabled:
        trainer.ref_model = prepare_deepspeed(reference, accelerator)
    elif trainer.is_fsdp_enabled:
        trainer.ref_model = prepare_fsdp(reference, accelerator)
    else:
        trainer.ref_model = accelerator.prepare_model(reference, evaluation_mode=True)
    if args.sync_ref_model:
        trainer.add_callback(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=accelerator))


@torch.no_grad()
def _finish_adapter_reference(policy: torch.nn.Module) -> None:
    """Finish the copy of an adapter that trains on: TRL leaves out what is no module of its own (embeddings)."""
    if not (isinstance(policy, PeftModel) and "ref" in policy.peft_config):
        return
    named = dict(policy.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        parts = name.split(".")
        if "default" in parts:
            named[".".join("ref" if part == "default" else part for part in parts)].copy_(parameter)
