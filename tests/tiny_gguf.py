"""A tiny GGUF file, written by llama.cpp's own package: Qwen2 with 8-bit weights and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH, LAYERS, HEADS, HIDDEN = 32, 2, 2, 64
PAD, EOS = 256, 257


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write the file; returns its weights by transformers' names, as the package itself restores them."""
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*bytes_to_unicode().values(), "<|endoftext|>", "<eos>", "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    names = {"token_embd": ("embed_tokens", (259, WIDTH)), "output_norm": ("norm", (WIDTH,))}
    for layer in range(LAYERS):
        inner = {
            "attn_norm": ("input_layernorm", (WIDTH,)),
            "attn_q": ("self_attn.q_proj", (WIDTH, WIDTH)),
            "attn_k": ("self_attn.k_proj", (WIDTH // HEADS, WIDTH)),
            "attn_v": ("self_attn.v_proj", (WIDTH // HEADS, WIDTH)),
            "attn_output": ("self_attn.o_proj", (WIDTH, WIDTH)),
            "ffn_norm": ("post_attention_layernorm", (WIDTH,)),
            "ffn_gate": ("mlp.gate_proj", (HIDDEN, WIDTH)),
            "ffn_up": ("mlp.up_proj", (HIDDEN, WIDTH)),
            "ffn_down": ("mlp.down_proj", (WIDTH, HIDDEN)),
        }
        names |= {f"blk.{layer}.{name}": (f"layers.{layer}.{own}", shape) for name, (own, shape) in inner.items()}
    weights = {}
    for name, (own, shape) in names.items():
        values = (0.4 * random.standard_normal(shape)).astype(np.float32)
        if len(shape) == 2:
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
        weights[f"model.{own}.weight"] = torch.from_numpy(values.copy())
        if name.endswith(("attn_q", "attn_k", "attn_v")):
            bias = random.standard_normal(shape[:1]).astype(np.float32)
            writer.add_tensor(f"{name}.bias", bias)
            weights[f"model.{own}.bias"] = torch.from_numpy(bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
