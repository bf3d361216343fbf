"""A tiny random model over bytes, with a context that texts are longer than, and the tokenizer that goes with it."""

from __future__ import annotations

import torch
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
VOCAB = FIRST + len(BYTES)
CONTEXT = 16


def byte_tokenizer(**special) -> PreTrainedTokenizerFast:
    """A token a byte; which of BOS and EOS the tokenizer knows is told. Unless told not to, it ends a text in <eos>."""
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, **{c: FIRST + i for i, c in enumerate(BYTES)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", **special)


def byte_model(family: str = "llama", seed: int = 0, dtype=torch.float64) -> PreTrainedModel:
    """Wide random weights, so that the tokens that are seen matter."""
    limit = {"n_positions" if family == "gpt2" else "max_position_embeddings": CONTEXT}
    return tiny_model(family, seed=seed, dtype=dtype, vocab_size=VOCAB, initializer_range=0.5, **limit)
