"""Defaults that differ from those of TRL and transformers for every recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlseq.config.fields import at_least, setting
from rlseq.config.groups.chat_template import template_options
from rlseq.config.validation import checks, inherited


def bf16_supported() -> bool:
    """Whether this machine's accelerator computes in bfloat16 (a CPU is left in float32)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return hasattr(torch, "xpu") and torch.xpu.is_available()


Checks = tuple[Callable[[Any], None], ...]


@dataclass
class DefaultsMixin:
    """Defaults that differ from TRL's, for every recipe.

    * bf16: only where the accelerator computes in it (TRL: always, which raises on a machine without one).
    * gradient_checkpointing: off without an accelerator, where it only costs time.
    * use_cpu: on without an accelerator (TRL: off, and several processes then come up as one each).
    * logging_nan_inf_filter: off, so that a NaN loss is seen.
    * report_to: none, since metrics.jsonl holds every number; name a tracker to use it.
    * logging_steps 1 and save_only_model off, so that any step can be looked at and resumed from.
    """

    bf16: bool | None = setting(None, "bf16 mixed precision (default: where the accelerator supports it).")
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations in the backward pass, to save memory (default: on accelerators only)."
    )
    use_cpu: bool | None = setting(None, "Train on the CPU (default: where there is no accelerator).")
    logging_nan_inf_filter: bool = setting(
        False, "Leave NaN and infinite losses out of the logged mean (TRL's default: true)."
    )
    report_to: str | list[str] = setting("none", "Trackers to report to, or none.")
    logging_steps: float = setting(1, "Log every N steps.")
    output_dir: str | None = setting("runs/run", "The run directory.")
    max_skipped_steps: int = setting(
        3,
        "End the run after N optimizer steps in a row whose loss or gradient was not finite; they are skipped.",
        range=at_least(1),
    )

    ranges_of_inherited = inherited.RANGES
    conflicts_of_inherited = inherited.CONFLICTS_OF_ALL
    checks_as_given: ClassVar[Checks] = (checks.validate_length,)
    checks_filled_in: ClassVar[Checks] = (checks.validate_trackers,)

    def __post_init__(self) -> None:
        if getattr(self, "chat_template_kwargs", None) is not None:
            self.chat_template_kwargs = template_options(self.chat_template_kwargs)
        self.asked_direction = self.greater_is_better  # transformers fills it in by the name of the measure
        if self.use_cpu is None:
            self.use_cpu = not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = bf16_supported() and not self.fp16
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = torch.accelerator.is_available()
        # transformers' name of the same setting from 5.23 on; before, there is no such field
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"hub_token": None}  # transformers pickles settings into what is pushed
