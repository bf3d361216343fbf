"""What vLLM needs on a CPU, where a run can use it at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.import_utils import is_vllm_available

from rlseq.errors import ConfigError

PACKED = "vLLM on a CPU packs the weights of {}, over which the policy's cannot be loaded. Leave out use_vllm."


@contextlib.contextmanager
def vllm_on_cpu(args: Any, policy: PreTrainedModel) -> Iterator[None]:
    """Let the engine that TRL makes within keep its weights as they are loaded, where vLLM is its CPU build.

    The CPU build packs each linear layer for oneDNN once the checkpoint is loaded. It drops the parameter, so that the
    first weights of the policy end in "'Parameter' object has no attribute 'weight_loader'"; a head tied to the
    embedding keeps its parameter, but the packed copy would keep the checkpoint's. Neither an environment
    variable nor an argument turns that off. Plain layers cost time, on a CPU alone.

    Args:
        args: of the run; nothing is changed without vLLM, or on a GPU.
        policy: what is trained.

    Raises:
        ConfigError: the model has a layer that vLLM can only run packed; or a server is to be sent weights, which TRL
            does from GPUs alone.
    """
    if args.use_vllm and args.vllm_mode == "server" and args.device.type == "cpu":
        try:
            yield
        except NotImplementedError as error:
            raise ConfigError(f"vllm_mode is server: {error} On a CPU give --vllm_mode colocate.") from error
        return
    if not (args.use_vllm and args.vllm_mode == "colocate" and is_vllm_available()):
        yield
        return
    from vllm.model_executor.layers import utils  # with vLLM alone
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return

    if hasattr(policy.config.get_text_config(), "output_router_logits"):
        raise ConfigError(PACKED.format("a mixture of experts"))

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            raise ConfigError(PACKED.format(type(layer).__name__))
        layer.cpu_linear = torch.nn.functional.linear

    by_vllm, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = by_vllm
