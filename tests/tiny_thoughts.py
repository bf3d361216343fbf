"""A tokenizer of 23 tokens, as many as the tiny models have; some spell the end of a thought, </t>, with more."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPELLED = ["<", "/", "t", ">"]
JOINED = ["</t>", ">\n", ">a", " a"]  # text is tokenised by character: only a model writes these
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcd \n=1234", *SPELLED, *JOINED]
END = "</t>"


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; decoded, tokens stand side by side."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def ids_of(*tokens: str) -> tuple[int, ...]:
    """The ids of these tokens."""
    return tuple(VOCABULARY.index(token) for token in tokens)
