"""Direct preference optimisation by `trl.DPOTrainer`."""

from __future__ import annotations

import copy
from typing import Any

import trl
from peft import PeftModel

from rlseq.engine.model.lora import with_fused_layers
from rlseq.training.models import disable_dropout
from rlseq.training.trl.trainer import RunMixin


class DPOTrainer(RunMixin, trl.DPOTrainer):
    """TRL's DPOTrainer, whose reference is a copy of the policy at its start (of an adapter: its base).

    It logs `logps/chosen` and `logps/rejected`, the log-probs of both completions: the loss reads their difference
    alone, and may make both less likely.
    """

    def __init__(self, model: Any, *, args: Any, peft_config: Any = None, **kwargs: Any):
        if args.disable_dropout:
            disable_dropout(model)
        adapted = peft_config is not None or isinstance(model, PeftModel)
        reference = None if adapted else copy.deepcopy(model)
        super().__init__(model, reference, args=args, peft_config=with_fused_layers(peft_config), **kwargs)
