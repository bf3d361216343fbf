"""Tiny random models of several families, small enough to run a test in milliseconds.

Their weights are sampled wide (the usual 0.02 leaves attention uniform and logits flat, so that a wrong mask or
position would change next to nothing), so a token that sees what it should not changes the outcome visibly.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 23
PAD, BOS, EOS = 0, 1, 2
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3")


def tiny_config(family: str = "llama", **changes) -> PretrainedConfig:
    """The configuration of `tiny_model`; `changes` override its fields."""
    common = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if family == "gpt2":
        fields = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**{**common, **fields, **changes})
    fields = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
    }
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
    if family == "mistral":
        fields["sliding_window"] = 4  # shorter than what the tests give it
    return configs[family](**{**common, **fields, **changes})


def tiny_model(
    family: str = "llama", *, seed: int = 0, attn_implementation: str = "sdpa", dtype=torch.float32, **changes
) -> PreTrainedModel:
    """A random model in eval mode: one of FAMILIES, or "mistral" with a sliding window of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, **changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        for parameter in model.parameters():  # biases start at 0: move them, so that a test would notice one lost
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()
