"""The auto class of transformers that makes a language model of a configuration."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rlseq.errors import ModelError

# Encoders that can be decoders. Their positions start at the padding id + 1, and those of rlseq at 0. The self-tests do
# not cover them: they test whether positions are followed, not where the model was trained to start.
OTHER_POSITIONS = frozenset(
    ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)


def causal_class(config: PreTrainedConfig) -> type:
    """The auto class for causal language models; for a type without one, that of image-text models.

    Raises:
        ModelError: a type that numbers positions in another way than rlseq.
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
