"""A tokenizer for chats with tools, a tiny model that goes with it, and turns that a test chose."""

from __future__ import annotations

import torch
from tiny import tiny_model
from tiny_bytes import BYTES, EOS, FIRST, PAD
from tiny_task import tiny_trainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte and one for each mark of a turn, with Qwen3's template; <eos> ends a turn."""
    marks = ["<tool_call>", "</tool_call>", "<|im_start|>", "<think>", "</think>"]
    vocabulary = {"<pad>": PAD, "<bos>": 1, "<eos>": EOS, **{c: FIRST + i for i, c in enumerate(BYTES)}}
    tokens = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokens.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


def chat_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, with room for the template's words of a tool."""
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.1)
    model.generation_config.eos_token_id = EOS
    return model


class Scripted:
    """Stands in for `generate`: `turn(row, text)` is what the model says next, marks and all."""

    def __init__(self, tokenizer, turn):
        self.tokenizer, self.turn, self.seen = tokenizer, turn, []

    def __call__(self, input_ids=None, **_):
        texts = self.tokenizer.batch_decode(input_ids)
        self.seen += texts
        turns = [self.turn(row, text) for row, text in enumerate(texts)]
        said = self.tokenizer(text=turns, padding=True, padding_side="right", return_tensors="pt").input_ids
        return torch.cat([input_ids, said.to(input_ids.device)], 1)


def scripted_trainer(path, monkeypatch, turn, **settings):
    """A GRPO trainer of chats whose model says what `turn` chose, and the `Scripted` that stands in for it."""
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    trainer = tiny_trainer(path, model=model, tokenizer=tokenizer, **settings)
    scripted = Scripted(tokenizer, turn)
    monkeypatch.setattr(model, "generate", scripted)
    return trainer, scripted
