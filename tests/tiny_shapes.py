"""Tiny random models whose shapes are unusual: mixtures of experts, attention beside state, windows, images too."""

from __future__ import annotations

import torch
from tiny import BOS, EOS, PAD, VOCAB
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.0}
DELTA = {  # Qwen3-Next's layers: a gated delta rule beside attention
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

SHAPES: dict[str, tuple[str, dict]] = {  # name: model type and its configuration
    "qwen2_moe": ("qwen2_moe", {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**TEXT, **EXPERTS}),
    "mixtral": ("mixtral", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3_text": (
        "gemma3_text",
        {**TEXT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**TEXT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 20,
            "boi_token_index": 21,
            "eoi_token_index": 22,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            "image_token_id": 20,
            "video_token_id": 21,
            "vision_start_token_id": 22,
            "vision_end_token_id": 19,
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            "text_config": {**TEXT, **DELTA},
            "vision_config": QWEN_VISION,
            "image_token_id": 20,
            "video_token_id": 21,
            "vision_start_token_id": 22,
            "vision_end_token_id": 19,
        },
    ),
    "qwen3_next": ("qwen3_next", {**TEXT, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "lfm2": ("lfm2", {**TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "bamba": ("bamba", {**TEXT, **MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**TEXT, **MAMBA, "mamba_d_ssm": 32}),
    "jamba": (
        "jamba",
        {
            **TEXT,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.4},
    ),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "initializer_range": 0.4,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**TEXT, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 32},
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}),
    "xlstm": ("xlstm", {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}),
    "rwkv": (
        "rwkv",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "context_length": 64,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def tiny_shape(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model of one of SHAPES in eval mode; its parameters are sampled wide, as those of `tiny_model`."""
    model_type, values = SHAPES[name]
    config = CONFIG_MAPPING[model_type](**values, **IDS)
    for part in (config, config.get_text_config()):
        for key, value in IDS.items():
            setattr(part, key, value)
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
