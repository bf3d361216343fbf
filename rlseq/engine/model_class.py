"""Which of transformers' auto classes makes a language model of a configuration."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rlseq.errors import ModelError

# Encoders that may be made decoders. Their first position is the padding id + 1; those that are given here start at 0.
OTHER_POSITIONS = frozenset(
    ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)


def causal_class(config: PreTrainedConfig) -> type:
    """The auto class for causal language models, or where a kind has none, that of models for images too.

    Raises:
        ModelError: a kind that numbers positions otherwise than rlseq gives them.
    """
    if config.model_type in OTHER_POSITIONS:
        raise ModelError(
            f"models of type {config.model_type!r} count positions from their padding id on, which rlseq does not "
            "serve: its numbers would be wrong. Take a model that was made a decoder from the start."
        )
    images_too = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if images_too and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
