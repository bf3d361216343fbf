"""Settings of on-policy distillation: a teacher that judges the student's own rollouts token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlseq.config.fields import ABOVE_0, FINITE_ABOVE_0, Conflict, Need, Range, setting
from rlseq.config.validation.inherited import EXACT_OBJECTIVES

_TEACHER = Need("--teacher_name_or_path", lambda config: config.teacher_name_or_path is not None)
# What the setting `objective` cannot stand without.
NO_ORDER = Conflict(
    "max_rl needs the number of terms of its series: give --max_rl_order (1: expected accuracy).",
    lambda config: config.objective == "max_rl" and config.max_rl_order is None,
)
NO_TEACHER = Conflict(
    "distillation needs a teacher: give --teacher_name_or_path.",
    lambda config: config.objective == "distillation" and config.teacher_name_or_path is None,
)


@dataclass
class TeacherArguments:
    """The teacher, and what is trained of its judgement (docs/objectives.md)."""

    teacher_name_or_path: str | None = setting(
        None,
        "Teacher of on-policy distillation: a path or hub id with the model's tokenizer. Its divergence is added to "
        "the loss at every trained token of the rollouts; alone, without rewards, by --objective distillation.",
        conflicts=(
            Conflict(
                "judges rollouts, and objective {objective} samples none. Take another objective.",
                lambda config: config.objective in EXACT_OBJECTIVES,
            ),
            Conflict(
                "reads the policy's output layer itself: leave out cast_lm_head_to_fp32",
                lambda config: config.cast_lm_head_to_fp32,
            ),
        ),
    )
    teacher_coef: float = setting(1.0, "Weight of the teacher's divergence in the loss.", range=ABOVE_0, needs=_TEACHER)
    teacher_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = setting(
        "reverse_kl",
        "Divergence per token, exact over the vocabulary: reverse_kl KL(student||teacher), forward_kl "
        "KL(teacher||student), or jsd, the generalised Jensen-Shannon divergence of GKD.",
        needs=_TEACHER,
    )
    teacher_jsd_beta: float = setting(
        0.5,
        "The teacher's share in the mixture of jsd; towards 0 it behaves as forward_kl, towards 1 as reverse_kl.",
        range=Range("above 0 and below 1", above=0, below=1),
        needs=Need("teacher_divergence jsd", lambda config: config.teacher_divergence == "jsd"),
    )
    teacher_signal: Literal["loss", "reward"] = setting(
        "loss",
        "loss: the divergence is a loss at each sampled prefix, as if prefixes did not depend on the policy. reward: "
        "the gradient of the expected divergence of whole sequences, which adds to that the policy gradient of the "
        "divergence of the tokens that follow.",
        needs=_TEACHER,
    )
    teacher_temperature: float | None = setting(
        None,
        "Temperature of the teacher's distribution (default: temperature, which the student's always has).",
        range=FINITE_ABOVE_0,
        needs=_TEACHER,
    )
    teacher_dtype: str | None = setting(
        None,
        "Precision of the teacher's weights: auto is its checkpoint's own (default: the policy's).",
        choices=["float32", "bfloat16", "float16", "auto"],
        needs=_TEACHER,
    )
    teacher_quantization: Literal["4bit", "8bit"] | None = setting(
        None, "Quantise the teacher's weights by bitsandbytes (default: as they were saved).", needs=_TEACHER
    )

    def teacher_quantization_fields(self) -> dict[str, Any] | None:
        """The teacher's quantisation as `rlseq.engine.model.load.load_model` takes it; None where there is none."""
        return None if self.teacher_quantization is None else {f"load_in_{self.teacher_quantization}": True}
