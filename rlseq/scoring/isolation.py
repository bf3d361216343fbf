"""Settings and random states of the process that a reward may change: they are put back when it returns."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def kept_settings(random_states: bool = True, *, advance: bool = True) -> Iterator[None]:
    """Run reward code, then restore what it changed: torch's grad mode, default dtype and device, threads, determinism
    and matmul precision, and (`random_states`) the random states of Python, numpy and torch.

    The code draws from a seed that is taken from Python's random state: other noise at each call, the same noise in a
    run that is resumed, and no trace in training's own states. Without `advance` (of code that is loaded and not
    called) Python's state is left where it was, too. Modules that nobody imported are left alone.
    """
    torch: Any = sys.modules.get("torch")
    before = _settings(torch) if hasattr(torch, "get_float32_matmul_precision") else {}
    states = _random_states(torch if before else None, advance) if random_states else []
    try:
        yield
    finally:
        for set_state, state in states:
            set_state(state)
        if before:
            after = _settings(torch)
            for setter, value in before.items():
                if after[setter] != value:
                    _SETTERS[setter](torch, value)


_SETTERS: dict[str, Callable[[Any, Any], None]] = {
    "grad": lambda torch, value: torch.set_grad_enabled(value),
    "dtype": lambda torch, value: torch.set_default_dtype(value),
    "device": lambda torch, value: torch.set_default_device(value),
    "threads": lambda torch, value: torch.set_num_threads(value),
    "deterministic": lambda torch, value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    "precision": lambda torch, value: torch.set_float32_matmul_precision(value),
    "cudnn": lambda torch, value: _set_cudnn(torch, value),
}


def _settings(torch: Any) -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
    }


def _set_cudnn(torch: Any, value: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = value


def _random_states(torch: Any, advance: bool) -> list[tuple[Callable[[Any], None], Any]]:
    """The states with how to set them back; the code that follows draws from a new seed."""
    unmoved = random.getstate()
    seed = random.getrandbits(32)
    python = random.getstate() if advance else unmoved
    states: list[tuple[Callable[[Any], None], Any]] = [(random.setstate, python)]
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if hasattr(numpy, "random"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
        numpy.random.seed(seed)
    if torch is not None:
        states.append((torch.set_rng_state, torch.get_rng_state()))
        if torch.cuda.is_initialized():
            states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        torch.manual_seed(seed)
    return states
