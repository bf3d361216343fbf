"""Quantisation by bitsandbytes, as fields of transformers' `BitsAndBytesConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import BitsAndBytesConfig


def quantization_fields(name: str, dtype: str) -> dict[str, Any] | None:
    """The fields by which a model is quantised, as `rlseq.engine.model.load.load_model` takes them.

    Args:
        name: "4bit" (NF4, as QLoRA trains on), "8bit" (LLM.int8) or "none".
        dtype: of the other weights, by name, in which 4-bit layers compute; with "auto" these compute in float32.
    """
    if name == "none":
        return None
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True).to_dict()
    compute = "float32" if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute).to_dict()


def quantization_bits(fields: Mapping[str, Any] | None) -> int | None:
    """The bits of a quantised weight, of such fields; None where nothing is quantised."""
    if fields is None:
        return None
    return 4 if fields["load_in_4bit"] else 8
