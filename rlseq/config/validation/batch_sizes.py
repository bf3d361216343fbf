"""Batch sizes that divide: the arithmetic of GRPO's generation batch, and advice where it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def working_batch_sizes(
    *,
    per_device_train_batch_size: int,
    num_generations: int,
    processes: int = 1,
    steps_per_generation: int = 1,
    generation_batch_size: int | None = None,
) -> dict[str, list[int]]:
    """Return, by setting, the nearest values (one below, one above) that divide when the others stay.

    GRPO's rule: the generation batch, in completions, holds whole groups and whole global batches. It is
    `generation_batch_size` where given, else per-device batch × processes × steps per generation.

    Returns:
        An empty dict when the given sizes work; a setting that cannot help alone is left out.
    """

    def works(batch: int, generations: int, generation_batch: int | None) -> bool:
        total = batch * processes * steps_per_generation if generation_batch is None else generation_batch
        return generations >= 2 and total % generations == 0 and total % (batch * processes) == 0

    def nearest(start: int, fits: Callable[[int], bool]) -> list[int]:
        # Some common multiple of the sizes lies within their product, so this bound loses no answer.
        limit = start + batch * max(generations, 2) * processes
        below = next((n for n in range(min(start, limit), 0, -1) if fits(n)), None)
        above = next((n for n in range(start + 1, limit + 1) if fits(n)), None)
        return [n for n in (below, above) if n is not None]

    batch, generations, total = per_device_train_batch_size, num_generations, generation_batch_size
    if min(batch, processes, steps_per_generation) < 1 or works(batch, max(generations, 1), total):
        return {}
    answers = {
        "per_device_train_batch_size": nearest(batch, lambda n: works(n, max(generations, 1), total)),
        "num_generations": nearest(generations, lambda n: works(batch, n, total)),
    }
    if total is not None:
        answers["generation_batch_size"] = nearest(total, lambda n: works(batch, max(generations, 1), n))
    return {name: values for name, values in answers.items() if values}


def batch_advice(values: Mapping[str, Any], *, processes: int) -> str:
    """Return a sentence with the sizes that work, or an empty one, for GRPO settings that do not divide.

    Args:
        values: GRPOConfig's fields by name, as given (before it derives one from another).
        processes: how many processes train.
    """
    sizes = working_batch_sizes(
        per_device_train_batch_size=values["per_device_train_batch_size"],
        num_generations=values["num_generations"],
        processes=processes,
        steps_per_generation=values["steps_per_generation"] or values["gradient_accumulation_steps"],
        generation_batch_size=values["generation_batch_size"],
    )
    if not sizes:
        return ""
    options = [f"--{name} {' or '.join(map(str, numbers))}" for name, numbers in sizes.items()]
    return f" With {processes} process{'es' if processes > 1 else ''}, any of these works: {'; '.join(options)}."
