"""Settings of preference optimisation: pairs from logged rollouts, and TRL's DPOConfig."""

from __future__ import annotations

from dataclasses import dataclass

import trl

from rlseq.config.defaults import DefaultsMixin
from rlseq.config.fields import Need, at_least, setting
from rlseq.config.validation import inherited
from rlseq.config.validation.validate import Settings, validate, validate_given


@dataclass
class PairArguments(Settings):
    """Preference pairs: within each group of rollouts, a completion with a higher total against one with a lower."""

    _argument_group_name = "preference pairs (rlseq)"

    from_rollouts: list[str] | None = setting(
        None, "Take groups of samples and their totals from these run directories or jsonl files."
    )
    eval_from_rollouts: list[str] | None = setting(
        None, "Pairs that the evaluations during training measure, from these run directories or jsonl files."
    )
    pairs_per_prompt: int = setting(
        1,
        "Pairs kept per prompt, those with the largest margins: of a group the best against the worst, the second "
        "best against the second worst, and so on.",
        range=at_least(1),
    )
    min_margin: float = setting(
        0.0, "Smallest difference of the two totals; equal totals are never a pair.", range=at_least(0)
    )


@dataclass
class DPOConfig(DefaultsMixin, trl.DPOConfig):
    """TRL's DPOConfig with rlseq's defaults: nothing is cut, unless max_length is given."""

    _argument_group_name = "training (rlseq)"
    needs_of_inherited = (
        *inherited.OF_SFT,
        (("ref_model_",), Need("sync_ref_model", lambda config: config.sync_ref_model)),
    )

    max_length: int | None = setting(None, "Longest prompt and completion, in tokens; default: no limit.")

    def __post_init__(self) -> None:
        validate_given(self)
        super().__post_init__()
        validate(self)
