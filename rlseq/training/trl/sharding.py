"""Whole weights for as long as ranks call a model on their own: FSDP2's forward is a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def whole_weights(model: nn.Module, *, reshard_after_forward: bool = True) -> Iterator[None]:
    """Gather what FSDP2 has sharded, once, and keep it while the body runs; any other model is left alone.

    A sharded forward gathers the weights of each layer from all ranks, so ranks that decode unequal numbers of steps
    would wait for each other for ever. TRL leaves this to the model's forward. Memory: the whole weights on each rank,
    in the precision of the forward.

    Args:
        model: what `fully_shard` was called on, or a model that is whole.
        reshard_after_forward: what its units go back to; the outermost keeps its weights, as it does by default.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)
