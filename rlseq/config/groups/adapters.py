"""The settings of the model, its adapter and quantisation: what they stand for, and which have no effect.

Nothing is loaded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trl
from peft import PeftConfig

from rlseq.config.arguments import EvaluateArguments
from rlseq.config.fields import as_declared, setting
from rlseq.config.groups.precision import AS_TRAINED
from rlseq.config.validation import inherited
from rlseq.config.validation.validate import check_declared
from rlseq.engine.model.load import is_adapter
from rlseq.engine.model.quantization import quantization_bits, quantization_fields


@dataclass
class ModelArguments(trl.ModelConfig):
    """The model: TRL's ModelConfig, in float32 unless told otherwise."""

    _argument_group_name = "model (TRL's ModelConfig)"

    merge_adapter: bool = setting(
        False, "When training ends, also write the adapter merged into its base, a whole model, to RUN/merged."
    )

    allow_missing_weights: bool = as_declared(EvaluateArguments, "allow_missing_weights")

    ranges_of_inherited = inherited.ADAPTER_RANGES
    needs_of_inherited = inherited.OF_ADAPTERS
    conflicts_of_inherited = inherited.CONFLICTS_OF_ADAPTERS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_declared(self)
        target = self.lora_target_modules
        if isinstance(target, str) and target.isidentifier():
            self.lora_target_modules = [target]  # TRL unpacks a list of one, and peft takes a text for a whole path


def peft_config_of(model_args: trl.ModelConfig) -> PeftConfig | None:
    """The adapter that the settings ask for; None without `use_peft`."""
    return trl.get_peft_config(model_args)


def quantization_of(model_args: trl.ModelConfig) -> dict[str, Any] | None:
    """The quantisation of a run, as `ContrastSettings.quantization` takes it; None where there is none."""
    config = trl.get_quantization_config(model_args)
    return None if config is None else config.to_dict()


def evaluated_quantization(name: str, dtype: str, model_args: trl.ModelConfig) -> dict[str, Any] | None:
    """The quantisation of a run's final evaluation, by the values of --eval_quantization and --eval_dtype."""
    return quantization_of(model_args) if name == AS_TRAINED else quantization_fields(name, dtype)


def quantization_note(model_args: trl.ModelConfig, evaluated: Mapping[str, Any] | None) -> str | None:
    """Say that a run's final evaluation is of quantised weights, or of others than trained; None of plain ones.

    Args:
        evaluated: the quantisation of the evaluation, as `evaluated_quantization` gives it.
    """
    trained, bits = quantization_bits(quantization_of(model_args)), quantization_bits(evaluated)
    if bits is None and trained is None:
        return None
    if bits != trained:
        taken, before = ("as they were saved" if n is None else f"in {n} bits" for n in (bits, trained))
        return (
            f"This evaluation loads the weights (of adapters, the base) {taken}, and training had them {before} "
            "(--eval_quantization): its numbers are of other weights than those that were trained."
        )
    return (
        f"This evaluation takes the base in {bits} bits, as training did, with and without the adapter. On the base as "
        "it was saved, which `rlseq evaluate` and --merge_adapter take, the numbers are others."
    )


def ignored_adapter_settings(model_args: trl.ModelConfig) -> str | None:
    """A sentence about flags of a new adapter, where the run makes none; None where nothing is ignored."""
    if model_args.use_peft:
        return None
    given = [
        field.name
        for field in dataclasses.fields(model_args)
        if field.name.startswith(("lora_", "use_dora", "use_rslora"))
        and getattr(model_args, field.name) != field.default
    ]
    if not given:
        return None
    if is_adapter(model_args.model_name_or_path):
        return f"{', '.join(given)} come to nothing: the adapter {model_args.model_name_or_path} trains on as it is"
    return f"{', '.join(given)} come to nothing: the run trains all weights and no adapter (--use_peft true)"
