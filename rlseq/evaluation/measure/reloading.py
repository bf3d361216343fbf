"""A result loaded again, as an evaluation loads it, against the model that was trained: the same log-probs?

A weight that was not saved, or was saved under a name that nothing loads, is random or the start's in every later
evaluation. The trained model is still in memory when a run ends, so that the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.model.load import unwrapped
from rlseq.errors import ModelError
from rlseq.evaluation.measure.loading import load_checkpoint

ROLLOUTS = 20
_PEFT = "base_model.model."
_NAMED = 3  # weights that a line names


@dataclass(frozen=True)
class Tolerance:
    """The most by which log-probs of tokens may differ: in the mean or at most, nats.

    Attention in another order of sums and a merged adapter round differently. Of SmolLM2-135M that is 0.00008 at most
    in float32, and 0.05 in the mean (0.5 at most) in bfloat16. `metrics` is the most by which a metric may differ, in
    parts of its value, or of 1 where that is smaller: where likelihoods are that near, few greedy tokens change.
    """

    of: str
    nats: float
    metrics: float


TOLERANCES = {
    torch.float32: Tolerance("greatest", 1e-3, metrics=0.01),
    torch.float16: Tolerance("mean", 0.02, metrics=0.1),
    torch.bfloat16: Tolerance("mean", 0.1, metrics=0.1),
}


@dataclass(frozen=True)
class Remembered:
    """Completions, and the log-probs of their tokens under the model in memory.

    Attributes:
        prompt_ids, completion_ids, logprobs: of N completions.
        dtype: of the model's weights.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    logprobs: Sequence[torch.Tensor]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, model: torch.nn.Module, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> Remembered:
        """What a model says of completions."""
        dtype = model.get_input_embeddings().weight.dtype
        found = [x.cpu() for x in score(model, prompt_ids, completion_ids)]
        return cls(list(prompt_ids), list(completion_ids), found, dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def under(self, model: torch.nn.Module) -> Remembered:
        """What another model says of the same completions."""
        return Remembered.of(model, self.prompt_ids, self.completion_ids)


@dataclass(frozen=True)
class Reloaded:
    """How far a folder's model is from the one in memory.

    Attributes:
        path: the folder.
        completions, tokens: what was scored.
        tolerance: what passes.
        difference: the greatest or mean difference of a token's two log-probs, nats; None: it could not be loaded.
        error: why not.
        weights: by name the greatest difference of each weight that is not equal; None of one on one side only.
        metrics: how many of the last evaluation in training were measured again.
        changed: by name the two values of those that differ by more than the tolerance.
    """

    path: str
    completions: int
    tokens: int
    tolerance: Tolerance
    difference: float | None = None
    error: str | None = None
    weights: Mapping[str, float | None] = field(default_factory=dict)
    metrics: int = 0
    changed: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        near = self.difference is not None and self.difference <= self.tolerance.nats  # NaN is not
        return near and not self.weights and not self.changed

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}

    def describe(self) -> str:
        """One line for the terminal."""
        if self.error is not None:
            return f"WARNING: {self.path} could not be loaded again to compare it with the trained model: {self.error}"
        seen = (
            f"log-probs of {self.completions} rollouts: {self.tolerance.of} difference {self.difference:.1g} nats, "
            f"tolerance {self.tolerance.nats:g}"
        )
        if self.metrics:
            seen += f"; {self.metrics - len(self.changed)} of {self.metrics} metrics of the last evaluation as logged"
        if self.same:
            return f"{self.path}, loaded again, is the model that was trained ({seen})"
        return (
            f"WARNING: {self.path}, loaded again, is not the model that was trained ({seen}){self._differing()}. What "
            "is evaluated from it is another model."
        )

    def _differing(self) -> str:
        if not self.weights:
            named = [
                f"{name} ({new:.4g}, logged {old:.4g})" for name, (old, new) in list(self.changed.items())[:_NAMED]
            ]
            return f"; these metrics differ: {', '.join(named)}" if named else ""
        first = sorted(self.weights.items(), key=lambda item: -(math.inf if item[1] is None else item[1]))
        named = [f"{name} ({'on one side only' if by is None else f'by {by:.2g}'})" for name, by in first[:_NAMED]]
        more = f" and {len(first) - _NAMED:,} more" if len(first) > _NAMED else ""
        return f"; these weights differ: {', '.join(named)}{more}"


def compare_reloaded(
    path: str | Path,
    expected: Remembered,
    *,
    tolerance: Tolerance | None = None,
    trained: torch.nn.Module | None = None,
    make: Callable[[], torch.nn.Module] | None = None,
    quantization: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
    measure: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
    logged: Mapping[str, float] | None = None,
) -> Reloaded:
    """Load a folder as an evaluation does, and compare its log-probs, and its weights, with those remembered.

    Args:
        expected: of the model in memory.
        tolerance: of the log-probs; None: that of the weights' dtype.
        trained: that model, whose weights are compared too; None where they are not whole, or not those of the folder.
        make: makes a model of the weights that the folder should hold; called where log-probs differ.
        quantization, allow_missing: as `load_checkpoint`.
        measure, logged: the evaluation during training, and what it last said of the model in memory.
    """
    tokens = sum(map(len, expected.logprobs))
    found = Reloaded(str(path), len(expected.logprobs), tokens, tolerance or TOLERANCES[expected.dtype])
    try:
        model = load_checkpoint("result", str(path), allow_missing, quantization, expected.dtype_name)
        logprobs = score(model, expected.prompt_ids, expected.completion_ids)
    except (ModelError, torch.OutOfMemoryError) as error:
        return replace(found, error=" ".join(str(error).split()))
    pairs = zip(expected.logprobs, logprobs, strict=True)
    gaps = torch.cat([torch.zeros(1), *((x - y.cpu()).abs() for x, y in pairs)])
    difference = gaps.max().item() if found.tolerance.of == "greatest" else gaps.sum().item() / max(found.tokens, 1)
    found = replace(found, difference=difference)
    if trained is None and make is not None and not found.same:
        trained = make()
    if trained is not None:
        found = replace(found, weights=differing_weights(trained, model))
    if measure is None or not logged:
        return found
    again = measure(model)
    changed = {
        name: (value, again[name])
        for name, value in logged.items()
        if not abs(again[name] - value) <= found.tolerance.metrics * max(1.0, abs(value))
    }
    return replace(found, metrics=len(logged), changed=changed)


@torch.no_grad()
def differing_weights(trained: torch.nn.Module, loaded: torch.nn.Module) -> dict[str, float | None]:
    """By name the greatest difference of each weight in which two models differ; None where one has it alone.

    Names are those of the loaded one: without what adapters and wrappers put before them. What only the trained model
    has (a critic) does not count.
    """
    of = {unwrapped(name).removeprefix(_PEFT): value for name, value in trained.state_dict().items()}
    found: dict[str, float | None] = {}
    for name, value in loaded.state_dict().items():
        mine = of.get(unwrapped(name))
        if mine is None or mine.shape != value.shape:
            found[name] = None
        elif not torch.equal(mine.to(value.device, value.dtype), value):
            found[name] = (to_float64(mine.to(value.device)) - to_float64(value)).abs().max().item()
    return found
